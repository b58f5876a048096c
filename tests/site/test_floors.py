"""No update and no metric of a few rows, no count that the site keeps, no order of rows that a job could choose."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nvflare_fm.adapter import RoundTask
from nvflare_fm.aggregation.cohort import Cohort
from nvflare_fm.aggregation.weigh import weigh
from nvflare_fm.config import Aggregation, TaskPlan
from nvflare_fm.errors import ConfigError, PolicyError
from nvflare_fm.job.settle import settle
from nvflare_fm.site.offer import secret
from nvflare_fm.site.offer.site_config import FILE_NAME, SiteConfig
from nvflare_fm.site.training.fit import order, rows_of_round, steps_between_logs
from nvflare_fm.site.worker import Worker
from tests.site import tiny

FLOORS = {"min_examples": 10, "min_update_rows": 10, "min_metric_rows": 10, "counts": []}  # those of a site by default


def worker(folder: Path, model: Path, rows: list[dict[str, Any]], validation: int | None = None, **more: Any) -> Worker:
    """A site with the floors of a site that says nothing; `validation`: it is measured on its first rows."""
    data = {"train": str(tiny.jsonl(folder / "train.jsonl", rows))}
    if validation is not None:
        data["validation"] = str(tiny.jsonl(folder / "validation.jsonl", rows[:validation]))
    privacy = FLOORS | more.pop("privacy", {})
    site = tiny.site(model, Path(data["train"]), data={"notes": data}, privacy=privacy)
    return Worker("site-1", site, **more)


def code(work: Any, plan: TaskPlan) -> str:
    with pytest.raises(PolicyError) as refused:
        work(RoundTask(plan))
    assert not any(count in refused.value.message for count in ("9", "11", "12", "24"))
    return refused.value.code


def identical(one: Any, other: Any) -> bool:
    ours, theirs = one.tensors(), other.tensors()
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


ROWS = tiny.rows("causal_lm", 24)
QUIET = {"before": False, "after": False}


def test_the_floors_of_these_tests_are_those_of_a_site_that_says_nothing():
    assert SiteConfig.read({"privacy": FLOORS}, "test") == SiteConfig()


def test_rows_that_are_there_twice_count_once(llama: Path, tmp_path: Path):
    plan = tiny.plan(evaluation=QUIET)
    few = worker(tmp_path, llama, ROWS[:9] * 20, validation=9, privacy={"min_update_rows": 1})
    assert code(few.train, plan) == code(few.validate, plan) == "few_rows"
    one_pass = tiny.plan(training={"local_steps": 5, "batch_size": 4}, evaluation=QUIET)
    assert worker(tmp_path, llama, ROWS[:10] * 2, validation=9).train(RoundTask(one_pass)).report.steps == 5


def test_an_update_of_few_different_rows_does_not_leave(llama: Path, tmp_path: Path):
    """A step of ten rows, of which half are the same."""
    once = tiny.plan(training={"local_steps": 1, "batch_size": 10}, evaluation=QUIET)
    many_of_one = ROWS[:11] + ROWS[:1] * 40
    assert code(worker(tmp_path, llama, many_of_one, validation=11).train, once) == "few_rows"
    epochs = tiny.plan(training={"local_steps": 0, "local_epochs": 0.01, "batch_size": 1}, evaluation=QUIET)
    assert code(worker(tmp_path, llama, ROWS, validation=11).train, epochs) == "few_rows"
    assert worker(tmp_path, llama, ROWS, validation=11).train(RoundTask(once)).report.steps == 1


def test_metrics_of_few_rows_are_withheld_and_training_goes_on_as_it_would(llama: Path, tmp_path: Path):
    logged: list[str] = []
    shy = worker(tmp_path, llama, ROWS, validation=9, log=lambda name, value, step: logged.append(name))
    update = shy.train(RoundTask(tiny.plan()))
    assert (update.report.before, update.report.after) == ({}, {})
    assert update.report.lowered == ("metrics to none: too few rows to measure on",)
    assert not [name for name in logged if "/" in name]
    assert code(shy.validate, tiny.plan()) == "few_rows"
    open_handed = worker(tmp_path, llama, ROWS, validation=9, privacy={"min_metric_rows": 1}).train(
        RoundTask(tiny.plan())
    )
    assert open_handed.report.before["loss"] > 0
    assert identical(update.adapter, open_handed.adapter)
    with pytest.raises(ConfigError) as refused:
        weigh(["loss"], Cohort([update]))
    assert refused.value.code == "no_loss"


def test_metrics_are_of_enough_rows_and_so_is_what_two_of_them_differ_by(llama: Path, tmp_path: Path):
    site = worker(tmp_path, llama, ROWS, validation=24)
    found = {
        asked: site.validate(RoundTask(tiny.plan(evaluation={"max_examples": asked})))["loss"]
        for asked in (0, 10, 13, 14, 19, 23, 24)
    }
    assert found[10] == found[13] == found[14] == found[19] == found[23] != found[24] == found[0]


def test_no_count_leaves_unless_the_site_lets_it(llama: Path, tmp_path: Path):
    rows = [*ROWS, {"prompt": "cannot be used"}]
    by_epochs = tiny.plan(training={"local_steps": 0, "batch_size": 4}, evaluation=QUIET)
    kept = worker(tmp_path, llama, rows, validation=12, log=lambda *_: pytest.fail("steps would be counted"))
    report = kept.train(RoundTask(by_epochs)).report
    assert (report.examples, report.tokens, report.steps, report.bad_rows) == (None, None, None, None)
    assert report.tokens_per_s is None
    told = worker(tmp_path, llama, rows, validation=12, privacy={"counts": ["examples", "steps", "bad_rows"]})
    report = told.train(RoundTask(by_epochs)).report
    assert (report.examples, report.tokens, report.steps, report.bad_rows) == (24, None, 6, 1)
    kept.log = None
    assert kept.train(RoundTask(tiny.plan(evaluation=QUIET))).report.steps == 3  # the plan's own number


def test_what_weights_need_is_asked_for_and_a_site_that_keeps_it_says_so(llama: Path, tmp_path: Path):
    plan = tiny.plan(evaluation=QUIET)
    for how in ({"weigh": ["examples"]}, {"normalize_steps": True}):
        assert settle(plan, Aggregation(**how)).plan.counts == (("examples",) if "weigh" in how else ())
    epochs = plan.model_copy(update={"training": plan.training.model_copy(update={"local_steps": 0})})
    assert settle(epochs, Aggregation(normalize_steps=True)).plan.counts == ("steps",)
    asks = settle(plan, Aggregation(weigh=["examples"])).plan
    assert code(worker(tmp_path, llama, ROWS, validation=12).train, asks) == "kept_here"
    told = worker(tmp_path, llama, ROWS, validation=12, privacy={"counts": "examples"}).train(RoundTask(asks)).report
    assert told.examples == 24


def test_the_loss_of_a_round_of_few_rows_stays_too(llama: Path, tmp_path: Path):
    site = worker(tmp_path, llama, ROWS, validation=12, privacy={"min_metric_rows": 13})
    assert math.isnan(site.train(RoundTask(tiny.plan(evaluation=QUIET))).report.loss)


contents = st.lists(st.integers(0, 6), min_size=1, max_size=12)


@given(rows=contents, steps=st.integers(1, 40), each=st.integers(1, 4), least=st.integers(1, 8), data=st.data())
def test_each_loss_that_is_logged_is_of_enough_different_rows(
    rows: list[int], steps: int, each: int, least: int, data: st.DataObject
):
    chosen = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=steps * each, max_size=steps * each))
    between = steps_between_logs(chosen, [str(row) for row in rows], steps, least)
    assert 0 <= between <= steps
    if between:
        logged = [chosen[i * each : (i + between) * each] for i in range(0, steps - between + 1, between)]
        assert all(len({rows[row] for row in window}) >= least for window in logged)
    if least == 1:
        assert between == max(1, steps // 10)


def test_losses_of_single_rows_are_not_logged(llama: Path, tmp_path: Path):
    steps: list[int] = []
    site = worker(
        tmp_path, llama, ROWS, 12, log=lambda name, _, step: steps.append(step) if name == "train_loss" else 0
    )
    plan = tiny.plan(training={"local_steps": 20, "batch_size": 1}, evaluation=QUIET)
    site.train(RoundTask(plan))
    assert steps == [16]  # 2, 4, 8, 16: the first number of steps that holds ten different rows


# --- the order of rows

KEYS = st.binary(min_size=32, max_size=32)
PLANS = st.builds(
    lambda seed, rate, steps, batch: tiny.plan(
        seed=seed, training={"learning_rate": rate, "local_steps": steps, "batch_size": batch}
    ),
    st.integers(0, 3),
    st.sampled_from([1e-3, 2e-3]),
    st.integers(1, 3),
    st.integers(1, 4),
)


@given(key=KEYS, plan=PLANS, examples=st.integers(1, 40), rounds=st.integers(1, 5))
def test_with_a_secret_too_each_pass_has_every_row_once(key: bytes, plan: TaskPlan, examples: int, rounds: int):
    per_round = plan.training.local_steps * plan.training.batch_size
    seen = [row for n in range(rounds) for row in rows_of_round(RoundTask(plan, round=n), examples, "site", key)]
    assert len(seen) == rounds * per_round
    passes = [seen[i : i + examples] for i in range(0, len(seen) - examples + 1, examples)]
    assert all(sorted(each) == list(range(examples)) for each in passes)


@given(keys=st.lists(KEYS, min_size=2, max_size=2, unique=True), plans=st.lists(PLANS, min_size=2, max_size=2))
def test_who_knows_neither_secret_nor_lays_out_plans_can_choose_a_row(keys: list[bytes], plans: list[TaskPlan]):
    """Another secret, and with a secret any other plan, has another order; the same of both the same."""

    def first(plan: TaskPlan, key: bytes) -> list[int]:
        whole = plan.model_copy(update={"training": plan.training.model_copy(update={"local_epochs": 1.0})})
        seed = f"{whole.model_dump_json(exclude={'factors'})}/site" if key else f"{plan.seed}/site"
        assert rows_of_round(RoundTask(whole), 64, "site", key) == order(64, 0, _count(whole), seed, key)
        return order(64, 0, 64, seed, key)

    one, other = plans
    assert first(one, keys[0]) == first(one, keys[0])
    assert first(one, keys[0]) != first(one, keys[1]) != first(one, b"")
    if one != other:
        assert first(one, keys[0]) != first(other, keys[0])
    if one.seed == other.seed:
        assert first(one, b"") == first(other, b"")


def _count(plan: TaskPlan) -> int:
    return plan.training.local_steps * plan.training.batch_size


def test_the_order_of_a_simulation_is_what_it_always_was():
    plan = tiny.plan(seed=7)
    assert rows_of_round(RoundTask(plan, round=1), 24, "site-1") == order(24, 12, 12, "7/site-1")
    assert order(7, 0, 7, "7/site-1") == [3, 0, 2, 5, 4, 6, 1]


def test_sites_with_secrets_train_in_orders_of_their_own_from_one_start(llama: Path, tmp_path: Path):
    plan = tiny.plan(evaluation=QUIET)
    sites = [worker(tmp_path, llama, ROWS, 12, secret=key) for key in (b"", b"a" * 32, b"b" * 32, b"a" * 32)]
    simulated, a, b, again = (site.train(RoundTask(plan)).adapter for site in sites)
    assert identical(a, again)
    assert not any(identical(x, y) for x, y in ((simulated, a), (simulated, b), (a, b)))
    still = tiny.plan(evaluation=QUIET, training={"local_steps": 3, "batch_size": 4, "learning_rate": 1e-12})
    first, second = (site.train(RoundTask(still)).adapter for site in sites[1:3])
    for layer in first.lora:
        torch.testing.assert_close(first.lora[layer].A, second.lora[layer].A, atol=1e-9, rtol=0)


def test_a_secret_is_made_once_and_only_its_owner_may_read_it(tmp_path: Path):
    file = tmp_path / FILE_NAME
    with pytest.raises(ConfigError) as missing:
        secret.read(file)
    assert missing.value.code == "no_secret"
    made = secret.make(file)
    assert made == tmp_path / secret.NAME
    assert made.stat().st_mode & 0o777 == 0o600
    found = secret.read(file)
    assert len(found) == 64
    assert secret.make(file) is None
    assert secret.read(file) == found
    made.chmod(0o640)
    with pytest.raises(ConfigError) as open_to_others:
        secret.read(file)
    made.chmod(0o600)
    made.write_bytes(found[:5])
    with pytest.raises(ConfigError) as cut:
        secret.read(file)
    assert {open_to_others.value.code, cut.value.code} == {"no_secret"}
    assert str(tmp_path) not in cut.value.message
    assert found[:5].decode() not in str(cut.value)


def test_a_simulated_site_has_no_secret_and_two_sites_have_two(tmp_path: Path):
    assert secret.make(tmp_path / f"site-1.{FILE_NAME}") is None
    assert secret.read(tmp_path / f"site-1.{FILE_NAME}") == b""
    keys = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        secret.make(tmp_path / name / FILE_NAME)
        keys.append(secret.read(tmp_path / name / FILE_NAME))
    assert keys[0] != keys[1]
