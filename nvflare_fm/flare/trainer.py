"""The process that trains: `python -m nvflare_fm.flare.trainer`, started by `PeftExecutor`, given tasks by NVFlare.

It connects first and loads the base model after, because NVFlare waits for the former only so long. What goes
wrong becomes a reply with the reason, and the site stays in the federation. Under `torch.distributed.run` the first
process speaks with NVFlare and shares every task with the others.
"""

import argparse
import gc
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import nvflare.client as flare
from nvflare.apis.analytix import AnalyticsDataType
from nvflare.app_common.abstract.fl_model import FLModel
from nvflare.app_common.app_constant import AppConstants
from nvflare.client.api import get_context
from nvflare.client.cell.attach_session import TrainerSessionError
from torch import distributed

from ..adapter import RoundTask
from ..config import TaskPlan
from ..errors import FmError, TrainingError
from ..job.synthetic import read_brought
from ..privacy.budget import Budget
from ..privacy.egress import public_report
from ..privacy.protection import Protection
from ..site.offer.site_config import FILE_NAME, load_site
from ..transforms import Chain
from ..transforms.packed import pack
from . import wire
from .encryption import site_keys

if TYPE_CHECKING:
    from ..site.worker import Worker

NamedTask = tuple[str, FLModel]  # NVFlare's name of the task, and what came with it
logger = logging.getLogger("nvflare_fm.trainer")
terminated = threading.Event()


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--site-file", type=Path, required=True, help="the site's fm_site.yaml")
    options.add_argument("--job-folder", type=Path, required=True, help="where this site keeps what is its own")
    options.add_argument("--config-folder", type=Path, required=True, help="of the job's app, with what it brought")
    given = options.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: terminated.set())
    logger.addHandler(logging.StreamHandler())  # what we say is in the site's log; of libraries, warnings
    logger.setLevel(logging.INFO)
    logger.propagate = False
    flare.init()
    processes = SiteProcesses() if int(os.environ.get("WORLD_SIZE", "1")) > 1 else None
    handler = TaskHandler(given.site_file, given.job_folder, given.config_folder)
    while (task := _next_task(processes)) is not None:
        answer = handler.answer(*task)
        if speaks() and not should_stop():
            flare.send(answer)
        if processes and handler.failed:
            raise SystemExit(1)  # processes that failed apart wait for each other for ever; new ones are started
    flare.shutdown()


def speaks() -> bool:
    return os.environ.get("RANK", "0") == "0"


def should_stop() -> bool:
    """Whether NVFlare has ended this session or the task in hand, seen without waiting."""
    return terminated.is_set() or (speaks() and get_context().api._abort_signal.triggered)


def _next_task(processes: "SiteProcesses | None") -> NamedTask | None:
    task = _receive() if speaks() else None
    return processes.share(task) if processes else task


def _receive() -> NamedTask | None:
    try:
        while not should_stop():
            if (message := flare.receive(timeout=1.0)) is not None:
                return flare.get_task_name(), message
    except TrainerSessionError as end:
        logger.info("the session is over: %s", end)
    return None


def _report(name: str, value: float, step: int) -> None:
    """To the trackers the job has: NVFlare's TensorBoard, MLflow and Weights & Biases receivers."""
    if speaks():  # the others take part in collecting a value, and must be asked as often
        flare.log(name, value, AnalyticsDataType.SCALAR, global_step=step)


class TaskHandler:
    """Carries out tasks, and answers each whatever happens."""

    def __init__(self, site_file: Path, job_folder: Path, config_folder: Path) -> None:
        self.site_file, self.job_folder, self.config_folder = site_file, job_folder, config_folder
        self.failed = False  # failed in a way that other processes of the site need not have noticed
        self._worker: Worker | None = None
        self._requested: TaskPlan | None = None  # what the server asked of the adapter that we may be told to submit
        self._labels: tuple[str, ...] = ()  # of this job, as the server named them

    def answer(self, name: str, message: FLModel) -> FLModel:
        try:
            return self._carry_out(name, message)
        except FmError as error:
            logger.error("%s refused: %s", name, error)
            self.failed |= isinstance(error, TrainingError)
            return wire.write_refusal(error.message)
        except Exception as error:
            logger.exception("%s failed", name)
            self.failed = True
            return wire.write_refusal(f"internal error: {type(error).__name__}; see the site's log")

    def _carry_out(self, name: str, message: FLModel) -> FLModel:
        worker = self._loaded()
        if name == AppConstants.TASK_SUBMIT_MODEL:
            adapter, manifest = worker.submit()
            chain = worker.chain(self._requested) if self._requested else Chain()
            return wire.write_submission(adapter, manifest, self._requested, pack(adapter, chain, worker.site))
        task = wire.labelled(wire.read_decided(message), self._labels)
        self._labels = task.plan.labels
        if name == AppConstants.TASK_VALIDATION:
            metrics = worker.validate(task)
            if task.over:  # the last adapter; those of cross-site evaluation have no round
                for metric, value in metrics.items():
                    _report(f"before/{metric}", value, task.round)
            return wire.write_metrics(metrics)
        if task.over:
            self._personalize(worker, task)
            return wire.write_nothing()
        update = worker.train(task)
        if worker.config.privacy.floor_of(task.plan):
            update = replace(update, report=public_report(update.report, task.plan))
        self._requested = wire.read_task(message).plan
        packed = worker.packed(update, task.plan)
        for event in packed.events:
            logger.info("round %d: %s", task.round, event)
        return wire.write_update(update, packed)

    def _personalize(self, worker: "Worker", task: RoundTask) -> None:
        """Best effort: whatever goes wrong is the site's own to know, and its log says it."""
        try:
            logger.info("personalize: %s", worker.personalize(task))
        except FmError as error:
            self.failed |= isinstance(error, TrainingError)
            logger.warning("personalize: %s", error)
        except Exception as error:
            self.failed = True
            logger.error("personalize: internal error: %s: %s [internal]", type(error).__name__, error)

    def _loaded(self) -> "Worker":
        """On the first task: transformers takes seconds to import, a faulty site file is worth a reply."""
        if self._worker is None:
            with quick_imports():
                from ..site.job_state import JobState
                from ..site.offer import secret
                from ..site.offer.confine import confine
                from ..site.worker import Worker

            config = load_site(self.site_file)
            confine(config.limits.memory_gib, int(os.environ.get("WORLD_SIZE", "1")))
            budget, privacy = Budget.beside(self.site_file, FILE_NAME), config.privacy

            def may_spend(cost: Protection) -> None:
                budget.check(cost.data, privacy.unit, privacy.delta, privacy.max_epsilon, cost.events)

            startup = self.site_file.parent.parent / "startup"  # of the kit whose local/ holds the site file
            self._worker = Worker(
                flare.get_site_name(),
                config,
                should_stop=should_stop,
                log=_report,
                secret=secret.read(self.site_file),
                state=JobState.at(self.job_folder),
                may_spend=may_spend,
                keys=partial(site_keys, startup),
                brought=partial(read_brought, self.config_folder),
            )
        return self._worker


@contextmanager
def quick_imports() -> Iterator[None]:
    """Import in less time, and train in less time afterwards.

    Imports make a million objects that all stay, so Python need not look for garbage among them, neither now nor after
    each round, when transformers' Trainer asks it to. And nothing here is compiled, while bitsandbytes loads torch's
    compiler on the chance that something is.
    """
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


class SiteProcesses:
    """The processes of one site. What they tell each other never leaves the machine."""

    def __init__(self) -> None:
        from ..site.training.distributed import join

        threading.Thread(target=_leave_with_launcher, args=(os.getppid(),), daemon=True).start()
        join()
        self.group = distributed.new_group(backend="gloo", timeout=timedelta(days=7))  # the next task may take a while

    def share(self, task: NamedTask | None) -> NamedTask | None:
        box = [task]
        distributed.broadcast_object_list(box, src=0, group=self.group)
        return box[0]


def _leave_with_launcher(launcher: int) -> None:
    """Each process has a session of its own and would outlive a launcher that was killed."""
    while os.getppid() == launcher:
        time.sleep(0.5)
    os._exit(1)


if __name__ == "__main__":
    main()
