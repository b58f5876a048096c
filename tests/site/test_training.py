"""Local training: schedules and passes that run on from round to round, a stop within one step, a pull to the start."""

import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from nvflare_fm.adapter import Adapter, AdapterUpdate, LoraPair, RoundTask
from nvflare_fm.config import TrainingSettings
from nvflare_fm.errors import PolicyError, TrainingError
from nvflare_fm.site.model import base_model
from nvflare_fm.site.training import fit as training
from nvflare_fm.site.training.fit import LocalTrainer, order, schedule, steps_per_round
from nvflare_fm.site.worker import Worker
from tests.codes import refused
from tests.site import tiny


def rates(settings: TrainingSettings, steps: int, rounds: int, first: int = 0) -> list[float]:
    """The learning rate of each step, over rounds that each begin with a new optimizer, as at a site."""
    found = []
    for number in range(first, rounds):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=settings.learning_rate)
        course = schedule(optimizer, settings, steps, number, rounds)
        for _ in range(steps):
            found.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            course.step()
    return found


@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0.0, 0.3])
def test_the_learning_rate_over_many_rounds_is_that_of_one_run(name: Any, warmup: float) -> None:
    settings = TrainingSettings(lr_scheduler_type=name, warmup_ratio=warmup, learning_rate=1.0)
    assert rates(settings, 4, 5) == pytest.approx(rates(settings, 20, 1))
    assert max(rates(settings, 4, 5)) == pytest.approx(1.0)
    assert len(set(rates(settings, 4, 5))) > 1 or (name == "constant" and not warmup)


def test_a_site_trains_at_the_rate_of_its_round(llama: Path, tmp_path: Path) -> None:
    seen: dict[int, float] = {}
    training = {"local_steps": 2, "batch_size": 2, "learning_rate": 1.0, "lr_scheduler_type": "linear"}

    def log(name: str, value: float, step: int) -> None:
        if name == "learning_rate":
            seen[step] = value

    worker = tiny.worker(tmp_path, llama, "causal_lm", log=log)
    for number in (0, 1):
        worker.train(
            RoundTask(
                tiny.plan(training=training | {"optim": "sgd", "learning_rate": 1e-4}), round=number, total_rounds=2
            )
        )
    assert seen == pytest.approx({1: 1e-4, 2: 0.75e-4, 3: 0.5e-4, 4: 0.25e-4})


@pytest.mark.parametrize("ratio", [0.0, 4.0])
def test_a_head_moves_as_many_times_the_rate_as_was_asked_and_all_else_at_the_rate(
    bert: Path, tmp_path: Path, ratio: float
) -> None:
    """Adam's first step moves an entry by the rate, whatever its gradient; a head's entries as far in the mean."""
    worker = tiny.worker(tmp_path, bert, "sequence_classification")
    plan = tiny.plan("sequence_classification", training={"local_steps": 1, "head_lr_ratio": ratio})
    first = worker.train(RoundTask(plan))
    second = worker.train(RoundTask(plan, first.adapter, first.manifest, 1, 2))
    before, after = first.adapter.tensors(), second.adapter.tensors()
    for name in before:
        moved, rate = after[name] - before[name], plan.training.learning_rate
        if ratio and ".lora_" not in name:
            assert float(moved.square().mean().sqrt()) == pytest.approx(ratio * rate, rel=0.02), name
        else:
            assert float(moved.abs().max()) == pytest.approx(rate, rel=0.02), name


def test_passes_over_the_rows_continue_from_round_to_round() -> None:
    whole = order(7, 0, 28, "seed")
    assert [order(7, start, 4, "seed") for start in range(0, 28, 4)] == [whole[i : i + 4] for i in range(0, 28, 4)]
    assert all(sorted(whole[i : i + 7]) == list(range(7)) for i in range(0, 28, 7))
    assert whole[:7] != whole[7:14]
    assert order(7, 0, 28, "other") != whole


def test_epochs_become_steps_that_cover_the_rows() -> None:
    plan = tiny.plan(training={"local_steps": 0, "local_epochs": 2, "batch_size": 4, "gradient_accumulation_steps": 2})
    assert steps_per_round(plan, 24) == 6
    assert steps_per_round(plan, 25) == 7
    assert steps_per_round(plan, 24, world=2) == 3


def train(
    folder: Path, model: Path, round: int = 0, task: str = "causal_lm", quantization: str = "fp32", **settings: Any
) -> AdapterUpdate:
    values = {"local_steps": 4, "batch_size": 4, "learning_rate": 1e-2} | settings
    worker, plan = tiny.worker(folder, model, task), tiny.plan(task, quantization=quantization, training=values)
    return worker.train(RoundTask(plan, round=round, total_rounds=3))


def equal(one: Adapter, other: Adapter) -> bool:
    theirs = other.tensors()
    return all(torch.equal(tensor, theirs[name]) for name, tensor in one.tensors().items())


def test_the_same_round_twice_gives_the_same_bits_and_another_round_others(llama: Path, tmp_path: Path) -> None:
    first = train(tmp_path, llama)
    assert equal(first.adapter, train(tmp_path, llama).adapter)
    assert not equal(first.adapter, train(tmp_path, llama, round=1).adapter)


@pytest.mark.parametrize("scales", [True, False], ids=["a model that scales its loss", "one that does not"])
@pytest.mark.parametrize("task", ["causal_lm", "sequence_classification", "token_classification"])
def test_accumulated_small_batches_are_one_large_batch(
    llama: Path, tmp_path: Path, task: str, scales: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PreTrainedModel, "accepts_loss_kwargs", scales, raising=False)
    large = train(tmp_path, llama, task=task, batch_size=8, optim="sgd", max_grad_norm=1e9)
    small = train(
        tmp_path, llama, task=task, batch_size=2, gradient_accumulation_steps=4, optim="sgd", max_grad_norm=1e9
    )
    theirs = small.adapter.tensors()
    for name, tensor in large.adapter.tensors().items():
        torch.testing.assert_close(tensor, theirs[name], atol=1e-5, rtol=1e-3)
    assert small.report.tokens == large.report.tokens
    assert small.report.loss == pytest.approx(large.report.loss, rel=1e-4)


def test_gradient_checkpointing_changes_nothing_but_memory(llama: Path, tmp_path: Path) -> None:
    plain, saving = (train(tmp_path, llama, gradient_checkpointing=on) for on in (False, True))
    theirs = saving.adapter.tensors()
    for name, tensor in plain.adapter.tensors().items():
        torch.testing.assert_close(tensor, theirs[name], atol=1e-6, rtol=1e-5)


def test_fp16_takes_the_same_steps_as_fp32_and_skips_none(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU that lacks bf16; on a CPU, accelerate leaves out its half of it."""
    trainers: list[LocalTrainer] = []

    class AsOnGPU(LocalTrainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.accelerator.native_amp = True
            trainers.append(self)

    def trained(dtype: torch.dtype) -> AdapterUpdate:
        monkeypatch.setattr(base_model, "_loaded", {})
        monkeypatch.setattr(base_model, "compute_dtype", lambda *_: dtype)
        return train(tmp_path, llama, quantization="nf4", local_steps=6, batch_size=1, optim="sgd", proximal_mu=0.5)

    exact = trained(torch.float32)
    monkeypatch.setattr(training, "LocalTrainer", AsOnGPU)
    rough = trained(torch.float16)
    assert trainers[0].accelerator.scaler.get_scale() == training._FP16_SCALE  # a step that is skipped halves it
    assert rough.report.after["loss"] == pytest.approx(exact.report.after["loss"], rel=1e-3)
    for layer, pair in exact.adapter.lora.items():
        off = rough.adapter.lora[layer].delta() - pair.delta()
        assert float(off.norm()) < 0.1 * float(pair.delta().norm()), layer


def test_the_report_counts_what_was_trained_on(llama: Path, tmp_path: Path) -> None:
    worker = tiny.worker(tmp_path, llama, "causal_lm")
    plan = tiny.plan(training={"local_steps": 0, "local_epochs": 1, "batch_size": 4})
    report = worker.train(RoundTask(plan)).report
    rows = worker._job(RoundTask(plan), trains=True).data.train
    assert report.examples == len(rows) == 24
    assert report.steps == 6
    assert report.tokens == sum(len(row["input_ids"]) for row in rows)
    assert 0 < report.loss < 10
    assert report.seconds > 0
    assert report.peak_memory_mib > 0
    assert report.rank == 4


@pytest.mark.parametrize("accumulation", [1, 4])
def test_a_stop_is_obeyed_within_one_batch(llama: Path, tmp_path: Path, accumulation: int) -> None:
    calls = 0

    def stop() -> bool:
        nonlocal calls
        calls += 1
        return calls > 3

    worker = tiny.worker(tmp_path, llama, "causal_lm", should_stop=stop)
    training = {"local_steps": 4 // accumulation, "batch_size": 2, "gradient_accumulation_steps": accumulation}
    with refused("stopped", TrainingError):
        worker.train(RoundTask(tiny.plan(training=training, evaluation={"before": False})))
    assert calls == 4


def test_evaluation_stops_too(llama: Path, tmp_path: Path) -> None:
    worker = tiny.worker(tmp_path, llama, "causal_lm", should_stop=lambda: True)
    with refused("stopped", TrainingError):
        worker.validate(RoundTask(tiny.plan()))


def test_a_strong_pull_holds_the_adapter_near_its_start(llama: Path, tmp_path: Path) -> None:
    def moved(mu: float) -> float:
        update = train(tmp_path, llama, local_steps=20, learning_rate=0.05, optim="sgd", proximal_mu=mu)
        return math.sqrt(sum(float(pair.B.square().sum()) for pair in update.adapter.lora.values()))

    assert 0 < moved(15.0) < 0.5 * moved(0.0)


def test_the_pull_is_mu_times_the_distance_from_the_start(llama: Path, tmp_path: Path) -> None:
    """With plain SGD, w₁ = w₀ − ηg₀ and w₂ = w₁ − η(g₁ + pull(w₁)): the pull alone tells two runs apart. It is the
    gradient of μ/2 · ‖ΔW‖², for B starts at zero.
    """
    eta, mu = 0.05, 3.0
    one, free, held = (
        train(tmp_path, llama, local_steps=steps, learning_rate=eta, optim="sgd", proximal_mu=m, max_grad_norm=1e9)
        for steps, m in ((1, 0.0), (2, 0.0), (2, mu))
    )
    for layer, pair in held.adapter.lora.items():
        first, without = one.adapter.lora[layer], free.adapter.lora[layer]
        a, b = first.A.clone().requires_grad_(), first.B.clone().requires_grad_()
        (mu / 2 * LoraPair(a, b, first.scale).delta().square().sum()).backward()
        torch.testing.assert_close(pair.B, without.B - eta * b.grad, atol=1e-6, rtol=1e-3)
        torch.testing.assert_close(pair.A, without.A - eta * a.grad, atol=1e-6, rtol=1e-3)


def test_training_that_diverges_names_the_remedy(llama: Path, tmp_path: Path) -> None:
    training = {"local_steps": 30, "learning_rate": 10, "optim": "sgd", "max_grad_norm": 1e9, "proximal_mu": 1e6}
    plan = tiny.plan(peft={"method": "lora", "rank": 4, "lora_alpha": 1e6}, training=training)
    with refused("diverged", TrainingError, "learning_rate") as told:
        tiny.worker(tmp_path, llama, "causal_lm").train(RoundTask(plan))
    assert told.value.code == "diverged"


def test_epochs_beyond_the_sites_limit_are_refused(llama: Path, tmp_path: Path) -> None:
    file = tiny.jsonl(tmp_path / "a.jsonl", tiny.rows("causal_lm"))
    worker = Worker("site-1", tiny.site(llama, file, limits={"max_steps_per_round": 5}))
    plan = tiny.plan(training={"local_steps": 0, "local_epochs": 3, "batch_size": 4})
    with refused("above_limit", PolicyError, "local_epochs", "5") as caught:
        worker.train(RoundTask(plan))
    assert caught.value.code == "above_limit"
    assert "17" not in str(caught.value)


def test_sites_in_threads_take_turns_on_one_base(llama: Path, tmp_path: Path) -> None:
    task = RoundTask(tiny.plan())
    workers = [tiny.worker(tmp_path, llama, "causal_lm", f"site-{i}", shift=i) for i in range(3)]
    alone = [worker.train(task).adapter for worker in workers]
    together: dict[str, AdapterUpdate] = {}

    def run(worker: Worker) -> Callable[[], None]:
        return lambda: together.update({worker.site: worker.train(task)})

    threads = [threading.Thread(target=run(worker)) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(equal(mine, together[worker.site].adapter) for mine, worker in zip(alone, workers, strict=True))


def test_nothing_is_printed_or_written_while_training(
    llama: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = tiny.worker(tmp_path, llama, "causal_lm", log=lambda *_: None)
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    capfd.readouterr()
    worker.train(RoundTask(tiny.plan()))
    printed = capfd.readouterr()
    assert (printed.out, printed.err) == ("", "")
    assert sorted(tmp_path.rglob("*")) == before
