"""DP-SGD at a site: each row's gradient is its own, each record's is clipped, noise covers the sum, chance is the
system's, and the job costs no more than it said.
"""

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nvflare_fm.adapter import Adapter, RoundTask
from nvflare_fm.config import TaskPlan
from nvflare_fm.errors import ConfigError, DataError, ModelError, PolicyError, TrainingError
from nvflare_fm.privacy import chance
from nvflare_fm.privacy.accountant import epsilon
from nvflare_fm.privacy.events import Event
from nvflare_fm.privacy.protection import Protection
from nvflare_fm.site.job_state import JobState
from nvflare_fm.site.peft_methods import attachment_of
from nvflare_fm.site.training import dp, fit, logits
from nvflare_fm.site.training.job_events import FILE, FOLDER, JobEvents
from nvflare_fm.site.training.per_sample import PerSample
from nvflare_fm.site.worker import Worker
from tests.site import tiny

LORA = {"method": "lora", "rank": 4, "lora_alpha": 8}
PRIVATE = {"noise_multiplier": 1.0, "delta": 1e-3}
UNMEASURED = {"before": False, "after": False}


def private_plan(task: str = "causal_lm", privacy: dict[str, Any] | None = None, **more: Any) -> TaskPlan:
    return tiny.plan(task, privacy=PRIVATE | (privacy or {}), **{"evaluation": UNMEASURED} | more)


# each row's gradient


def attached(worker: Worker, plan: TaskPlan, start: Adapter | None = None) -> tuple[Any, Any, list[dict[str, Any]]]:
    """The model as it trains, with an adapter that is nowhere zero, its base, and rows of different lengths."""
    job = worker._job(RoundTask(plan), trains=False)
    model = attachment_of(plan.peft).attach(job.base, start or Adapter(), plan)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or ".local." in name:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model.train(), job.base, [job.data.train[row] for row in (0, 1, 12, 3)]


def one_by_one(model: Any, base: Any, plan: TaskPlan, rows: list[dict[str, Any]]) -> list[list[Tensor]]:
    """Of each row, autograd's gradient of its mean loss: the reference."""
    trained, found = [p for p in model.parameters() if p.requires_grad], []
    for row in rows:
        batch = base.task.batch([row], pad_id=base.tokenizer.pad_token_id)
        with base.autocast():
            loss = base.task.loss(model, base, batch, plan) / base.task.items(batch)
        found.append([torch.zeros_like(p) if g is None else g.float() for p, g in zip(
            trained, torch.autograd.grad(loss, trained, allow_unused=True), strict=True)])  # fmt: skip
    return found


def check_rows(model: Any, base: Any, plan: TaskPlan, rows: list[dict[str, Any]], hooked: bool, close: float) -> None:
    expected = one_by_one(model, base, plan, rows)
    per_sample = PerSample(model, base, plan, rows[:2])
    assert (per_sample.hooks is not None) == hooked
    found = per_sample(rows)
    per_sample.close()
    assert not [p for p in model.parameters() if hasattr(p, "grad_sample") or p.grad is not None]
    norms = [math.sqrt(sum(float(g.square().sum()) for g in row)) for row in expected]
    assert min(norms) > 1e-4
    assert max(norms) > 1.01 * min(norms)  # rows that are alike could be mistaken for one another
    for place, row in enumerate(expected):
        off = math.sqrt(sum(float((a[place] - b).square().sum()) for a, b in zip(found, row, strict=True)))
        assert off < close * norms[place], place


@pytest.mark.parametrize("quantization", ["fp32", "bf16", "nf4", "int8"])
@pytest.mark.parametrize(
    ("peft", "hooked"),
    [
        (LORA, True),
        (LORA | {"use_rslora": True, "target_modules": ["q_proj", "down_proj"]}, True),
        ({"method": "prefix_tuning", "num_virtual_tokens": 3}, True),
        (LORA | {"use_dora": True}, False),
        ({"method": "ia3"}, False),
        ({"method": "prompt_tuning", "num_virtual_tokens": 3}, False),
        ({"method": "vera", "r": 8}, False),
    ],
    ids=lambda value: value["method"] + "+" * len(value) if isinstance(value, dict) else "",
)
def test_each_row_has_the_gradient_it_has_alone(
    llama: Path, tmp_path: Path, peft: dict[str, Any], hooked: bool, quantization: str
) -> None:
    if peft.get("use_dora") and quantization == "int8":
        pytest.skip("a CPU has no DoRA on int8")
    plan = private_plan(peft=peft, quantization=quantization)
    worker = tiny.worker(tmp_path, llama, "causal_lm")
    with worker._job(RoundTask(plan), trains=False).base.lent():
        model, base, rows = attached(worker, plan)
        rough = base.compute_dtype == torch.bfloat16
        check_rows(model, base, plan, rows, hooked and quantization != "int8", 0.03 if rough else 1e-4)


def test_int8_is_taken_a_row_at_a_time_even_where_hooks_seem_to_agree(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two rows may agree by luck, or by a tolerance for 16 bits: other rows of a batch would still change a row's."""
    monkeypatch.setattr(PerSample, "_agrees", lambda *_: True)
    plan, worker = private_plan(peft=LORA, quantization="int8"), tiny.worker(tmp_path, llama, "causal_lm")
    with worker._job(RoundTask(plan), trains=False).base.lent():
        model, base, rows = attached(worker, plan)
        check_rows(model, base, plan, rows, False, 1e-4)


@pytest.mark.parametrize("task", ["sequence_classification", "token_classification", "multi_label", "regression"])
@pytest.mark.parametrize("kind", ["bert", "llama"])
@pytest.mark.parametrize("peft", [LORA, {"method": "head"}], ids=lambda peft: peft["method"])
def test_each_row_has_its_own_gradient_in_every_task_with_its_head(
    request: pytest.FixtureRequest, tmp_path: Path, task: str, kind: str, peft: dict[str, Any]
) -> None:
    plan, worker = private_plan(task, peft=peft), tiny.worker(tmp_path, request.getfixturevalue(kind), task)
    with worker._job(RoundTask(plan), trains=False).base.lent():
        model, base, rows = attached(worker, plan)
        assert any("modules_to_save" in name for name, p in model.named_parameters() if p.requires_grad)
        check_rows(model, base, plan, rows, True, 1e-4)


@pytest.mark.parametrize("task", ["causal_lm", "preference"])
@pytest.mark.parametrize("positions", [7, 10**6], ids=["a few logits at a time", "all logits of a batch"])
def test_a_texts_gradient_is_its_own_however_few_logits_are_made_at_a_time(
    llama: Path, tmp_path: Path, task: str, positions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logits, "positions_at_once", lambda words: positions)
    plan, worker = private_plan(task, peft=LORA), tiny.worker(tmp_path, llama, task)
    with worker._job(RoundTask(plan), trains=False).base.lent():
        model, base, rows = attached(worker, plan)
        check_rows(model, base, plan, rows, True, 1e-4)


@pytest.mark.parametrize("factors", ["AB", "A", "B"])
@pytest.mark.parametrize("rest", ["tail", "all"])
def test_frozen_directions_and_factors_change_no_rows_gradient(
    llama: Path, tmp_path: Path, factors: str, rest: str
) -> None:
    plan = private_plan(peft=LORA, factors=factors, rest=rest)
    worker = tiny.worker(tmp_path, llama, "causal_lm")
    whole = worker.train(RoundTask(tiny.plan(peft=LORA | {"rank": 9}))).adapter
    with worker._job(RoundTask(plan), trains=False).base.lent():
        model, base, rows = attached(worker, plan, whole)
        assert any(".rest." in name for name, _ in model.named_parameters())
        check_rows(model, base, plan, rows, True, 1e-4)


def test_a_head_that_sees_single_positions_is_trained_a_row_at_a_time(llama: Path, tmp_path: Path) -> None:
    """Opacus would take the learned positions of all rows for one row."""
    for more in ({"target_modules": ["lm_head", "q_proj"]}, {"modules_to_save": ["lm_head"]}):
        plan, file = private_plan(peft=LORA | more), tiny.jsonl(tmp_path / "a.jsonl", tiny.rows("causal_lm"))
        limits = {"train_embeddings": True, "trainable_modules": ["lm_head"]}
        worker = Worker("site-1", tiny.site(llama, file, limits=limits))
        with worker._job(RoundTask(plan), trains=False).base.lent():
            model, base, rows = attached(worker, plan)
            check_rows(model, base, plan, rows, False, 1e-4)


# records


@st.composite
def tables(draw: Any) -> tuple[list[Tensor], list[list[int]]]:
    """Gradients of some rows for two parameters, and whose rows they are."""
    sizes = draw(st.lists(st.integers(1, 5), max_size=6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    rows, scale = sum(sizes), draw(st.sampled_from([0.01, 1.0, 100.0]))
    table = [scale * torch.randn(rows, *shape, generator=generator) for shape in ((2, 3), (1,))]
    numbers = torch.randperm(rows, generator=generator).tolist()
    return table, [[numbers.pop() for _ in range(size)] for size in sizes]


def summed(table: list[Tensor], records: list[list[int]], batch_size: int, norm: float) -> Tensor:
    taken: list[int] = []

    def take(rows: list[int]) -> list[Tensor]:
        assert 0 < len(rows) <= batch_size
        taken.extend(rows)
        return [each[rows] for each in table]

    found = dp.clipped_sum(take, records, batch_size, norm, [torch.zeros(each.shape[1:]) for each in table])
    assert taken == [row for record in records for row in record]
    return torch.cat([each.flatten() for each in found])


@given(table=tables(), batch_size=st.integers(1, 9), norm=st.sampled_from([0.1, 1.0, 1e3]))
def test_the_sum_is_that_of_each_records_mean_clipped(table: Any, batch_size: int, norm: float) -> None:
    gradients, records = table
    expected = torch.zeros(7)
    for record in records:
        mean = torch.cat([each[record].mean(0).flatten() for each in gradients])
        expected += mean * min(1.0, norm / float(mean.norm()))
    torch.testing.assert_close(summed(gradients, records, batch_size, norm), expected, rtol=1e-3, atol=1e-4 * norm)


@given(table=tables(), batch_size=st.integers(1, 9), place=st.integers(0, 5))
def test_no_record_moves_the_sum_by_more_than_the_clipping_norm(table: Any, batch_size: int, place: int) -> None:
    gradients, records = table
    without = [record for i, record in enumerate(records) if i != place]
    moved = summed(gradients, records, batch_size, 0.5) - summed(gradients, without, batch_size, 0.5)
    assert float(moved.norm()) <= 0.5 + 1e-5


@given(table=tables(), batch_size=st.integers(1, 4), what=st.sampled_from([math.nan, math.inf, -math.inf, 3e38]))
def test_a_record_whose_gradient_is_not_finite_counts_as_none(table: Any, batch_size: int, what: float) -> None:
    gradients, records = table
    if not records:
        return
    for row in records[0]:
        gradients[0][row, 1, 2] = what
    found = summed(gradients, records, batch_size, 1.0)
    assert bool(found.isfinite().all())
    torch.testing.assert_close(found, summed(gradients, records[1:], batch_size, 1.0))


def rows_with(patients: list[Any], task: str = "causal_lm") -> list[dict[str, Any]]:
    return [row | {"who": who} for row, who in zip(tiny.rows(task, len(patients)), patients, strict=True)]


def site_of(folder: Path, model: Path, lines: list[dict[str, Any]], **source: Any) -> Worker:
    file = str(tiny.jsonl(folder / "t.jsonl", lines))
    return Worker("site-1", tiny.site(model, Path(file), data={"notes": {"train": file, "validation": file} | source}))


def test_the_rows_of_one_patient_are_one_record(llama: Path, tmp_path: Path) -> None:
    patients = ["a", " a", 7, "7", "b", *(f"p{i}" for i in range(5)), "a"]
    worker = site_of(tmp_path, llama, rows_with(patients), columns={"patient_id": "who"})
    found = worker.rows(private_plan(privacy={"unit": "patient_id"}))
    assert found.train_units == (0, 0, 1, 1, 2, 3, 4, 5, 6, 7, 0)
    assert set(found.train.column_names) == {"input_ids", "labels", "bytes"}  # it never reaches the model
    assert worker.rows(private_plan()).train_units == tuple(range(11))
    task = RoundTask(private_plan(privacy={"unit": "patient_id"}))
    private = dp.settle(task, found.train_units, 1)
    assert private.records[0] == (0, 1, 10)
    assert private.rate == pytest.approx(4 / 8)
    assert worker.train(task).protection == private.protection


def test_a_column_that_is_not_there_is_refused_by_the_plans_name(llama: Path, tmp_path: Path) -> None:
    worker = site_of(tmp_path, llama, rows_with(["secret"] * 6))
    with pytest.raises(DataError) as refused:
        worker.train(RoundTask(private_plan(privacy={"unit": "patient_id"})))
    assert refused.value.code == "no_unit"
    assert "'patient_id'" in refused.value.message
    assert "secret" not in str(refused.value)
    assert worker.train(RoundTask(tiny.plan(privacy={"unit": "patient_id"}))).protection is None  # nothing is asked


@pytest.mark.parametrize("value", [None, "", "  ", True, ["a"], 1.5])
def test_a_row_that_is_nobodys_cannot_be_used(llama: Path, tmp_path: Path, value: Any) -> None:
    worker = site_of(tmp_path, llama, rows_with(["a", "b", value]), max_bad_rows=0.5)
    found = worker.rows(private_plan(privacy={"unit": "who"}))
    assert (len(found.train), found.bad_rows, found.train_units) == (2, 1, (0, 1))


def test_the_answers_of_one_conversation_are_one_record(llama: Path, tmp_path: Path) -> None:
    said = [{"role": role, "content": f"say {i}"} for i in range(3) for role in ("user", "assistant")]
    train = tiny.jsonl(tmp_path / "t.jsonl", [{"messages": said}, *tiny.rows("causal_lm", 3)])
    worker = Worker("site-1", tiny.site(llama, train, data={"notes": {"train": str(train), "validation": str(train)}}))
    found = worker.rows(private_plan())
    assert found.train_units == found.train_rows


# noise and chance


def test_noise_is_standard_normal() -> None:
    """Moments and the share beyond some bounds, of 400,000 numbers: each within five deviations of its estimate."""
    count = 400_001
    drawn = chance.normal(count)
    assert drawn.shape == (count,)
    for power, moment, spread in ((1, 0.0, 1.0), (2, 1.0, 2.0), (3, 0.0, 15.0), (4, 3.0, 96.0)):
        assert float((drawn**power).mean()) == pytest.approx(moment, abs=5 * math.sqrt(spread / count)), power
    for bound in (0.5, 1.0, 2.0, 3.0, 4.0):
        share = math.erfc(bound / math.sqrt(2))
        assert float((drawn.abs() > bound).double().mean()) == pytest.approx(share, abs=5 * math.sqrt(share / count))
    assert abs(float((drawn[:-1] * drawn[1:]).mean())) < 5 / math.sqrt(count)
    half = count // 2
    assert abs(float((drawn[:half] * drawn[half : 2 * half]).mean())) < 5 / math.sqrt(half)


def test_the_mean_has_the_noise_that_was_asked_for() -> None:
    private = settled(private_plan(privacy={"noise_multiplier": 3.0, "max_grad_norm": 0.7}), 100)
    off = dp.noised_mean(torch.full((200_000,), 8.0), private)
    assert off.dtype == torch.float32
    assert float(off.mean()) == pytest.approx(8.0 / 4, abs=0.01)
    assert float(off.std()) == pytest.approx(3.0 * 0.7 / 4, rel=0.01)  # a batch of 4


def settled(plan: TaskPlan, records: int, rounds: int = 1, world: int = 1) -> dp.Private:
    return dp.settle(RoundTask(plan, total_rounds=rounds), tuple(range(records)), world)


def test_an_update_holds_the_noise_of_all_its_steps(llama: Path, tmp_path: Path) -> None:
    """With SGD the adapter moves by the sum of the steps' noise, so much that gradients do not count beside it."""
    privacy = {"noise_multiplier": 50.0, "max_grad_norm": 0.01}
    training = {"local_steps": 9, "batch_size": 5, "optim": "sgd", "learning_rate": 1e-3}
    first, second = (
        tiny.worker(tmp_path, llama, "causal_lm").train(RoundTask(private_plan(privacy=privacy, training=training)))
        for _ in range(2)
    )
    moved = torch.cat([pair.B.flatten() for pair in first.adapter.lora.values()])  # it began at zero
    assert float(moved.std()) == pytest.approx(1e-3 * 3 * 50 * 0.01 / 5, rel=0.05)
    again = torch.cat([pair.B.flatten() for pair in second.adapter.lora.values()])
    assert abs(float(torch.corrcoef(torch.stack([moved, again]))[0, 1])) < 0.1  # one seed, and noise of its own


def test_without_noise_and_clipping_a_step_on_all_rows_is_a_plain_one(llama: Path, tmp_path: Path) -> None:
    """Each text weighs the same in one, each token in the other; so of texts of one token."""
    rows = [{"prompt": f"how is patient {i} ", "completion": "well"} for i in range(6)]
    training = {"local_steps": 2, "batch_size": 6, "optim": "sgd", "learning_rate": 0.5}
    privacy = {"noise_multiplier": 1e-6, "max_grad_norm": 1e3}
    worker = site_of(tmp_path, llama, rows)
    found = worker.train(RoundTask(private_plan(privacy=privacy, training=training)))
    plain = worker.train(RoundTask(tiny.plan(training=training | {"max_grad_norm": 1e9}, evaluation=UNMEASURED)))
    pieces = worker.train(RoundTask(private_plan(
        privacy=privacy, training=training | {"batch_size": 2, "gradient_accumulation_steps": 3})))  # fmt: skip
    assert plain.protection is None
    for name, tensor in plain.adapter.tensors().items():
        torch.testing.assert_close(found.adapter.tensors()[name], tensor, atol=2e-3, rtol=1e-2)
        torch.testing.assert_close(found.adapter.tensors()[name], pieces.adapter.tensors()[name], atol=2e-3, rtol=1e-2)
    assert found.report.loss == pytest.approx(plain.report.loss, rel=1e-3)


def test_records_are_drawn_independently_and_equally_often() -> None:
    records, rate, steps = 40, 0.15, 3000
    plan = private_plan(training={"local_steps": 3, "batch_size": 6})
    private = settled(plan, records)
    assert private.rate == rate
    drawn = torch.zeros(steps, records)
    for step in range(steps):
        for (row,) in dp.draw(private):
            drawn[step, row] += 1
    assert float(drawn.max()) == 1
    spread = math.sqrt(rate * (1 - rate) / steps)
    assert float((drawn.mean(0) - rate).abs().max()) < 5 * spread
    sizes = drawn.sum(1)
    assert float(sizes.var()) == pytest.approx(records * rate * (1 - rate), rel=0.15)  # of shuffled batches: 0
    covariance = torch.cov(drawn.T) - torch.diag(drawn.var(0))
    assert float(covariance.abs().max()) < 6 * rate * (1 - rate) / math.sqrt(steps)
    follows = ((drawn[1:] - rate) * (drawn[:-1] - rate)).mean(0)  # from step to step
    assert float(follows.abs().max()) < 5 * rate * (1 - rate) / math.sqrt(steps)


@given(records=st.integers(1, 30), batch_size=st.integers(1, 40), processes=st.integers(1, 3))
def test_a_step_expects_a_batch_or_all_records(records: int, batch_size: int, processes: int) -> None:
    training = {"local_steps": 1, "batch_size": batch_size, "gradient_accumulation_steps": 2}
    private = settled(private_plan(training=training), records, world=processes)
    assert private.expected == min(records, 2 * batch_size * processes)
    assert private.rate * records == pytest.approx(private.expected)
    if private.rate == 1:
        assert len(dp.draw(private)) == records


def test_a_step_that_draws_no_record_is_noise_alone(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chance, "happens", lambda count, probability: torch.zeros(0, dtype=torch.long))
    training = {"local_steps": 4, "batch_size": 2, "optim": "sgd", "learning_rate": 1e-3}
    update = tiny.worker(tmp_path, llama, "causal_lm").train(RoundTask(private_plan(training=training)))
    moved = torch.cat([pair.B.flatten() for pair in update.adapter.lora.values()])
    assert float(moved.std()) == pytest.approx(1e-3 * 2 * 1.0 / 2, rel=0.05)
    assert update.report.tokens == 0
    assert update.report.steps == 4


@pytest.mark.parametrize("task", ["causal_lm", "sequence_classification", "preference"])
def test_a_private_site_learns_where_noise_is_small(llama: Path, tmp_path: Path, task: str) -> None:
    """So the adapter that is trained is the one that answers, and that travels."""
    plan = private_plan(
        task, privacy={"noise_multiplier": 0.3}, evaluation={"before": True, "after": True},
        training={"local_steps": 8, "batch_size": 12, "learning_rate": 1e-2},
    )  # fmt: skip
    update = tiny.worker(tmp_path, llama, task).train(RoundTask(plan))
    assert update.report.after["loss"] < update.report.before["loss"]
    assert all(float(pair.B.abs().max()) > 1e-3 for pair in update.adapter.lora.values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_16_bits_gradients_are_noised_as_they_are_in_32(
    llama: Path, tmp_path: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    class AsOnGPU(dp.PrivateTrainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.accelerator.native_amp = True

    from nvflare_fm.site import worker as site
    from nvflare_fm.site.model import base_model

    monkeypatch.setattr(base_model, "_loaded", {})
    monkeypatch.setattr(base_model, "compute_dtype", lambda *_: dtype)
    monkeypatch.setattr(site, "PrivateTrainer", AsOnGPU)
    privacy = {"noise_multiplier": 50.0, "max_grad_norm": 0.01}
    training = {"local_steps": 4, "batch_size": 5, "optim": "sgd", "learning_rate": 1e-3}
    update = tiny.worker(tmp_path, llama, "causal_lm").train(
        RoundTask(private_plan(privacy=privacy, training=training, quantization="nf4"))
    )
    moved = torch.cat([pair.B.flatten() for pair in update.adapter.lora.values()])
    assert float(moved.std()) == pytest.approx(1e-3 * 2 * 50 * 0.01 / 5, rel=0.05)
    assert 0 < update.report.loss < 10


def test_training_that_leaves_the_range_of_numbers_is_told(llama: Path, tmp_path: Path) -> None:
    training = {"local_steps": 25, "batch_size": 2, "optim": "sgd", "learning_rate": 10.0, "weight_decay": 10.0}
    with pytest.raises(TrainingError) as told:
        tiny.worker(tmp_path, llama, "causal_lm").train(RoundTask(private_plan(training=training)))
    assert told.value.code == "diverged"


# what a job may cost


def test_the_noise_follows_from_epsilon_and_all_steps_of_the_job() -> None:
    plan = private_plan(privacy={"noise_multiplier": None, "epsilon": 3.0}, training={"local_steps": 4})
    one, many = settled(plan, 8), settled(plan, 8, rounds=5)  # all in each step: the accountants are quick then
    assert many.noise_multiplier > one.noise_multiplier
    event = many.protection.events[0]
    assert event == Event(many.noise_multiplier, 1.0, 4)
    whole = epsilon([Event(event.noise_multiplier, event.sample_rate, 20)], 1e-3)
    assert 0.99 * 3 < whole <= 3
    given = settled(private_plan(training={"batch_size": 8}), 200).protection
    assert given.events == (Event(1.0, 8 / 200, 20),)


def test_delta_must_be_below_one_in_the_number_of_records() -> None:
    with pytest.raises(ConfigError) as refused:
        settled(private_plan(privacy={"delta": 0.01}), 100)
    assert refused.value.code == "delta_too_large"
    assert settled(private_plan(privacy={"delta": 0.01}), 99).rate


def test_no_rounding_is_carried_over_from_an_update_that_may_never_have_left(llama: Path, tmp_path: Path) -> None:
    for privacy, carries in ((PRIVATE, False), ({"noise_multiplier": None}, True)):
        job = tmp_path / str(carries)
        worker = tiny.worker(tmp_path, llama, "causal_lm", state=JobState.at(job))
        plan = private_plan(privacy=privacy, peft={"method": "ia3"}, uplink=["int8"])
        worker.packed(worker.train(RoundTask(plan)), plan)
        assert bool(JobState.at(job).kept.read()) == carries  # as the next trainer finds it


def test_more_rounds_than_the_job_said_are_refused_before_they_begin(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = JobEvents(tmp_path / "job")
    plan = private_plan(
        privacy={"noise_multiplier": None, "epsilon": 2.0}, training={"local_steps": 1, "batch_size": 24}
    )
    worker = tiny.worker(tmp_path, llama, "causal_lm", state=JobState(events=events))
    for number in range(2):
        protection = worker.train(RoundTask(plan, round=number, total_rounds=2)).protection
    assert protection is not None
    assert events.read() == (replace(protection.events[0], steps=2),)
    monkeypatch.setattr(fit, "train", lambda *_, **__: pytest.fail("trained"))
    again = tiny.worker(tmp_path, llama, "causal_lm", state=JobState.at(tmp_path / "job"))  # another trainer
    for rounds in (2, 3, 4):
        with pytest.raises(PolicyError) as refused:
            again.train(RoundTask(plan, round=2, total_rounds=rounds))
        assert refused.value.code == "beyond_epsilon"


def test_who_must_know_is_asked_before_the_round_is_noted(llama: Path, tmp_path: Path) -> None:
    asked: list[Protection] = []

    def refuse(protection: Protection) -> None:
        asked.append(protection)
        raise PolicyError("no", code="too_much")

    events = JobEvents()
    worker = tiny.worker(tmp_path, llama, "causal_lm", state=JobState(events=events), may_spend=refuse)
    with pytest.raises(PolicyError) as refused:
        worker.train(RoundTask(private_plan(), total_rounds=7))
    assert refused.value.code == "too_much"
    assert events.read() == ()
    assert asked == [Protection("dp_sgd", "notes", "row", 1e-3, (Event(1.0, 4 / 24, 3),))]
    worker.train(RoundTask(tiny.plan()))
    assert len(asked) == 1  # of a round without privacy nothing is asked


@given(content=st.one_of(st.binary(max_size=60), st.sampled_from([
    b'[{"noise_multiplier": 0, "sample_rate": 1, "steps": 1}]', b'[{"noise_multiplier": 1.0, "sample_rate": 2.0}]',
    b'[{"noise_multiplier": NaN, "sample_rate": 0.5}]', b"[" * 10_000, b"null", b"{}", b"[[]]",
])))  # fmt: skip
def test_a_damaged_record_stops_the_job(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    folder = tmp_path_factory.mktemp("job")
    (folder / FOLDER).mkdir()
    (folder / FOLDER / FILE).write_bytes(content)
    events = JobEvents(folder)
    if content.strip() == b"[]":
        assert events.read() == ()
        return
    for _ in range(2):
        with pytest.raises(ModelError) as told:
            events.begin(Protection("dp_sgd", "notes", "row", 1e-3, (Event(1.0, 0.1),)), None)
        assert told.value.code == "events_damaged"


def test_a_round_must_be_likely_to_see_enough_rows(llama: Path, tmp_path: Path) -> None:
    file = tiny.jsonl(tmp_path / "a.jsonl", tiny.rows("causal_lm"))
    source = {"notes": {"train": str(file), "validation": str(file)}}

    def ask(least: int) -> None:
        worker = Worker("site-1", tiny.site(llama, file, data=source, privacy={"min_update_rows": least}))
        worker._job(RoundTask(private_plan()), trains=True)

    expected = 24 * (1 - (1 - 4 / 24) ** 3)  # 10.1, whatever is drawn
    ask(1)
    ask(int(expected))
    with pytest.raises(PolicyError) as refused:
        ask(int(expected) + 1)
    assert refused.value.code == "few_rows"


@pytest.mark.parametrize(
    ("code", "more"),
    [
        ("private_steps", {"training": {"local_steps": 0}}),
        ("private_checkpointing", {"training": {"gradient_checkpointing": True}}),
        ("private_max_grad_norm", {"training": {"max_grad_norm": 2.0}}),
        ("private_classes", {"training": {"logit_adjustment": 1.0}}),
        ("private_counts", {"counts": ["examples"]}),
    ],
)
def test_a_site_refuses_what_would_undo_privacy_whatever_the_server_let_pass(
    bert: Path, tmp_path: Path, code: str, more: dict[str, Any]
) -> None:
    task = "sequence_classification"
    worker = tiny.worker(tmp_path, bert, task)
    with pytest.raises(ConfigError) as refused:
        worker.train(RoundTask(private_plan(task, **more)))
    assert refused.value.code == code
    worker.validate(RoundTask(private_plan(task, **more)))  # nothing is trained


def test_single_steps_are_not_told(llama: Path, tmp_path: Path) -> None:
    told: Counter[str] = Counter()
    worker = tiny.worker(tmp_path, llama, "causal_lm", log=lambda name, *_: told.update([name]))
    worker.train(RoundTask(private_plan()))
    assert not told


def test_the_base_model_is_left_as_it_was(llama: Path, tmp_path: Path) -> None:
    """The same job without privacy gives the same bits before and after one with it."""
    worker, plain = tiny.worker(tmp_path, llama, "causal_lm"), RoundTask(tiny.plan())
    before = worker.train(plain)
    worker.train(RoundTask(private_plan()))
    after = worker.train(plain)
    assert all(torch.equal(t, after.adapter.tensors()[n]) for n, t in before.adapter.tensors().items())
