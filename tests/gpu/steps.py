"""A training step of ours against a plain one: same weights, rows, batches and steps, in turns."""

import gc
import statistics
import time
from itertools import pairwise
from typing import Any

from nvflare_fm.job import cost as arithmetic
from tests.gpu import offers
from tests.gpu.measuring import GIB, TINY, allocated, attempt, emptied, now, on_gpu, say
from tests.gpu.plain import Plain


def step1() -> None:
    with attempt("step of 1b"):
        compare("1b", 4, 1024, checkpointing=False, warm=3, steps=3 if TINY else 10, blocks=1 if TINY else 2)
    emptied()
    logits_at_once()


def step8() -> None:
    with attempt("step of 8b"):
        compare("8b", 2, 2048, checkpointing=True, warm=2, steps=3 if TINY else 5, blocks=1 if TINY else 2)


def compare(name: str, batch: int, length: int, checkpointing: bool, warm: int, steps: int, blocks: int) -> None:
    """In half of the blocks each step is timed, which makes a GPU wait; in the others all steps together."""
    folder, taken = offers.model(name), warm + steps
    asked = offers.plan("nf4", batch, length, taken, checkpointing)
    one = offers.worker(folder)
    nothing, began = allocated(), now()
    base = offers.loaded(folder, asked)
    own = {"ours": allocated() - nothing}
    say("loaded", model=name, seconds=now() - began, weights_gib=own["ours"] / GIB, dtype=str(base.compute_dtype))
    before, began = allocated(), now()
    other = Plain(folder, asked, one._job(offers.task(asked), trains=True).data.train, base.compute_dtype)
    own["plain"] = allocated() - before
    say("loaded plainly", model=name, seconds=now() - began, weights_gib=own["plain"] / GIB)
    each: dict[str, list[float]] = {"ours": [], "plain": []}
    together: dict[str, list[float]] = {"ours": [], "plain": []}
    peaks: dict[str, list[float]] = {"ours": [], "plain": []}
    losses: dict[str, float] = {}
    for block in range(2 * blocks):
        for who in ("ours", "plain"):
            clock = Clock(block < blocks, warm, taken)
            gc.collect()
            beside = allocated() - own[who]
            if who == "ours":
                one.should_stop = clock.tick
                report = one.train(offers.task(asked)).report
                losses[who], peak = report.loss, report.peak_memory_mib * 2**20
            else:
                losses[who], peak = other.train(lambda: clock.tick() and None), other.peak_bytes  # noqa: B023
            peaks[who].append((peak - beside) / GIB)
            if clock.each:
                each[who] += clock.apart()
            else:
                together[who].append(clock.mean())
    told = {part: size / GIB for part, size in offers.predicted(folder, asked).items()}
    ours, plain = statistics.median(together["ours"]), statistics.median(together["plain"])
    tokens = batch * asked.max_length
    say(
        "step", model=name, quantization="nf4", batch=batch, length=asked.max_length, checkpointing=checkpointing,
        ours_s=ours, plain_s=plain, ratio=ours / plain, goal=1.05,
        ratio_each=statistics.median(each["ours"]) / statistics.median(each["plain"]), steps_seen=len(each["ours"]),
        spread={who: [round(min(s), 5), round(max(s), 5)] for who, s in together.items()},
        ours_tokens_per_s=tokens / ours, plain_tokens_per_s=tokens / plain, losses=losses,
        ours_peak_gib=max(peaks["ours"]), plain_peak_gib=max(peaks["plain"]), told_gib=sum(told.values()),
        told_parts={part: round(size, 3) for part, size in told.items()},
        told_over_seen=sum(told.values()) / max(peaks["ours"]) if on_gpu() else None,
    )  # fmt: skip


class Clock:
    """Ticks at the beginning and after each step; waits for the device at those that count."""

    def __init__(self, each: bool, warm: int, taken: int) -> None:
        self.each, self.warm, self.taken = each, warm, taken
        self.ticks: list[float] = []

    def tick(self) -> bool:
        """False: for a trainer that asks whether to stop."""
        counts = self.each or len(self.ticks) in (self.warm, self.taken)
        self.ticks.append(now() if counts else time.perf_counter())
        return False

    def apart(self) -> list[float]:
        counted = self.ticks[self.warm : self.taken + 1]
        return [after - before for before, after in pairwise(counted)]

    def mean(self) -> float:
        return (self.ticks[self.taken] - self.ticks[self.warm]) / (self.taken - self.warm)


def logits_at_once() -> None:
    """Seconds and memory of a step by how many logits are held at a time: is the limit well chosen?"""
    folder, steps = offers.model("1b"), 3 if TINY else 8
    asked, one = offers.plan("nf4", 4, 1024, steps), offers.worker(folder)
    for exponent in (12, 26) if TINY else (24, 25, 26, 27, 28, 30):
        with attempt(f"2^{exponent} logits at once"):
            arithmetic.LOGITS_AT_ONCE = 2**exponent
            report: Any = one.train(offers.task(asked)).report
            step_s, peak_gib = report.seconds / steps, report.peak_memory_mib / 1024
            say("logits at once", exponent=exponent, step_s=step_s, peak_gib=peak_gib, loss=report.loss)
