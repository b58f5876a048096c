"""The federation itself, through NVFlare's simulator in a process of its own; its log goes to a file."""

import json
import multiprocessing
import os
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from ..errors import FmError
from .trial import JOB, METRIC, Trial

Round = dict[str, Any]  # one line of the server's rounds.jsonl


def start(trial: Trial) -> BaseProcess:
    """The simulator, running. Ctrl-C reaches it too, and NVFlare then ends the sites."""
    process = multiprocessing.get_context("spawn").Process(target=_run, args=(trial, log_file(trial)))
    process.start()
    return process


def log_file(trial: Trial) -> Path:
    return trial.output / "nvflare.log"


def adapter_folder(trial: Trial) -> Path:
    """The adapter of the last round: choosing the best round by the test notes would flatter it."""
    return _run_dir(trial) / "adapters" / "last"


def _run_dir(trial: Trial) -> Path:
    return trial.output / "federation" / JOB / "server" / "simulate_job"


def _run(trial: Trial, log: Path) -> None:
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    from ..flare.environments import SimEnv
    from ..flare.recipe import FedPEFTRecipe

    recipe = FedPEFTRecipe(
        JOB,
        num_rounds=trial.rounds,
        min_sites=len(trial.sites),
        sites={site.name: {"rank": site.rank} for site in trial.sites},
        key_metric=METRIC,
        key_metric_mode="max",
        **trial.plan().model_dump(exclude={"rest"}, exclude_defaults=True),
    )
    offers = {site.name: trial.offer(site.folder) for site in trial.sites}
    recipe.run(SimEnv(sites=offers, workspace_root=trial.output / "federation"))


def follow(trial: Trial, simulator: BaseProcess) -> Iterator[Round]:
    """Each round as the server writes it down, the measurement after the last one included.

    Raises:
        FmError: the simulator ended early.
    """
    file, seen = _run_dir(trial) / "rounds.jsonl", 0
    while seen <= trial.rounds:
        running = simulator.is_alive()
        lines = file.read_text().split("\n")[:-1] if file.exists() else []  # the last piece may be half written
        for line in lines[seen:]:
            seen += 1
            yield _whole(json.loads(line))
        if not running and seen <= trial.rounds:
            raise FmError("the federation ended early; the end of its log says why", str(log_file(trial)))
        simulator.join(0.3)
    simulator.join()


def _whole(line: Round) -> Round:
    if line["out"]:
        raise FmError("; ".join(f"{site} does not count: {reason}" for site, reason in sorted(line["out"].items())))
    return line
