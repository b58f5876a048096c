"""An adapter of a site's own: chosen on its own rows, kept there, and nothing that the site sends depends on it."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model_state_dict
from transformers import AutoModelForCausalLM

from nvflare_fm.adapter import RoundTask
from nvflare_fm.config import Aggregation, RoundPlan, SiteOverrides, TaskPlan
from nvflare_fm.errors import ConfigError, PolicyError, TrainingError
from nvflare_fm.export.folder import read_adapter
from nvflare_fm.job.at_home import PARTS, PERSONAL, at_home, parts
from nvflare_fm.job.settle import settle
from nvflare_fm.simulate import SimulatedRound, federate
from nvflare_fm.site.model.own_adapter import OwnAdapter
from nvflare_fm.site.offer.policy import fit
from nvflare_fm.site.offer.site_config import SiteConfig
from nvflare_fm.site.worker import Worker
from tests.codes import refused
from tests.encryption import kits
from tests.site import tiny

QUICK: dict[str, Any] = {"local_steps": 2, "batch_size": 4, "learning_rate": 1e-2}


def asked(steps: int = 6, rate: float = 0.5, task: str = "causal_lm", **more: Any) -> TaskPlan:
    return tiny.plan(task, **({"training": QUICK, "personalize": {"steps": steps, "rate": rate}} | more))


def site(folder: Path, model: Path, task: str = "causal_lm", rank: int = 2, **more: Any) -> Worker:
    """Trains on other rows than it is measured on."""
    files = [str(tiny.jsonl(folder / f"{task}-{shift}.jsonl", tiny.rows(task, shift=shift))) for shift in (0, 11)]
    config = tiny.site(model, Path(files[0]), data={"notes": {"train": files[0], "validation": files[1]}}, **more)
    personal, overrides = OwnAdapter(folder, PERSONAL), SiteOverrides(rank=rank)
    return Worker("site-1", config, overrides, personal=personal)


def after(worker: Worker, plan: RoundPlan, how: Aggregation = Aggregation(), **more: Any) -> tuple[Any, RoundTask]:
    """The last round of two, and the task that comes after it."""
    *_, last = federate({"site-1": worker}, plan, how, 2, **more)
    settled = settle(plan, how, {"site-1": worker.overrides}).plan
    return last, RoundTask(settled, last.combined.adapter, last.combined.manifest, 2, 2)


@pytest.mark.parametrize("rate", [0.01, 0.5, 10.0])
@pytest.mark.parametrize("task", ["causal_lm", "sequence_classification"])
def test_what_is_kept_is_never_worse_on_the_rows_held_out(
    llama: Path, bert: Path, tmp_path: Path, task: str, rate: float
) -> None:
    worker = site(tmp_path, llama if task == "causal_lm" else bert, task)
    _, home = after(worker, asked(rate=rate, task=task))
    done = worker.personalize(home)
    losses = [metrics["loss"] for metrics in done.tried]
    assert len(losses) == PARTS + 1
    assert losses[done.best] == min(losses) <= losses[0]
    assert done.steps == [0, 2, 4, 6][done.best]
    kept = read_adapter(tmp_path / PERSONAL)
    again = RoundTask(kept.plan, kept.adapter, kept.manifest)  # type: ignore[arg-type]
    assert worker.validate(again)["loss"] == pytest.approx(losses[done.best], rel=1e-4)
    assert worker.validate(replace(home, round=0))["loss"] == losses[0]
    assert (kept.round, kept.plan.training.learning_rate) == (1, rate * QUICK["learning_rate"])  # type: ignore[union-attr]


def test_what_diverges_leaves_the_global_adapter(llama: Path, tmp_path: Path) -> None:
    worker = site(tmp_path, llama)
    last, home = after(worker, asked())
    measure = worker._evaluate

    def spoilt(model: Any, *args: Any) -> dict[str, float]:
        found = measure(model, *args)
        next(p for p in model.parameters() if p.requires_grad).data.fill_(float("nan"))
        return found

    worker._evaluate = spoilt  # type: ignore[method-assign]
    with refused("diverged", TrainingError):
        worker.personalize(home)
    kept = read_adapter(tmp_path / PERSONAL).adapter
    for layer, pair in last.combined.adapter.lora.items():
        torch.testing.assert_close(kept.lora[layer].delta(), pair.delta(), atol=1e-6, rtol=1e-4)


def test_whoever_is_stopped_keeps_the_best_so_far(llama: Path, tmp_path: Path) -> None:
    worker = site(tmp_path, llama)
    _, home = after(worker, asked())
    measure, seen = worker._evaluate, []

    def stopped(*args: Any) -> dict[str, float]:
        seen.append(measure(*args))
        worker.should_stop = lambda: len(seen) == 2
        return seen[-1]

    worker._evaluate = stopped  # type: ignore[method-assign]
    with refused("stopped", TrainingError):
        worker.personalize(home)
    assert seen[1]["loss"] < seen[0]["loss"]
    kept = read_adapter(tmp_path / PERSONAL)
    worker._evaluate, worker.should_stop = measure, lambda: False  # type: ignore[method-assign]
    found = worker.validate(RoundTask(home.plan, kept.adapter, kept.manifest))
    assert found["loss"] == pytest.approx(seen[1]["loss"], rel=1e-4)


@pytest.mark.parametrize("merge", ["exact", "share_a", "stack", "svd"])
def test_nothing_that_a_site_sends_or_owes_depends_on_it(llama: Path, tmp_path: Path, merge: str) -> None:
    results = []
    for is_personal in (False, True):
        logged: list[str] = []
        worker = site(tmp_path / str(is_personal), llama, rank=4)
        worker.own, worker.log = OwnAdapter(tmp_path / str(is_personal)), lambda name, *_: logged.append(name)
        plan, how = asked() if is_personal else tiny.plan(training=QUICK), Aggregation(merge=merge)
        last, home = after(worker, plan, how)
        told = len(logged)
        if is_personal:
            worker.personalize(home)
        assert len(logged) == told, "what is logged leaves a site"
        submitted = worker.submit()[0].tensors()
        own = read_adapter(tmp_path / str(is_personal) / "own_adapter").adapter if merge == "share_a" else None
        again = worker.train(replace(home, round=1, plan=home.plan.model_copy(update={"seed": 7})))
        whole = [last.combined.adapter.tensors(), submitted, again.adapter.tensors(), own.tensors() if own else {}]
        results.append((whole, again.report.loss))
    (without, loss), (with_it, other) = results
    assert loss == other
    for one, two in zip(without, with_it, strict=True):
        assert one.keys() == two.keys()
        assert all(torch.equal(one[name], two[name]) for name in one)


def test_the_folder_is_one_that_peft_loads(llama: Path, tmp_path: Path) -> None:
    worker = site(tmp_path, llama)
    _, home = after(worker, asked(rate=2.0, peft={"method": "lora", "rank": 4, "lora_alpha": 8}))
    assert worker.personalize(home).best, "else it is the global adapter, which other tests load"
    kept = read_adapter(tmp_path / PERSONAL)
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), tmp_path / PERSONAL)
    found = get_peft_model_state_dict(loaded)
    assert found.keys() == kept.adapter.tensors().keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in kept.adapter.tensors().items())


def test_with_a_shared_half_both_are_trained(llama: Path, tmp_path: Path) -> None:
    worker = site(tmp_path, llama, rank=4)
    last, home = after(worker, asked(rate=1.0), Aggregation(merge="share_a"))
    assert worker.personalize(home).best
    pairs = read_adapter(tmp_path / PERSONAL).adapter.lora
    shared = last.combined.adapter.dense
    assert all(not torch.equal(pair.A, shared[f"{layer}.lora_A.weight"]) for layer, pair in pairs.items())


@pytest.mark.usefixtures("malformed_allowed")
def test_where_only_sites_read_the_global_adapter_they_train_on_from_it(llama: Path, tmp_path: Path) -> None:
    server, keys = kits()
    worker = site(tmp_path, llama)
    worker._read_keys = lambda: keys
    _, home = after(worker, asked(uplink=("ckks",)), Aggregation(merge="freeze_a", guard=()), keys=server)
    assert worker.personalize(home).best
    assert read_adapter(tmp_path / PERSONAL).adapter.lora


def test_under_privacy_nothing_is_charged_and_no_noise_is_added(llama: Path, tmp_path: Path) -> None:
    worker = site(tmp_path, llama)
    _, home = after(worker, asked(privacy={"noise_multiplier": 1.0}, training=QUICK))

    def charged(*_: Any) -> None:
        raise AssertionError("nothing leaves")

    worker.may_spend = charged
    worker.events.begin = charged  # type: ignore[method-assign]
    assert worker.personalize(home).tried
    assert not read_adapter(tmp_path / PERSONAL).plan.privacy.asked  # type: ignore[union-attr]


def test_a_site_may_decline_and_takes_no_more_steps_than_it_allows(llama: Path, tmp_path: Path) -> None:
    worker = site(tmp_path, llama, limits={"max_steps_per_round": 4})
    _, home = after(worker, asked(steps=60))
    assert sum(parts(4)) == 4 >= worker.personalize(home).steps
    for code, limits, plan in (
        ("personalize_off", {"personalize": False}, home.plan),
        ("nothing_to_personalize", {}, home.plan.model_copy(update={"personalize": RoundPlan().personalize})),
    ):
        worker.config = SiteConfig.read(worker.config.model_dump() | {"limits": limits}, "test")
        with refused(code, PolicyError):
            worker.personalize(replace(home, plan=plan))


def test_with_too_few_rows_to_choose_on_nothing_is_kept(llama: Path, tmp_path: Path) -> None:
    worker = site(tmp_path, llama, privacy={"min_metric_rows": 25})
    _, home = after(worker, asked(evaluation={"before": False, "after": False}))
    with refused("few_rows", PolicyError):
        worker.personalize(home)
    assert not (tmp_path / PERSONAL).exists()


@pytest.mark.parametrize("demands", [{"max_epsilon": 8.0}, {"required_protection": ["encryption"]}])
def test_a_floor_is_about_what_leaves(tmp_path: Path, demands: dict[str, Any]) -> None:
    config = tiny.site(tmp_path, tmp_path, privacy=demands)
    home = at_home(asked())
    assert {reason.code for reason in fit(home, config).refused} == {"unprotected"}
    assert not fit(home, config, sends=False).refused


@pytest.mark.parametrize("steps", [-1, 10**6 + 1, 0.5, "9", True, None])
def test_steps_are_a_number_within_bounds(steps: object) -> None:
    with refused("wrong_setting", ConfigError, "personalize.steps"):
        RoundPlan.read({"personalize": {"steps": steps}}, "test")


@pytest.mark.parametrize("rate", [0.0, -1.0, 10.5, float("nan"), float("inf"), "1"])
def test_the_rate_is_a_number_within_bounds(rate: object) -> None:
    with refused("wrong_setting", ConfigError, "personalize.rate"):
        RoundPlan.read({"personalize": {"steps": 1, "rate": rate}}, "test")


def plans() -> Iterator[TaskPlan]:
    yield asked()
    yield asked(
        privacy={"epsilon": 1.0},
        uplink=["int8"],
        negotiable=["local_steps", "rank"],
        rest="all",
        factors="B",
        counts=["examples"],
        label_statistics=["skew"],
        training=QUICK | {"restricted_softmax": 0.5, "proximal_mu": 1.0, "learning_rate": 10.0},
        personalize={"steps": 5, "rate": 10.0},
    )


@pytest.mark.parametrize("plan", plans())
def test_a_plan_for_home_is_one_that_can_be_sent_and_stays_as_it_is(plan: TaskPlan) -> None:
    home = at_home(plan)
    assert TaskPlan.read(home.model_dump(mode="json"), "test") == home == at_home(home)
    assert not (home.privacy.asked or home.uplink or home.counts or home.label_statistics)


@given(st.integers(1, 10**6))
def test_parts_are_the_steps(steps: int) -> None:
    found = parts(steps)
    assert sum(found) == steps
    assert len(found) == min(PARTS, steps)
    assert max(found) - min(found) <= 1


def test_a_federation_is_the_same_with_and_without(llama: Path, tmp_path: Path) -> None:
    rounds: list[SimulatedRound] = []
    for plan in (asked(), tiny.plan(training=QUICK)):
        rounds += federate({"site-1": site(tmp_path, llama)}, plan, Aggregation(), 1)
    one, two = (done.combined.adapter.tensors() for done in rounds)
    assert all(torch.equal(one[name], two[name]) for name in one | two)
