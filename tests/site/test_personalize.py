"""An adapter of a site's own: chosen on its own rows, kept there, and nothing that the site sends depends on it."""

from collections.abc import Iterator
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

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
from nvflare_fm.site.job_state import JobState
from nvflare_fm.site.model.own_adapter import OwnAdapter
from nvflare_fm.site.offer.policy import fit
from nvflare_fm.site.offer.site_config import SiteConfig
from nvflare_fm.site.training import fit as fitting
from nvflare_fm.site.worker import Worker
from tests.codes import refused
from tests.encryption import kits
from tests.site import tiny

QUICK: dict[str, Any] = {"local_steps": 2, "batch_size": 4, "learning_rate": 1e-2}

EXACT = Aggregation()


def asked(steps: int = 6, rate: float = 0.5, task: str = "causal_lm", **more: Any) -> TaskPlan:
    return tiny.plan(task, **({"training": QUICK, "personalize": {"steps": steps, "rate": rate}} | more))


def site(folder: Path, model: Path, task: str = "causal_lm", rank: int = 2, **more: Any) -> Worker:
    """Trains on other rows than it is measured on."""
    folder.mkdir(exist_ok=True)
    files = [str(tiny.jsonl(folder / f"{task}-{shift}.jsonl", tiny.rows(task, shift=shift))) for shift in (0, 11)]
    config = tiny.site(model, Path(files[0]), data={"notes": {"train": files[0], "validation": files[1]}}, **more)
    personal, overrides = OwnAdapter(folder, PERSONAL), SiteOverrides(rank=rank)
    return Worker("site-1", config, overrides, state=JobState(personal=personal))


def after(worker: Worker, plan: RoundPlan, how: Aggregation = EXACT, **more: Any) -> tuple[Any, RoundTask]:
    """The only round, and the task that comes after it."""
    (last,) = federate({"site-1": worker}, plan, how, 1, **more)
    settled = settle(plan, how, {"site-1": worker.overrides}).plan
    return last, RoundTask(settled, last.combined.adapter, last.combined.manifest, 1, 1)


Trained = dict[str, tuple[Worker, SimulatedRound, RoundTask]]


@pytest.fixture(scope="module")
def trained(llama: Path, bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """For each task a site after its round."""
    folder, models = tmp_path_factory.mktemp("site"), {"causal_lm": llama, "sequence_classification": bert}
    workers = {task: site(folder, model, task) for task, model in models.items()}
    return {task: (worker, *after(worker, asked(task=task))) for task, worker in workers.items()}


@pytest.fixture
def home(trained: Trained, tmp_path: Path) -> tuple[Worker, RoundTask]:
    """A site that writes text, which keeps what is its own in the test's folder."""
    worker, _, task = trained["causal_lm"]
    fresh = copy(worker)
    fresh.state = replace(worker.state, personal=OwnAdapter(tmp_path, PERSONAL))
    return fresh, task


def changed(task: RoundTask, **settings: Any) -> RoundTask:
    return replace(task, plan=TaskPlan.read(task.plan.model_dump() | settings, "test"))


@pytest.mark.parametrize("rate", [0.01, 10.0])
@pytest.mark.parametrize("task", ["causal_lm", "sequence_classification"])
def test_what_is_kept_is_never_worse_on_the_rows_held_out(
    trained: Trained, tmp_path: Path, task: str, rate: float
) -> None:
    worker, _, home = trained[task]
    worker.state.personal, home = OwnAdapter(tmp_path, PERSONAL), changed(home, personalize={"steps": 6, "rate": rate})
    done = worker.personalize(home)
    losses = [metrics["loss"] for metrics in done.tried]
    assert len(losses) == PARTS + 1
    assert losses[done.best] == min(losses) <= losses[0]
    assert done.steps == [0, 2, 4, 6][done.best]
    kept = read_adapter(tmp_path / PERSONAL)
    again = RoundTask(home.plan, kept.adapter, kept.manifest)
    assert worker.validate(again)["loss"] == pytest.approx(losses[done.best], rel=1e-4)
    assert worker.validate(home)["loss"] == losses[0]
    assert kept.plan is not None
    assert (kept.round, kept.plan.training.learning_rate) == (0, rate * QUICK["learning_rate"])


def test_what_diverges_leaves_the_global_adapter(home: tuple[Worker, RoundTask], tmp_path: Path) -> None:
    worker, task = home
    measure = worker._evaluate

    def spoilt(model: Any, *args: Any) -> dict[str, float]:
        found = measure(model, *args)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.fill_(float("nan"))
        return found

    worker._evaluate = spoilt  # type: ignore[method-assign]
    worker.state.personal.keep = keep = Mock(wraps=worker.state.personal.keep)  # type: ignore[method-assign]
    with refused("diverged", TrainingError):
        worker.personalize(task)
    assert keep.call_count == 1
    assert read_adapter(tmp_path / PERSONAL).adapter


def test_whoever_is_stopped_keeps_the_best_so_far(home: tuple[Worker, RoundTask], tmp_path: Path) -> None:
    worker, task = home
    measure, seen = worker._evaluate, []

    def stopped(*args: Any) -> dict[str, float]:
        seen.append(measure(*args))
        worker.should_stop = lambda: len(seen) == 2
        return seen[-1]

    worker._evaluate = stopped  # type: ignore[method-assign]
    with refused("stopped", TrainingError):
        worker.personalize(task)
    assert seen[1]["loss"] < seen[0]["loss"]
    kept = read_adapter(tmp_path / PERSONAL)
    worker._evaluate, worker.should_stop = measure, lambda: False  # type: ignore[method-assign]
    found = worker.validate(RoundTask(task.plan, kept.adapter, kept.manifest))
    assert found["loss"] == pytest.approx(seen[1]["loss"], rel=1e-4)


@pytest.mark.parametrize("merge", ["exact", "share_a"])
def test_nothing_that_a_site_sends_or_owes_depends_on_it(llama: Path, tmp_path: Path, merge: str) -> None:
    results = []
    for is_personal in (False, True):
        worker, told = site(tmp_path / str(is_personal), llama, rank=4), Mock()
        worker.state.own, worker.log = OwnAdapter(tmp_path / str(is_personal)), told
        plan, how = asked() if is_personal else tiny.plan(training=QUICK), Aggregation(merge=merge)
        last, home = after(worker, plan, how)
        told.reset_mock()
        if is_personal:
            worker.personalize(home)
        assert not told.called, "what is logged leaves a site"
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


def test_each_part_takes_up_where_the_one_before_stopped(
    home: tuple[Worker, RoundTask], monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, task = home
    train = Mock(wraps=fitting.train)
    monkeypatch.setattr(fitting, "train", train)
    worker.personalize(changed(task, personalize={"steps": 5, "rate": 0.5}))
    sent = [(call.args[3], call.args[4]) for call in train.call_args_list]
    assert [(part.round, part.total_rounds, part.plan.training.local_steps) for part, _ in sent] == [
        (0, 3, 1),
        (1, 3, 2),
        (2, 3, 2),
    ]
    whole = at_home(changed(task, personalize={"steps": 5, "rate": 0.5}).plan)
    rows = fitting.rows_of_round(replace(task, plan=whole), 24, worker.site)
    assert [row for _, chosen in sent for row in chosen] == rows
    assert [len(chosen) for _, chosen in sent] == [4, 8, 8]


def test_the_folder_is_one_that_peft_loads(home: tuple[Worker, RoundTask], llama: Path, tmp_path: Path) -> None:
    worker, task = home
    assert worker.personalize(changed(task, personalize={"steps": 6, "rate": 2.0})).best, "else it is the global one"
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
    shared, own = worker.state.global_adapter.read(), read_adapter(tmp_path / PERSONAL).adapter
    assert shared is not None
    for layer, pair in own.lora.items():
        assert not torch.equal(pair.B, shared.lora[layer].B)
        assert not torch.equal(pair.A, shared.lora[layer].A), "A is no longer that of the seed"


def test_under_privacy_nothing_is_charged_and_no_noise_is_added(home: tuple[Worker, RoundTask], tmp_path: Path) -> None:
    worker, task = home
    plain = worker.personalize(task).tried
    worker.may_spend, worker.state.events = Mock(side_effect=AssertionError), Mock()
    assert worker.personalize(changed(task, privacy={"noise_multiplier": 1.0})).tried == plain
    assert not worker.state.events.begin.called
    kept = read_adapter(tmp_path / PERSONAL).plan
    assert kept is not None
    assert not kept.privacy.asked


def test_a_site_may_decline_and_takes_no_more_steps_than_it_allows(home: tuple[Worker, RoundTask]) -> None:
    worker, task = home
    for code, limits, steps in (("personalize_off", {"personalize": False}, 6), ("nothing_to_personalize", {}, 0)):
        worker.config = SiteConfig.read(worker.config.model_dump() | {"limits": limits}, "test")
        with refused(code, PolicyError):
            worker.personalize(changed(task, personalize={"steps": steps}))
    config = SiteConfig.read(worker.config.model_dump() | {"limits": {"max_steps_per_round": 4}}, "test")
    decision = fit(at_home(changed(task, personalize={"steps": 60}).plan), config, sends=False)
    assert (decision.plan.training.local_steps, decision.lowered) == (4, ("local_steps to 4",))
    again = fit(at_home(decision.plan), config, sends=False)
    assert (again.plan, again.refused) == (decision.plan, ())


def test_with_too_few_rows_to_choose_on_nothing_is_kept(home: tuple[Worker, RoundTask], tmp_path: Path) -> None:
    worker, task = home
    privacy = tiny.OPEN | {"min_metric_rows": 25}
    worker.config = SiteConfig.read(worker.config.model_dump() | {"privacy": privacy}, "test")
    with refused("few_rows", PolicyError):
        worker.personalize(task)
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
    assert not home.privacy.asked
    assert not any([home.uplink, home.counts, home.label_statistics])


@given(st.integers(1, 10**6))
def test_parts_are_the_steps(steps: int) -> None:
    found = parts(steps)
    assert sum(found) == steps
    assert len(found) == min(PARTS, steps)
    assert max(found) - min(found) <= 1
