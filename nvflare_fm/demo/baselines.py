"""What the federation is held against: each site alone, and all rows in one place. In processes of their own.

All take as many steps as a site takes in the federation. Pooled training sees in each step as many rows as the
sites see together.
"""

import json
import logging
import os
import signal
import sys
import tempfile
from pathlib import Path

from .trial import Site, Trial

Scores = dict[str, float]  # whose test rows → the trial's metric
POOLED = "pooled"


def courteous() -> None:
    """A worker process gives way to the federation, and tidies up when it is told to end."""
    os.nice(10)
    logging.getLogger(__package__.partition(".")[0]).setLevel(logging.ERROR)  # the federation's log says it of the rows
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in the terminal is the main process's to answer
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))


def alone(trial: Trial, site: Site) -> Scores:
    """One site's own rows, at its own rank."""
    return _train(trial, site.name, site.folder, site.rank, batch=1)


def pooled(trial: Trial) -> Scores:
    """All rows, at the largest rank. They are brought together in a folder that is gone afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        together = Path(folder) / "train.jsonl"
        rows = (row for site in trial.sites for row in site.rows("train"))
        together.write_text("".join(json.dumps(dict(row), default=str) + "\n" for row in rows), encoding="utf-8")
        return _train(trial, POOLED, Path(folder), trial.plan.rank, batch=len(trial.sites))


def _train(trial: Trial, name: str, folder: Path, rank: int, batch: int) -> Scores:
    from ..adapter import RoundTask
    from ..config import Aggregation, SiteOverrides
    from ..job.settle import settle
    from ..simulate import train_alone
    from ..site.worker import Worker

    plan = settle(trial.plan, Aggregation()).plan
    plan = plan.model_copy(update={"evaluation": plan.evaluation.model_copy(update={"before": False})})
    overrides = SiteOverrides(rank=rank, batch_size=batch * plan.training.batch_size)
    first = trial.sites[0].folder
    adapter, manifest, _ = train_alone(
        Worker(name, trial.offer(folder, tested_on=first), overrides), plan, trial.rounds
    )
    task = RoundTask(plan, adapter, manifest)
    metric = trial.subject.metric
    return {site.name: Worker(site.name, trial.offer(site.folder)).validate(task)[metric] for site in trial.sites}
