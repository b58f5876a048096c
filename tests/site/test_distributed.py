"""One site, two processes: the same worker in each, gloo, an NF4 base. Both end with the same adapter."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from nvflare_fm.adapter import RoundTask
from nvflare_fm.site.training import distributed
from tests.site import tiny

WORK = """
import json, sys, torch
torch.set_num_threads(1)
from pathlib import Path
from safetensors.torch import save_file
from nvflare_fm.adapter import RoundTask
from nvflare_fm.errors import TrainingError
from nvflare_fm.site.training import logits
from nvflare_fm.site.training.distributed import processes
from tests.site import tiny

logits.positions_at_once = lambda words: 7  # here, and not where one process agrees
folder, models = Path(sys.argv[1]), [Path(path) for path in sys.argv[2:]]
llama = models[0]
training = {"local_steps": 4, "batch_size": 4, "learning_rate": 1e-2, "optim": "sgd", "max_grad_norm": 1e9}
for task in ("causal_lm", "sequence_classification", "preference"):
    worker = tiny.worker(folder, models.pop(0), task)
    update = worker.train(RoundTask(tiny.plan(task, quantization="nf4", training=training)))
    out = f"{task}-{processes()[0]}"
    save_file(update.adapter.tensors(), folder / f"{out}.safetensors")
    told = {"before": update.report.before, "after": update.report.after, "loss": update.report.loss}
    (folder / f"{out}.json").write_text(json.dumps(told | {"tokens": update.report.tokens, "world": processes()[1]}))
from nvflare_fm.site.training import dp
training = {"local_steps": 4, "batch_size": 12, "optim": "sgd", "learning_rate": 1e-2}
for name, noise in (("quiet", 1e-6), ("loud", 1000.0)):
    privacy = {"noise_multiplier": noise, "max_grad_norm": 1.0, "delta": 1e-3}
    task = RoundTask(tiny.plan(quantization="nf4", privacy=privacy, training=training))
    update = tiny.worker(folder, llama, "causal_lm").train(task)
    save_file(update.adapter.tensors(), folder / f"{name}-{processes()[0]}.safetensors")
private = dp.settle(RoundTask(tiny.plan(privacy=privacy, training={"batch_size": 3})), tuple(range(24)), 2)
(folder / f"shares-{processes()[0]}.json").write_text(json.dumps([dp.draw(private) for _ in range(300)]))
task, training = "preference", {"local_steps": 4, "batch_size": 4}
calls = 0
def stop():
    global calls
    calls += 1
    return processes()[0] == 1 and calls > 9  # only one of them is told to stop
worker.should_stop = stop
try:
    worker.train(RoundTask(tiny.plan(task, quantization="nf4", training=training | {"local_steps": 200})))
except TrainingError:
    (folder / f"stopped-{processes()[0]}").touch()
"""
TASKS = ("causal_lm", "sequence_classification", "preference")


def test_two_processes_train_one_adapter_and_stop_together(llama: Path, bert: Path, tmp_path: Path) -> None:
    (tmp_path / "work.py").write_text(WORK)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
         str(tmp_path / "work.py"), str(tmp_path), str(llama), str(bert), str(llama)],
        env={**os.environ, "PYTHONPATH": ".", "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"},  # as in a trainer
        capture_output=True, text=True, timeout=150,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert all((tmp_path / f"stopped-{rank}").exists() for rank in (0, 1))
    for task, model in zip(TASKS, (llama, bert, llama), strict=True):
        first, second = (load_file(tmp_path / f"{task}-{rank}.safetensors") for rank in (0, 1))
        assert all(torch.equal(first[name], second[name]) for name in first)
        reports = [json.loads((tmp_path / f"{task}-{rank}.json").read_text()) for rank in (0, 1)]
        assert reports[0] == reports[1]
        assert reports[0]["world"] == 2
        assert reports[0]["after"]["loss"] < reports[0]["before"]["loss"]
        one_process_agrees(tmp_path, model, task, first, reports[0])
    two_processes_make_one_private_update(tmp_path, llama)


def two_processes_make_one_private_update(folder: Path, model: Path) -> None:
    """Each takes its share of the records, and the noise is added once. Here every record is in every step."""
    for name in ("quiet", "loud"):
        first, second = (load_file(folder / f"{name}-{rank}.safetensors") for rank in (0, 1))
        assert all(torch.equal(first[tensor], second[tensor]) for tensor in first)
    quiet, loud = (load_file(folder / f"{name}-0.safetensors") for name in ("quiet", "loud"))
    training = {"local_steps": 4, "batch_size": 24, "optim": "sgd", "learning_rate": 1e-2}
    privacy = {"noise_multiplier": 1e-6, "max_grad_norm": 1.0, "delta": 1e-3}
    plan = tiny.plan(quantization="nf4", privacy=privacy, training=training)
    update = tiny.worker(folder, model, "causal_lm").train(RoundTask(plan))
    for name, tensor in update.adapter.tensors().items():
        torch.testing.assert_close(tensor, quiet[name], atol=1e-5, rtol=1e-3)
    moved = torch.cat([tensor.flatten() for name, tensor in loud.items() if "lora_B" in name])
    assert float(moved.std()) == pytest.approx(1e-2 * 2 * 1000 / 24, rel=0.05)
    shares = [json.loads((folder / f"shares-{rank}.json").read_text()) for rank in (0, 1)]
    drawn = [sorted(record for (record,) in one + other) for one, other in zip(*shares, strict=True)]
    assert all(len(set(each)) == len(each) for each in drawn)
    assert sum(map(len, drawn)) / 300 == pytest.approx(6, abs=0.7)  # batches of 3 at 2 processes; 5 deviations
    assert all(sum(map(len, share)) > 600 for share in shares)


def one_process_agrees(
    folder: Path, model: Path, task: str, adapter: dict[str, torch.Tensor], report: dict[str, Any]
) -> None:
    """One process with batches twice as large takes the same steps over the same rows."""
    training = {"local_steps": 4, "batch_size": 8, "learning_rate": 1e-2, "optim": "sgd", "max_grad_norm": 1e9}
    update = tiny.worker(folder, model, task).train(RoundTask(tiny.plan(task, quantization="nf4", training=training)))
    assert update.report.tokens == report["tokens"]
    assert update.report.loss == pytest.approx(report["loss"], rel=1e-4)
    assert update.report.before == pytest.approx(report["before"], rel=1e-4)
    for name, tensor in update.adapter.tensors().items():
        torch.testing.assert_close(tensor, adapter[name], atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize(
    ("gpus", "processes", "through"), [(0, 2, "gloo"), (1, 2, "gloo"), (2, 2, "nccl"), (4, 2, "nccl")]
)
def test_processes_that_share_a_gpu_do_not_speak_through_nccl(
    monkeypatch: pytest.MonkeyPatch, gpus: int, processes: int, through: str
) -> None:
    """NCCL refuses two processes on one GPU. torch's answers stand in for the machine."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert distributed.backend() == through


def test_alone_a_process_agrees_with_itself() -> None:
    assert distributed.processes() == (0, 1)
    assert distributed.gather(3) == [3]
    assert distributed.any_process(True)
    assert not distributed.any_process(False)
