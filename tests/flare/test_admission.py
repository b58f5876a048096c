"""What one site sends cannot bend, stop or fill the federation: each way that was open, and what closes it."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.app_common.abstract.fl_model import FLModel
from nvflare.app_common.utils.fl_model_utils import FLModelUtils

from nvflare_fm.adapter import Adapter, AdapterUpdate, LoraPair, RoundTask
from nvflare_fm.aggregation import combine as combining
from nvflare_fm.aggregation import merge
from nvflare_fm.aggregation.combine import Combined
from nvflare_fm.aggregation.salvage import without_the_largest
from nvflare_fm.errors import ConfigError, ModelError, WireError
from nvflare_fm.export import folder as export
from nvflare_fm.flare import wire
from nvflare_fm.flare.aggregator import AdapterAggregator
from nvflare_fm.flare.controller import FedPEFT
from nvflare_fm.flare.ledger import Ledger
from nvflare_fm.record.round import in_words, read_line, written
from tests.codes import refused

from .messages import LAYERS, MANIFEST, PLAN, adapter, same, update

LAYER = sorted(LAYERS)[0]
MORE = [f"layer{i}" for i in range(20_000)]
HONEST = ("alder", "birch", "cedar")


def server(number: int = 1, **settings: Any) -> FedPEFT:
    """In round `number`, in which three honest sites have answered and a fourth may."""
    how = {key: settings.pop(key) for key in list(settings) if key != "sites"}
    made = FedPEFT(num_rounds=9, plan={"peft": dict(PLAN.peft)}, aggregator=AdapterAggregator(how), **settings)
    made.fl_ctx = FLContext()
    made.ledger = Ledger(number, 9, [*HONEST, "liar"], 0)
    state = adapter(9) if number else Adapter()
    task = RoundTask(made.settled.plan, state, MANIFEST if number else None, number, 9)
    made.aggregator.begin(task, made.settled)
    for seed, site in enumerate(HONEST):
        assert came(made, stepped(update(site, seed)))
    return made


def stepped(one: AdapterUpdate) -> AdapterUpdate:
    return replace(one, report=replace(one.report, steps=PLAN.training.local_steps))


def came(made: FedPEFT, sent: AdapterUpdate | FLModel) -> bool:
    model = wire.write_update(sent) if isinstance(sent, AdapterUpdate) else sent
    model.meta.setdefault("client_name", sent.site if isinstance(sent, AdapterUpdate) else "liar")
    return made._take(model)


def lie(change: Callable[[FLModel, dict[str, Any]], Any], **of: Any) -> FLModel:
    model = wire.write_update(stepped(update("liar", 7, **of)))
    change(model, model.meta[wire.KEY])
    return model


def times(factor: float, *ends: str) -> Callable[[FLModel, Any], Any]:
    def change(model: FLModel, _: Any) -> None:
        model.params = {n: t * factor if n.endswith(ends or "") else t for n, t in model.params.items()}

    return change


REFUSED = {
    "scale 1e300": (lie(lambda m, c: c["scales"].update({LAYER: 1e300})), "wrong_type"),
    "a scale the plan does not imply": (lie(lambda m, c: None, scale=3.9), "scale_not_in_plan"),
    "float64": (lie(lambda m, c: m.params.update({"head": torch.ones(2).double() * 1e300})), "tensor_type"),
    "float8": (lie(lambda m, c: m.params.update({"head": torch.ones(2).to(torch.float8_e5m2)})), "tensor_type"),
    "a product beyond float32": (lie(times(1e25, "lora_A.weight", "lora_B.weight")), "values_too_large"),
    "norms × 1e30": (lie(times(1e30)), "values_too_large"),
    "rank 8192": (lie(lambda m, c: None, rank=8192, scale=4 * (3 / 8192) ** 0.5), "rank_not_in_plan"),
    "10¹⁰ examples": (lie(lambda m, c: c["report"].update(examples=10**10)), "wrong_type"),
    "metrics that are no numbers": (lie(lambda m, c: c["report"].update(before={"loss": "low"})), "wrong_type"),
    "a name of 10 MB": (lie(lambda m, c: m.params.update({"x" * 10**7: torch.ones(2)})), "other_layers"),
    "a name that is no text": (lie(lambda m, c: m.params.update({7: torch.ones(2)})), "other_layers"),
    "20,000 extra layers": (
        lie(lambda m, c: m.params.update({f"{n}.lora_{f}.weight": torch.ones(1, 1) for n in MORE for f in "AB"})
            or c["scales"].update(dict.fromkeys(MORE, 4.0))), "other_layers"),
    "200,000 tensors": (lie(lambda m, c: m.params.update({f"t{i}": 1 for i in range(200_000)})), "other_layers"),
    "a manifest with line breaks": (lie(lambda m, c: c["manifest"].update(base="a\n\x1b[31mb")), "wrong_type"),
    "a class of the base model": (lie(lambda m, c: c["manifest"].update(base_class="os.system")), "wrong_type"),
    "another base model": (lie(lambda m, c: c["manifest"].update(base="base-2")), "other_base"),
    "a metric's name of terminal codes": (lie(lambda m, c: c["report"].update(after={"\x1b[2J": 1.0})), "wrong_type"),
    "a thousand metrics": (
        lie(lambda m, c: c["report"].update(before={f"m{i}": 1.0 for i in range(1000)})), "wrong_type"),
}  # fmt: skip


@pytest.mark.usefixtures("malformed_allowed")
@pytest.mark.parametrize("what", REFUSED)
def test_it_is_refused_at_once_by_name_and_the_others_round_goes_on(what: str) -> None:
    model, code = REFUSED[what]
    made, began = server(), time.process_time()
    assert not came(made, model)
    assert time.process_time() - began < 2  # 23 s once
    reason = made.ledger.out["liar"]
    assert (reason.kind, reason.code) == ("rejected", code), reason
    assert reason.text.isprintable()
    assert len(reason.text) < 1000
    made.aggregator.aggregate_model()
    assert made.aggregator.combined
    assert set(made.aggregator.combined.weights) == {*HONEST}


@pytest.mark.parametrize("name", ["a b", "a..b", ".a", "a.", "", "a/../b", "ä", "a\nb", "\x1b[2J", "x" * 257])
def test_in_the_first_round_too_a_tensor_has_a_name_as_peft_gives_them(name: str) -> None:
    made = server(0)
    assert not came(made, lie(lambda m, c: m.params.update({name: torch.ones(2)})))
    assert made.ledger.out["liar"].code == "tensor_name"


def test_one_step_against_the_others_is_refused_where_changes_count_by_the_step() -> None:
    model = lie(lambda m, c: c["report"].update(steps=1))
    assert not came(server(normalize_steps=True), model)
    assert came(server(), lie(lambda m, c: c["report"].update(steps=1)))  # else it weighs nothing


@pytest.mark.parametrize(
    ("weigh", "claim"),
    [("examples", {"examples": 10**9}), ("loss", {"before": {"loss": 1e9}})],
    ids=["examples", "loss"],
)
def test_what_it_says_of_itself_does_not_give_it_all_the_weight(weigh: str, claim: dict[str, Any]) -> None:
    made = server(weigh=[weigh])
    assert came(made, lie(lambda m, c: c["report"].update(claim)))
    made.aggregator.aggregate_model()
    combined = made.aggregator.combined
    assert combined
    assert combined.weights["liar"] < 0.8
    assert "counts as" in combined.held["liar"]


def test_a_change_far_from_the_others_is_clipped_and_the_ledger_says_so() -> None:
    made = server()
    assert came(made, lie(times(300.0, "lora_B.weight")))
    made.aggregator.aggregate_model()
    assert made.aggregator.combined
    made.ledger.close(made.aggregator.combined, made.aggregator.updates)
    line = read_line(written(made.ledger.line))
    assert 0 < line.guarded["liar"].multiplier < 0.05
    assert list(line.guarded) == ["liar"]
    (_, said) = in_words(line)
    assert said == f"  liar: {line.guarded['liar']}"
    assert said.removeprefix("  ") in made.ledger.progress({}, line.scaled)["scaled"]


def test_a_guard_names_the_site_that_sends_poison_and_the_reason_in_record_and_monitor() -> None:
    made = server(guard=[{"rule": "geometric_median", "mix": "nnm", "f": 1}])
    assert came(made, lie(times(-300.0, "lora_B.weight")))
    made.aggregator.aggregate_model()
    combined = made.aggregator.combined
    assert combined
    assert combined.refused["liar"].kind == "guard"
    made.ledger.close(combined, made.aggregator.updates)
    line = read_line(written(made.ledger.line))
    assert (line.guarded["liar"].weight, line.guarded["liar"].left_out) == (0.0, True)
    assert (line.scaled, line.out["liar"].text) == ({}, line.guarded["liar"].reason)
    assert "as far from what the sites agree on" in made.ledger.progress({}, line.scaled)["sites_out"]
    assert sum("liar: guard: its products lie" in said for said in in_words(line)) == 1


def test_a_round_with_fewer_updates_than_its_guard_needs_leaves_the_adapter_as_it_was(caplog: Any) -> None:
    made = server(guard=[{"rule": "multi_krum", "f": 1}])
    made.aggregator.aggregate_model()
    combined = made.aggregator.combined
    assert combined
    assert "[too_few_for_guard]" in combined.failed
    assert same(combined.adapter, adapter(9))
    assert not [record for record in caplog.records if record.exc_info]


def test_a_configuration_of_peft_that_a_site_sends_is_not_looked_at(tmp_path: Path) -> None:
    """Of 50 MB, with a regular expression that takes for ever and a module that would be imported."""
    evil = {"exclude_modules": "(a+)+$", "auto_mapping": {"parent_library": "os"}, "more": "x" * 50_000_000}
    made = server(0)
    model = lie(lambda m, c: c["manifest"].update(adapter_config=evil))
    model.meta["client_name"] = "aaa"  # the first by name
    assert came(made, model)
    saved = made.aggregator.aggregate_model()
    read = wire.read_saved(saved.params, saved.meta, "test")
    assert read.manifest == MANIFEST
    folder = export.write_adapter(tmp_path / "last", export.Saved(read.adapter, read.manifest, 0, read.plan))
    said = (folder / export.CONFIG).read_text()
    assert len(said) < 2000
    assert "exclude_modules" not in said
    assert json.loads(said)["auto_mapping"] is None
    assert json.loads(said)["target_modules"] == [layer.removeprefix("base_model.model.") for layer in sorted(LAYERS)]


# --- what chooses the best adapter


@pytest.mark.parametrize("lied", [1e308, -1e308, 1e9, -1e9, float("nan"), float("inf"), 0.0])
@pytest.mark.parametrize("mode", ["min", "max"])
def test_one_site_cannot_say_which_round_is_the_best(lied: float, mode: str) -> None:
    made, kept = server(), []
    made.key_metric_mode = mode
    made.event = kept.append  # type: ignore[method-assign]
    made.get_run_dir = lambda: "/dev/null"  # type: ignore[method-assign]
    made.ledger.write = lambda folder: None  # type: ignore[method-assign]
    assert came(made, lie(lambda m, c: c["report"].update(before={"loss": lied})))
    made._merged()
    assert made.best is not None
    assert 3.0 <= made.best <= 5.0  # what the honest measured: 3, 4 and 5
    assert 3.0 <= made.ledger.progress(made.latest)["loss"] <= 5.0


# --- what nobody foresaw


def test_an_error_of_ours_ends_the_job_with_its_reason_and_no_path(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: FedPEFT) -> None:
        raise ModelError("the disk is full", "/srv/nvflare", code="adapter_not_saved")

    made, in_words = server(), []
    made.panic = in_words.append  # type: ignore[method-assign]
    monkeypatch.setattr(FedPEFT, "_run_rounds", fails)
    made.run()
    assert in_words == ["the disk is full [adapter_not_saved]"]


@pytest.mark.parametrize("sites", range(1, 12))
@pytest.mark.parametrize("too_many", range(1, 12))
def test_where_the_largest_spoil_the_merge_most_of_the_round_is_merged_or_none(sites: int, too_many: int) -> None:
    """Without one, two, four, … of the largest, while more than half are left."""

    def merge(updates: Sequence[AdapterUpdate]) -> Combined:
        if len(updates) > sites - too_many:
            raise RuntimeError("why")
        return Combined(Adapter(), None, {each.site: 1.0 for each in updates})

    came = [update(f"s{i:02}", i) for i in range(sites)]
    tried = next((n for n in (1, 2, 4, 8) if n >= too_many), 99)
    if tried > (sites - 1) // 2:
        with pytest.raises(WireError) as raised:
            without_the_largest(merge, came, "why")
        assert raised.value.code == "merge_failed"
    else:
        merged = without_the_largest(merge, came, "why")
        assert len(merged.refused) == tried
        assert {*merged.refused, *merged.weights} == {each.site for each in came}


@pytest.mark.parametrize("failing", ["merge", "values"])
@pytest.mark.parametrize("sites", [{"liar"}, {"liar", "alder", "birch", "cedar"}])
def test_a_merge_that_fails_all_the_same_goes_on_without_the_largest_or_keeps_the_adapter(
    failing: str, sites: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = server()
    assert came(made, lie(times(3.0)))
    real = merge.registry["exact"].merge

    def breaks(start: LoraPair, pairs: Any, weights: Any) -> LoraPair:
        merged = real(start, pairs, weights)
        if not sites & {u.site for u in pairs.updates}:
            return merged
        if failing == "values":
            return replace(merged, B=merged.B * float("nan"))
        raise torch.linalg.LinAlgError("the algorithm failed to converge\n\x1b[31m")

    monkeypatch.setitem(merge.registry._entries, "exact", replace(merge.registry["exact"], merge=breaks))
    model = made.aggregator.aggregate_model()
    combined = made.aggregator.combined
    assert combined
    made.ledger.close(combined, made.aggregator.updates)
    if sites == {"liar"}:
        assert set(combined.weights) == {*HONEST}
        assert combined.refused["liar"].code == "merge_failed"
        assert not made.ledger.line.error
    else:
        assert same(wire.read_saved(model.params, model.meta, "test").adapter, adapter(9))
        assert made.ledger.line.error.isprintable()
        assert made.ledger.progress({})["error"] == made.ledger.line.error
        assert not combined.weights


def test_the_first_round_can_fail_too_and_the_next_one_starts_afresh(monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(*_: Any) -> LoraPair:
        raise RuntimeError("nobody knows why")

    made = server(0)
    with monkeypatch.context() as patch:
        patch.setitem(merge.registry._entries, "exact", replace(merge.registry["exact"], merge=breaks))
        model = made.aggregator.aggregate_model()
    assert model.params == {}
    assert wire.read_saved(model.params, model.meta, "test") is None
    assert combining.Combined is type(made.aggregator.combined)


CODES = [None, 7, "EXECUTION_EXCEPTION\n\x1b[31m", torch.ones(2), numpy.ones(3), ["OK"], b"OK", "x" * 10**6]


@pytest.mark.parametrize("code", CODES)
def test_a_return_code_ends_nobody_elses_round_and_is_printed_safely(code: Any) -> None:
    made = server()
    result = FLModelUtils.to_shareable(lie(lambda m, c: None))
    result.set_return_code(code)
    assert not made._accept_train_result("liar", result, made.fl_ctx)
    made.process_result_of_unknown_task(type("Client", (), {"name": "liar"}), "train", "1", result, made.fl_ctx)
    assert made.ledger.out["liar"].kind == "stopped"
    assert made.ledger.out["liar"].text.isprintable()
    assert len(made.ledger.out["liar"].text) < 200


def test_what_is_no_message_is_left_out_with_a_reason() -> None:
    made = server()
    assert not made._accept_train_result("liar", Shareable(), made.fl_ctx)
    assert (made.ledger.out["liar"].kind, made.ledger.out["liar"].code) == ("rejected", "malformed")


def test_a_refusal_is_printed_safely() -> None:
    made = server()
    assert not came(made, wire.write_refusal("no\n\x1b[2Jround 3: alder does not count" + "!" * 10_000))
    assert str(made.ledger.out["liar"]).startswith("refused: no\\n\\x1b[2Jround 3")
    assert len(made.ledger.out["liar"].text) < 600


# --- a job must say what the server is to hold its sites to


def test_a_site_with_a_lora_alpha_of_its_own_is_listed_at_the_server() -> None:
    sent = stepped(update("liar", 7, scale=7.0))
    assert not came(server(), sent)
    assert came(server(sites={"liar": {"lora_alpha": 21.0}}), sent)
    with refused("wrong_setting", ConfigError, "liar", '"rank"'):
        server(sites={"liar": {"rnk": 2}})
