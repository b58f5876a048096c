"""Runs: one method in one study at one rate from one seed. What each one finds is a few JSON lines in the results."""

import json
import multiprocessing
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from queue import Empty
from threading import Event, Thread
from typing import Any, Protocol

import torch
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..adapter import RoundTask
from ..cli.terminal import console
from ..errors import FmError
from .bench import POINTS, Bench, baseline, federated, overall, silent
from .methods import BASELINES, METHODS, Method
from .study import Study, json_lines

Line = dict[str, Any]
Setting = tuple[float, float]  # a learning rate, and the factor of the head's
DIVERGED = ("diverged", "not_finite")  # codes of errors


@dataclass(frozen=True)
class Run:
    """One method in one study, at one learning rate, from one seed.

    Args:
        tuning_of: name of the study for which a learning rate is sought, on held-out training rows; empty: none.
        head: factor of the head's learning rate.
        at_end: whether that setting is at an end of those tried, so that a better one may lie beyond.
    """

    study: Study
    method: str
    rate: float
    seed: int
    tuning_of: str = ""
    head: float = 1.0
    at_end: bool = False

    @property
    def asked(self) -> Method:
        return replace((METHODS | BASELINES)[self.method], head_factor=self.head)

    @property
    def file(self) -> Path:
        return self.study.results(self.tuning_of)

    @property
    def site_rounds(self) -> int:
        """About how much work it is: rounds times sites."""
        return self.study.rounds * len(self.study.names)

    @cached_property
    def digest(self) -> str:
        """Of the configuration that its lines depend on: plan, method, rows."""
        bench = Bench(self.study, self.rate, bool(self.tuning_of))
        return bench.digest(self.asked, self.seed)

    @property
    def title(self) -> str:
        """What it is, in a log."""
        head = f", head times {self.head:g}" if self.head != 1 else ""
        return f"{self.study.name}, {self.method} at {self.rate:g}{head}, seed {self.seed}"

    def carry_out(self, tick: Any = silent) -> tuple[list[Line], float]:
        """See `carry_out`."""
        return carry_out(self, tick)

    def done(self) -> bool:
        """Whether the results have it."""
        return any(row["method"] == self.method and row.get("digest") == self.digest for row in read_lines(self.file))


def read_lines(file: Path) -> list[Line]:
    """A file of JSON lines; none where there is no file."""
    return [*json_lines(file)] if file.exists() else []


def carry_out(run: Run, tick: Any = silent) -> tuple[list[Line], float]:
    """Do one run.

    Args:
        tick: is told how many rounds of a site are done, as they are done.
    Returns:
        Its lines, and the seconds it took.
    """
    torch.set_num_threads(1)
    began, bench = time.monotonic(), Bench(run.study, run.rate, bool(run.tuning_of), tick)
    who = {"method": run.method, "seed": run.seed, "rate": run.rate, "head": run.head, "digest": run.digest}
    who |= {"setup": run.study.setup} | ({"at_end": True} if run.at_end else {})
    try:
        if run.method in BASELINES:
            found = list(baseline(bench, run.method, run.asked, run.seed))
        else:
            found = list(federated(bench, run.asked, run.seed, 1 if run.tuning_of else POINTS))
    except FmError as error:
        if not run.tuning_of or error.code not in DIVERGED:
            raise
        return [{**who, "score": None, "stopped": error.code}], time.monotonic() - began  # a rate that is too high
    told = [rounded({**who, "score": overall(row["scores"], bench.rows), **row}) for row in found]
    return told, time.monotonic() - began


def rounded(row: Line) -> Line:
    """Without digits that say nothing; the rate is a setting, no measurement."""
    return row | {
        "score": round(row["score"], 5),
        "scores": {site: round(score, 5) for site, score in row["scores"].items()},
    }


def seconds_per_round(study: Study) -> float:
    """Measure how long a site's round takes, its share of the scoring included: one site trains twice, and the first
    time, which loads the base model and reads the rows, is not counted.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        bench, method = Bench(study, study.rates[0]), Method()
        worker = bench.workers(method)[study.names[len(study.names) // 2]]
        task = RoundTask(bench.settled(method))
        update = worker.train(task)
        began = time.monotonic()
        worker.train(task)
        trained = time.monotonic()
        worker.validate(RoundTask(task.plan, update.adapter, update.manifest))
        return trained - began + (time.monotonic() - trained) * min(1.0, POINTS / study.rounds)
    finally:
        torch.set_num_threads(threads)


def duration(seconds: float) -> str:
    """A length of time, as one says it."""
    if seconds < 90 * 60:
        return f"{max(1, round(seconds / 60))} minutes" if seconds > 90 else "a minute or two"
    return f"{seconds / 3600:.1f} hours"


class Doable(Protocol):
    """A run of any kind: what `carry_out_all` needs of it."""

    @property
    def title(self) -> str: ...

    @property
    def file(self) -> Path: ...

    @property
    def site_rounds(self) -> int: ...

    def done(self) -> bool: ...

    def carry_out(self, tick: Any = silent) -> tuple[list[Line], float]: ...


def write(run: Doable, rows: Sequence[Line]) -> None:
    """Append a run's lines to its study's results."""
    run.file.parent.mkdir(parents=True, exist_ok=True)
    with run.file.open("a") as out:
        out.writelines(json.dumps(row) + "\n" for row in rows)


def carry_out_all(runs: Sequence[Doable], cores: int) -> None:
    """Do the runs that the results lack, `cores` at a time; each one's lines are written as it ends.

    Shows a bar of rounds done over all sites and runs, with the time that is left, from the first round on.
    """
    missing = [run for run in runs if not run.done()]
    if not missing:
        return
    context = multiprocessing.get_context("spawn")
    ticks = context.Queue()
    with (
        _shown(sum(run.site_rounds for run in missing), ticks) as progress,
        ProcessPoolExecutor(cores, mp_context=context, initializer=_start, initargs=(ticks,)) as pool,
    ):
        running = {pool.submit(_in_process, run): run for run in missing}
        try:
            for future in as_completed(running):
                run, (rows, seconds) = running[future], future.result()
                write(run, rows)
                scores = " ".join("diverged" if row["score"] is None else f"{row['score']:.4f}" for row in rows)
                progress.console.log(f"{run.title}: {scores} in {seconds:.0f} s")
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


@contextmanager
def _shown(total: int, ticks: Any) -> Iterator[Progress]:
    columns = (
        TextColumn("rounds of a site"), BarColumn(), TaskProgressColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(), TextColumn("left:"), TimeRemainingColumn(),
    )  # fmt: skip
    over = Event()
    with Progress(*columns, console=console()) as progress:
        bar = progress.add_task("", total=total)

        def follow() -> None:
            while not over.is_set():
                try:
                    progress.advance(bar, ticks.get(timeout=0.5))
                except Empty:
                    continue

        thread = Thread(target=follow, daemon=True)
        thread.start()
        try:
            yield progress
        finally:
            over.set()
            thread.join()


_ticks: Any = None  # of the process that carries out runs


def _start(ticks: Any) -> None:
    global _ticks
    _ticks = ticks


def _in_process(run: Doable) -> tuple[list[Line], float]:
    return run.carry_out(_ticks.put)
