"""A round that does not need everyone: a minimum of answers, a grace time, a deadline, late answers.

Built on NVFlare's ModelController. Its FedAvg stops at the first failed trainer, cannot resume, and tells every site
the others' names and sample counts.
"""

import math
import threading
import time
import traceback
from abc import abstractmethod
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from nvflare.apis.client import Client
from nvflare.apis.controller_spec import Task
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.app_common.abstract.fl_model import FLModel
from nvflare.app_common.utils.fl_model_utils import FLModelUtils
from nvflare.app_common.workflows.model_controller import ModelController

from ..adapter import RoundTask
from ..errors import FmError
from ..job.synthetic import read_brought
from ..record.reason import Kind, Reason, Verdict
from ..synthesis.candidates import CandidateSet
from ..untrusted import printable
from . import wire
from .ledger import Ledger
from .standing import SentTask, StandingTasks, call_offs
from .stats import PROGRESS, let_be_seen

POLL_S = 0.2  # how often a round looks whether it is over


class TooFewAnswers(Exception):
    """A round ended with less than it needs."""


class Rounds(ModelController):
    """What all our workflows share: ask the sites, wait for as many as are needed, and say why the others do not count.

    Args:
        persistor_id: of the job's `AdapterPersistor`; empty: it has none.
        num_rounds: that the job has.
        max_staleness: rounds that an answer may be late and still count.
    """

    num_rounds: int
    min_responses: int
    grace_s: float
    deadline_s: float

    def __init__(self, persistor_id: str, num_rounds: int, max_staleness: int = 0) -> None:
        super().__init__(
            persistor_id=persistor_id,
            ignore_result_error=True,
            allow_empty_global_weights=True,
            task_check_period=POLL_S,
        )
        self.ledger = Ledger(0, num_rounds, [], 0)
        self.latest: Mapping[str, float] = {}  # the sites' median metrics known last
        self.scaled: Mapping[str, Verdict] = {}  # what the guards said of the round that was merged last
        self._turn = threading.Lock()  # answers come in NVFlare's threads
        self._open: RoundTask | None = None  # the round that is going on
        self.standing = StandingTasks(max_staleness, num_rounds)
        self._late: list[tuple[RoundTask, FLModel]] = []  # answers to earlier rounds, for the next one to count

    @abstractmethod
    def _work(self) -> None:
        """Does what the workflow is for.

        Raises:
            TooFewAnswers, FmError: it cannot go on, and the job fails.
        """

    def run(self) -> None:
        try:
            self._work()
            if not self.abort_signal.triggered:
                let_be_seen(self.fl_ctx, lambda: self.abort_signal.triggered)
        except TooFewAnswers as reason:
            let_be_seen(self.fl_ctx, lambda: self.abort_signal.triggered, failed=True)
            self.panic(str(reason))
        except FmError as reason:  # a setting that does not fit, or a disk that is full: no traceback
            self.error(str(reason))
            self.panic(reason.message)

    @abstractmethod
    def _take(self, result: FLModel, trained_in: RoundTask | None = None) -> bool:
        """Takes an answer to this round, or to the earlier round `trained_in`."""

    def _brought(self, digest: str) -> CandidateSet:
        """The synthetic rows that the job brings.

        Raises:
            ConfigError: it brings none, or others.
        """
        workspace, job = self.engine.get_workspace(), self.fl_ctx.get_job_id()
        return read_brought(Path(workspace.get_app_config_dir(job)), digest)

    def _free(self) -> set[str]:
        """The connected sites that are not at an earlier round."""
        there = {client.name for client in self.engine.get_clients()}
        return {site for site in there if not self.get_client_disconnect_time(site)} - self.standing.working()

    def _ask(
        self, task: RoundTask, message: FLModel, name: str, sites: list[str], callback: Callable[[FLModel], bool]
    ) -> None:
        """Sends a task to all sites at once, and returns when the round is over."""
        self.ledger = Ledger(task.round, self.num_rounds, sites, wire.bytes_of(message))
        self._show()
        self._open = task
        self.send_model(task_name=name, data=message, targets=sites, callback=callback)
        self.standing.add(SentTask(task, self._last_prepared))
        self._wait(self._last_prepared)
        with self._turn:
            self._open = None
        for over in self.standing.end_round(task.round):
            self._call_off(over)
        late = Reason("late", "still training; counts when its answer comes")
        self.ledger.out |= dict.fromkeys(self.standing.working(), late)
        self.ledger.silent("no answer before the round ended")

    def _prepare_task(self, *args: Any, **kwargs: Any) -> Task:
        """NVFlare keeps the task that `send_model` makes to itself."""
        self._last_prepared = super()._prepare_task(*args, **kwargs)
        return self._last_prepared

    def _wait(self, sent: Task) -> None:
        """Until all have answered, or the grace time is over or the deadline has passed."""
        started, enough_since = time.monotonic(), math.inf
        while not self.abort_signal.triggered:
            self._count_late()
            now, enough = time.monotonic(), self.ledger.usable() >= self.min_responses
            enough_since = min(enough_since, now) if enough else math.inf
            if sent.completion_status and (enough or not self.standing.working()):
                return
            if 0 < self.grace_s <= now - enough_since or 0 < self.deadline_s <= now - started:
                return
            time.sleep(POLL_S)

    def _call_off(self, task: Task) -> None:
        messages = call_offs(task)
        self.cancel_task(task, fl_ctx=self.fl_ctx)
        if messages and not self.abort_signal.triggered:
            self.engine.multicast_aux_requests(wire.ROUND_OVER, messages, 0.0, self.fl_ctx, optional=True)

    # --- one answer after the other

    def _came(self, task: RoundTask, result: FLModel) -> bool:
        with self._turn:
            if task is self._open:
                return self._take(result)
            self._late.append((task, result))
            return True

    def _count_late(self) -> None:
        with self._turn:
            for trained_in, result in self._late:
                self._take(result, trained_in)
            self._late.clear()

    def _counted(self, result: FLModel, read: Callable[[], object] = lambda: None) -> bool:
        """Whether an answer counts: it is no refusal, and can be read."""
        site = result.meta["client_name"]
        if reason := wire.refused(result):
            return self._leave_out(site, "refused", reason)
        if reason := self._unreadable(site, read):
            return self._leave_out(site, "rejected", reason)
        self.ledger.answered.append(site)
        self._show()
        return True

    def _unreadable(self, site: str, read: Callable[[], object]) -> str:
        """Why what `site` sent cannot be read; empty where it can. Nothing that a site sends stops the federation."""
        try:
            read()
        except FmError as error:
            return error.message
        except Exception as error:
            where = "".join(traceback.format_tb(error.__traceback__))  # without its text, which may be the stranger's
            self.error(f"what {site} sent cannot be read: {printable(repr(error))}\n{where}")
            return f"malformed update ({type(error).__name__}) [malformed]"
        return ""

    def _accept_train_result(
        self, client_name: str, result: Shareable, fl_ctx: FLContext, is_unknown_task: bool = False
    ) -> bool:
        """NVFlare's own logs what a site gives as its return code, and where it fails ends the round of all."""
        code = result.get_return_code()
        if not _is_ok(code):
            why = f"its trainer ended or could not start ({printable(code, 80)})"
            return self._leave_out(client_name, "stopped", why)
        if why := self._unreadable(client_name, partial(FLModelUtils.from_shareable, result)):
            return self._leave_out(client_name, "rejected", why)
        return bool(super()._accept_train_result(client_name, result, fl_ctx, is_unknown_task))

    def process_result_of_unknown_task(
        self, client: Client, task_name: str, client_task_id: str, result: Shareable, fl_ctx: FLContext
    ) -> None:
        if _is_ok(result.get_return_code()):
            self._too_late(client.name)

    def _too_late(self, site: str) -> bool:
        self.info(f"round {self.ledger.round}: {site} answered an earlier task too late for it to count")
        self.ledger.late.append(site)
        return False

    def _leave_out(self, site: str, kind: Kind, message: str) -> bool:
        reason = self.ledger.out[site] = Reason.of(kind, message)
        self.warning(f"round {self.ledger.round}: {site} does not count: {reason}")
        self._show()
        return False

    # --- the end of a round

    def _need(self, usable: int) -> None:
        if usable < self.min_responses:
            self._close()
            raise TooFewAnswers(
                f"round {self.ledger.round}: {usable} of {len(self.ledger.asked)} sites gave a usable update and "
                f"min_responses is {self.min_responses}. {self.ledger.reasons()}"
            )

    def _close(self) -> None:
        self.ledger.write(Path(self.get_run_dir()))
        line = self.ledger.line
        self.latest, self.scaled = line.medians or self.latest, line.scaled if line.trained else self.scaled
        self._show()

    def _show(self) -> None:
        self.fl_ctx.set_prop(PROGRESS, self.ledger.progress(self.latest, self.scaled), private=True, sticky=True)


def _is_ok(code: object) -> bool:
    """What a site gives as its return code may be anything, also an array, whose comparison has no truth value."""
    return type(code) is str and code == ReturnCode.OK
