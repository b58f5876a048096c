"""Running out of memory is told with its remedies, wherever it happens, and nothing of the failed task stays."""

import errno
import gc
import weakref
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from nvflare_fm.adapter import RoundTask
from nvflare_fm.errors import TrainingError
from nvflare_fm.job.cost import activation_bytes, trained_bytes
from nvflare_fm.site.model import base_model
from nvflare_fm.site.model.shapes import shapes
from nvflare_fm.site.tasks import registry as tasks
from nvflare_fm.site.training import fit as training
from nvflare_fm.site.training import memory
from nvflare_fm.site.worker import Worker
from tests.codes import refused
from tests.site import tiny
from tests.site.held import Held

ERRORS = [
    MemoryError(),
    torch.OutOfMemoryError("CUDA"),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory"),
    RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported at some other API call"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: str(error)[:30])
def test_running_out_of_memory_names_the_remedies(error: Exception) -> None:
    with (
        refused("out_of_memory", TrainingError, "gradient_checkpointing", "memory_gib") as told,
        memory.explained(tiny.plan()),
    ):
        raise error
    assert told.value.code == "out_of_memory"
    assert "batch_size 4, max_length 48" in told.value.local
    assert "48" not in told.value.message


@pytest.mark.parametrize("error", [RuntimeError("another"), OSError(errno.ENOENT, "another"), ValueError("another")])
def test_another_error_stays_what_it_is(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, memory.explained(tiny.plan()):
        raise error
    assert caught.value is error


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: str(error)[:30])
@pytest.mark.parametrize("where", ["loading", "the first text", "attaching", "training", "measuring"])
def test_it_is_told_wherever_in_a_round_it_happens(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, error: Exception
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    place = {
        "loading": (base_model, "_load_weights"),
        "the first text": (LlamaForCausalLM, "forward"),
        "attaching": (torch.nn.Module, "requires_grad_"),
        "training": (training.LocalTrainer, "compute_loss"),
        "measuring": (torch, "cat"),
    }[where]
    worker, plan = tiny.worker(tmp_path, llama, "causal_lm"), RoundTask(tiny.plan())
    if where in ("loading", "the first text"):
        monkeypatch.setattr(base_model, "_loaded", {})
    else:
        worker._job(plan, trains=True)
    monkeypatch.setattr(*place, fail)
    with pytest.raises(TrainingError) as told:
        worker.train(plan)
    monkeypatch.undo()
    assert told.value.code == "out_of_memory"


def test_what_a_failed_task_held_is_let_go() -> None:
    held: list[weakref.ref[torch.Tensor]] = []

    def task() -> None:
        tensor = torch.zeros(3)
        held.append(weakref.ref(tensor))
        raise torch.OutOfMemoryError("CUDA")

    with pytest.raises(TrainingError) as told, memory.explained(tiny.plan()):
        task()
    gc.collect()
    assert told.value.__context__  # still holds the frames
    assert held[0]() is None


@pytest.mark.parametrize("fails", [False, True])
def test_the_gpu_is_given_back_when_a_round_is_over(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    """torch's calls stand in for a GPU: `tests/gpu` looks at a real one."""
    called: list[str] = []
    worker, plan = tiny.worker(tmp_path, llama, "causal_lm", should_stop=lambda: fails), RoundTask(tiny.plan())
    worker._job(plan, trains=True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: called.append("empty_cache"))
    monkeypatch.setattr(memory, "gc", type("", (), {"collect": lambda: called.append("collect")}))
    for work in (worker.train, worker.validate):
        called.clear()
        with monkeypatch.context() as with_gpu:
            with_gpu.setattr(memory, "_on_gpu", lambda: True)
            try:
                work(plan)
            except TrainingError:
                assert fails
        assert called == ["collect", "empty_cache"]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_a_step_holds_what_was_told(tmp_path: Path, kind: str, checkpointing: bool) -> None:
    """All that torch's tensors hold, in bf16 as on a GPU."""
    sizes = {"hidden_size": 128, "intermediate_size": 448, "num_hidden_layers": 4, "max_position_embeddings": 256}
    model = tiny.save(tmp_path / "model", kind, **sizes)
    task = "causal_lm" if kind == "llama" else "sequence_classification"
    plan = tiny.plan(
        task, quantization="nf4", compute_dtype="bf16", max_length=256, peft={"method": "lora", "rank": 2},
        training={"local_steps": 2, "batch_size": 2, "gradient_checkpointing": checkpointing},
        evaluation={"before": False, "after": False},
    )  # fmt: skip
    file = tiny.jsonl(tmp_path / "rows.jsonl", [tasks[plan.task].made_up(plan)] * 4)
    worker = Worker("site-1", tiny.site(model, file, data={"notes": {"train": str(file), "validation": str(file)}}))
    worker._job(RoundTask(plan), trains=True)
    with Held() as held:
        worker.train(RoundTask(plan))
    base, adapter = shapes(model, plan)
    told = trained_bytes(adapter, plan, 2, 2) + activation_bytes(base, adapter, plan)
    assert told == pytest.approx(held.most_bytes, rel=0.15)
