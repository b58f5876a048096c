"""The memory that `plan` tells against what was seen, and what happens when there is too little."""

from typing import Any

import torch

from nvflare_fm.config import TaskPlan
from nvflare_fm.errors import FmError
from nvflare_fm.job.cost import measuring_bytes
from nvflare_fm.site.model.shapes import shapes
from nvflare_fm.site.offer.confine import confine
from nvflare_fm.site.worker import Worker
from tests.gpu import offers
from tests.gpu.measuring import GIB, TINY, allocated, attempt, emptied, now, on_gpu, say, told

CASES: list[tuple[str, int, int, bool, dict[str, Any]]] = [  # base, texts × tokens, checkpointing, what else
    ("nf4", 4, 1024, False, {}),
    ("nf4", 4, 1024, True, {}),
    ("int8", 4, 1024, False, {}),
    ("bf16", 4, 1024, False, {}),
    ("nf4", 1, 2048, False, {}),
    ("nf4", 4, 1024, False, {"peft": {"lora_dropout": 0.05}}),
    ("int8", 4, 1024, True, {}),
    ("nf4", 4, 1024, False, {"compute_dtype": "fp16"}),
    ("nf4", 4, 1024, False, {"training": {"proximal_mu": 0.1, "gradient_accumulation_steps": 2}}),
    ("nf4", 4, 1024, False, {"peft": {"use_dora": True}}),
    ("fp4", 4, 1024, False, {"training": {"optim": "paged_adamw_8bit"}}),
]


def memory() -> None:
    with attempt("measuring"):
        measuring()
    for kind, batch, length, checkpointing, more in CASES[:2] if TINY else CASES:
        with attempt(f"{kind} {batch} x {length} {checkpointing} {more}"):
            training("1b", offers.plan(kind, batch, length, 3, checkpointing, **more), more)


def memory8() -> None:
    for kind in ("nf4",) if TINY else ("nf4", "int8", "bf16"):
        with attempt(f"8b {kind}"):
            training("8b", offers.plan(kind, 2, 2048, 3, checkpointing=True), {})


def training(name: str, asked: TaskPlan, more: dict[str, Any]) -> None:
    """Loading and three steps."""
    folder = offers.model(name)
    emptied()
    start, began = allocated(), now()
    offers.loaded(folder, asked)
    load_s, weights = now() - began, allocated() - start
    report = offers.worker(folder).train(offers.task(asked)).report
    expected = offers.predicted(folder, asked)
    seen = report.peak_memory_mib * 2**20 - start
    whole = sum(expected.values())
    say(
        "memory", model=name, quantization=asked.quantization, batch=asked.training.batch_size, length=asked.max_length,
        checkpointing=asked.training.gradient_checkpointing, more=more, load_s=load_s, loss=report.loss,
        step_s=report.seconds / (report.steps or 1), weights_told_gib=expected["weights"] / GIB,
        weights_gib=weights / GIB, told_gib=whole / GIB, seen_gib=seen / GIB,
        off_percent=100 * (whole / seen - 1) if on_gpu() else None, goal_percent=15,
    )  # fmt: skip


def measuring() -> None:
    """16 texts at once, as a plan has it by default."""
    folder, asked = offers.model("1b"), offers.plan("nf4", 1, 2048, 2, evaluation={"before": True, "after": False})
    emptied()
    start = allocated()
    if on_gpu():
        torch.cuda.reset_peak_memory_stats()
    began = now()
    offers.worker(folder).validate(offers.task(asked))
    base, adapter = shapes(folder, asked)
    expected = base.size(asked) + adapter.size(asked.rank) + measuring_bytes(base, asked)
    say(
        "measuring", texts=asked.evaluation.batch_size, length=asked.max_length, seconds=now() - began,
        told_gib=expected / GIB, seen_gib=(torch.cuda.max_memory_allocated() - start) / GIB if on_gpu() else None,
    )  # fmt: skip


def oom() -> None:
    """Too much asked: the reason must be told, and the next round must work. Loading into too little, likewise."""
    folder = offers.model("1b")
    one = offers.worker(folder, count=256, length=2048)
    tried("too much", one, offers.plan("nf4", 4 if TINY else 256, 2048, 2))
    if on_gpu():
        say("kept", allocated_gib=allocated() / GIB, reserved_gib=torch.cuda.memory_reserved() / GIB)
    tried("after it", one, offers.plan("nf4", 1, 512, 2))
    emptied()
    if on_gpu():
        confine(0.9)
        tried("too little to load", offers.worker(folder), offers.plan("bf16", 1, 512, 2))


def tried(what: str, one: Worker, asked: TaskPlan) -> None:
    try:
        say(what, trained=True, peak_mib=one.train(offers.task(asked)).report.peak_memory_mib)
    except Exception as error:
        explained = isinstance(error, FmError) and error.code == "out_of_memory"
        say(what, trained=False, explained=explained, said=told(error))
