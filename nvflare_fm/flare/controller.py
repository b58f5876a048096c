"""Rounds that do not need everyone: FedAvg's loop with a minimum of answers, a grace time and a deadline.

A thin subclass of NVFlare's FedAvg, which by itself stops at the first failed trainer, cannot resume, and tells every
site the others' names and sample counts.
"""

import math
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from nvflare.apis.client import Client
from nvflare.apis.controller_spec import Task
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import ReservedHeaderKey, Shareable
from nvflare.app_common.abstract.fl_model import FLModel
from nvflare.app_common.abstract.model import ModelLearnableKey
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.app_event_type import AppEventType
from nvflare.app_common.utils.fl_model_utils import FLModelUtils
from nvflare.app_common.workflows.fedavg import FedAvg
from pydantic import Field

from .. import transforms
from ..adapter import RoundTask
from ..aggregation.cohort import drawn
from ..aggregation.metrics import mean, medians
from ..aggregation.step import Memory
from ..combination import max_rank, of_round, settle
from ..config import DERIVED, RoundPlan, SiteOverrides
from ..errors import ConfigError, FmError
from ..feasible import check_best
from ..transforms.packed import pack
from ..untrusted import printable
from . import wire
from .aggregator import AdapterAggregator
from .arguments import A_YEAR, SITES, Arguments, Id, OptionalId
from .ledger import Ledger
from .persistor import REMEMBERED
from .stats import PROGRESS, let_be_seen


class TooFewAnswers(Exception):
    """A round ended with less than it needs."""


class _Arguments(Arguments):
    num_rounds: int = Field(ge=1, le=1_000_000)
    min_responses: int = Field(ge=1, le=SITES)
    deadline_s: float = Field(ge=0, le=A_YEAR)
    grace_s: float = Field(ge=0, le=A_YEAR)
    plan: Mapping[str, Any] | None
    aggregator: AdapterAggregator | None
    persistor_id: Id
    key_metric: OptionalId
    key_metric_mode: Literal["min", "max"]
    disk_offload: bool
    sites_per_round: int = Field(ge=0, le=SITES)
    sites: Mapping[str, Mapping[str, Any]] | None = Field(max_length=SITES)


_BUILT = ("plan", "aggregator", "persistor_id", "sites", "min_responses")
ROUND_SETTINGS = tuple(name for name in _Arguments.model_fields if name not in _BUILT)  # a recipe passes them on


class FedPEFT(FedAvg):
    """Runs the rounds: has sites train, has their adapters merged, keeps the last and the best.

    Args:
        num_rounds: of the whole federation, rounds before a resumed one included.
        min_responses: usable updates a round needs; with fewer the job stops and says what each site answered.
        deadline_s: a round ends after so many seconds; 0: it waits for every site.
        grace_s: a round ends so many seconds after `min_responses` usable updates are in; 0: it waits for every site.
            Who is still at a round that ended is called off, or with the aggregator's `max_staleness` trains on and
            counts in the round in which the answer comes. The first round has nothing that it could be late for.
        plan: what the sites are to do, a `config.RoundPlan`; sent with every task.
        aggregator: how their adapters become one.
        sites_per_round: so many of the connected sites are drawn for each round, by the plan's seed; 0: all.
        sites: for each site what the job asks of it differently, as `config.SiteOverrides`: its updates are held to it.
            A lora_alpha of its own must be here, as must local_steps under `normalize_steps`.
        persistor_id: of the `AdapterPersistor`.
        key_metric: decides which round's adapter is the best: its median over the sites that were sent it (see
            `aggregation.metrics`), which one site cannot move out of the others' range. Empty: no best is kept.
        key_metric_mode: "min" or "max".
        disk_offload: updates wait on the server's disk, not in its memory.

    Raises:
        ConfigError: a setting nobody knows or a combination that cannot work; the job is refused while it loads.
    """

    def __init__(
        self,
        num_rounds: int = 5,
        min_responses: int = 1,
        deadline_s: float = 0,
        grace_s: float = 0,
        plan: Mapping[str, Any] | None = None,
        aggregator: AdapterAggregator | None = None,
        persistor_id: str = "persistor",
        key_metric: str = "loss",
        key_metric_mode: str = "min",
        disk_offload: bool = False,
        sites_per_round: int = 0,
        sites: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        _Arguments.check(locals(), "controller")
        if sites_per_round and sites_per_round < min_responses:
            raise ConfigError(f"sites_per_round {sites_per_round} cannot give min_responses {min_responses} answers")
        aggregator = aggregator or AdapterAggregator()
        if aggregator.how.max_staleness and not (grace_s or deadline_s):
            raise ConfigError("max_staleness: a round that waits for every site has nobody late; set grace_s as well")
        super().__init__(
            num_rounds=num_rounds,
            persistor_id=persistor_id,
            aggregator=aggregator,
            ignore_result_error=True,
            allow_empty_global_weights=True,
            task_check_period=0.2,
            enable_tensor_disk_offload=disk_offload,
        )
        self.min_responses, self.deadline_s, self.grace_s, self.plan = (
            min_responses,
            deadline_s,
            grace_s,
            dict(plan or {}),
        )
        self.persistor_id, self.key_metric, self.key_metric_mode = persistor_id, key_metric, key_metric_mode
        self.disk_offload, self.sites_per_round, self.total_rounds = disk_offload, sites_per_round, num_rounds
        if decided := [name for name in DERIVED if name in self.plan]:
            raise ConfigError(f"plan: {decided[0]} follows from how the adapters are merged; leave it out")
        self.sites = dict(sites or {})
        self.overrides = {site: SiteOverrides.read(said, f"sites: {site}") for site, said in self.sites.items()}
        self.round_plan = settle(RoundPlan.read(self.plan, "plan"), aggregator.how, self.overrides)
        check_best(self.round_plan.task, key_metric, key_metric_mode)
        self.ledger = Ledger(0, num_rounds, [], 0)
        self.latest: dict[str, float] = {}  # the sites' median metrics known last
        self.best: float | None = None
        self._turn = threading.Lock()  # answers come in NVFlare's threads
        self._open: RoundTask | None = None  # the round that is going on
        self._asked: dict[int, tuple[RoundTask, Task]] = {}  # rounds that sites are at, as we and as NVFlare see them
        self._late: list[tuple[RoundTask, FLModel]] = []  # answers to earlier rounds, for the next one to count

    # --- one round after the other

    def run(self) -> None:
        try:
            super().run()
            if not self.abort_signal.triggered:
                self._evaluate_last()
                let_be_seen(self.fl_ctx, lambda: self.abort_signal.triggered)
        except TooFewAnswers as reason:
            let_be_seen(self.fl_ctx, lambda: self.abort_signal.triggered, failed=True)
            self.panic(str(reason))
        except FmError as reason:  # a setting that does not fit, or a disk that is full: no traceback
            self.error(str(reason))
            self.panic(reason.message)

    def load_model(self) -> FLModel:
        model = super().load_model()
        made_by = wire.read_saved(model.params, model.meta, "the persistor").round if model.params else None
        if made_by is not None:
            self.start_round = made_by + 1
            self.num_rounds = self.total_rounds - self.start_round
            self.info(f"resuming with round {self.start_round} of {self.total_rounds}")
        if self.num_rounds < 1:
            raise ConfigError(
                f"the adapter is of round {made_by} and num_rounds is {self.total_rounds}: raise num_rounds"
            )
        step, memory = self.fl_ctx.get_prop(REMEMBERED) or (None, Memory())
        if step == self.aggregator.how.step:  # what one step remembers is of no use to another
            self.aggregator.memory = memory
        return model

    def save_model(self, model: FLModel) -> None:
        """Saves the global adapter, and what the server's step remembers with it."""
        remembered = self.aggregator.how.step, self.aggregator.memory
        self.fl_ctx.set_prop(REMEMBERED, remembered, private=True, sticky=False)
        super().save_model(model)

    def sample_clients(self, num_clients: int | None = None) -> list[str]:
        """The connected sites of this round that are not at an earlier one, in the order of their names."""
        there = {client.name for client in self.engine.get_clients()}
        free = {site for site in there if not self.get_client_disconnect_time(site)} - self._behind()
        return drawn(free, self.sites_per_round, self.round_plan.seed, self.current_round)

    def get_num_standing_tasks(self) -> int:
        """None that FedAvg should wait for: `send_model` has."""
        return 0

    def send_model(
        self,
        task_name: str = AppConstants.TASK_TRAIN,
        data: FLModel | None = None,
        targets: list[str] | None = None,
        **_: Any,
    ) -> None:
        """Sends the round's task to all sites at once, and returns when the round is over."""
        saved = wire.read_saved(data.params, data.meta, "the server") if data and data.params else wire.Saved()
        plan = of_round(self.round_plan, self.aggregator.how, self.current_round)
        whole = RoundTask(plan, saved.adapter, saved.manifest, self.current_round, self.total_rounds)
        task, message = self._encoded(whole)
        kept = whole.adapter if plan.downlink else None
        self.aggregator.begin(task, max_rank(self.round_plan, self.aggregator.how), self.overrides, kept)
        self._ask(task, message, task_name, targets or self.sample_clients(), partial(self._came, task))

    def _encoded(self, task: RoundTask) -> tuple[RoundTask, FLModel]:
        """The task as the sites read it, and the message, encoded once for all of them."""
        packed = pack(task.adapter, transforms.read(task.plan.downlink, "downlink"), "the server")
        for event in packed.events:
            self.info(f"round {task.round}, to each site: {event}")
        received = replace(task, adapter=packed.adapter()) if packed.chain else task
        return received, wire.write_task(task, packed)

    def _ask(
        self, task: RoundTask, message: FLModel, name: str, sites: list[str], callback: Callable[[FLModel], bool]
    ) -> None:
        self.ledger = Ledger(task.round, self.total_rounds, sites, task.adapter.bytes_sent())
        self._show()
        self._open = task
        super().send_model(task_name=name, data=message, targets=sites, callback=callback)
        self._asked[task.round] = task, self._sent
        self._wait(self._sent)
        with self._turn:
            self._open = None
        self._end(task)

    def _prepare_task(self, *args: Any, **kwargs: Any) -> Task:
        self._sent = super()._prepare_task(*args, **kwargs)
        return self._sent

    def _wait(self, asked: Task) -> None:
        """Until all have answered, or the grace time is over or the deadline has passed."""
        began, enough_since = time.monotonic(), math.inf
        while not self.abort_signal.triggered:
            self._count_late()
            now, enough = time.monotonic(), self.ledger.usable() >= self.min_responses
            enough_since = min(enough_since, now) if enough else math.inf
            if asked.completion_status and (enough or not self._behind()):
                return
            if 0 < self.grace_s <= now - enough_since or 0 < self.deadline_s <= now - began:
                return
            time.sleep(self._task_check_period)

    def _end(self, task: RoundTask) -> None:
        """Who is still at this round or an earlier one trains on or is called off: NVFlare tells nobody that a task is
        over, so a slow site would train for nothing, and miss the next round too.
        """
        for began, asked in list(self._asked.values()):
            asked.targets = [fetched.client.name for fetched in asked.client_tasks]  # the others get the next one
            if not (_working(asked) and self._counts(began, task.round + 1)):
                self._call_off(began.round)
        self.ledger.out |= dict.fromkeys(self._behind(), "late: still at it, and counts when its answer comes")
        self.ledger.silent("no answer before the round ended")

    def _counts(self, began: RoundTask, number: int) -> bool:
        """Whether an answer to an earlier round still counts in round `number`."""
        late = number - began.round
        return bool(began.adapter) and number < self.total_rounds and late <= self.aggregator.how.max_staleness

    def _behind(self) -> set[str]:
        """Sites that are at a round that is not over for them."""
        return {site for _, asked in self._asked.values() for site in _working(asked)}

    def _call_off(self, number: int) -> None:
        """Tells each site that is still at its task, by the task's name, which nobody else was told."""
        _, asked = self._asked.pop(number)
        behind = _working(asked)
        fetched = {each.client.name: each.id for each in asked.client_tasks if each.client.name in behind}
        self.cancel_task(asked, fl_ctx=self.fl_ctx)
        if fetched and not self.abort_signal.triggered:
            over = {site: Shareable() for site in sorted(fetched)}
            for site, message in over.items():
                message.set_header(ReservedHeaderKey.TASK_ID, fetched[site])
            self.engine.multicast_aux_requests(wire.ROUND_OVER, over, 0.0, self.fl_ctx, optional=True)

    # --- one answer after the other

    def _came(self, task: RoundTask, result: FLModel) -> bool:
        with self._turn:
            if task is self._open:
                return self._aggregate_one_result(result)
            self._late.append((task, result))
            return True

    def _count_late(self) -> None:
        with self._turn:
            for began, result in self._late:
                self._aggregate_one_result(result, began)
            self._late.clear()

    def _aggregate_one_result(self, result: FLModel, began: RoundTask | None = None) -> bool:
        """Takes an answer to this round, or to the earlier one of `began`."""
        site = result.meta["client_name"]
        if reason := wire.refused(result):
            return self._leave_out(site, f"refused: {reason}")
        if began and not self._counts(began, self.ledger.round):
            return self._too_late(site)
        if reason := self._unreadable(site, partial(self.aggregator.accept_model, result, began)):
            return self._leave_out(site, reason)
        self._received_count += 1
        self.ledger.answered.append(site)
        of = f" round {began.round}" if began else f", {self.ledger.usable()} of {len(self.ledger.asked)}"
        self.info(f"round {self.ledger.round}: {site} answered{of}")
        self._show()
        return True

    def _unreadable(self, site: str, read: Callable[[], object]) -> str:
        """Why what `site` sent cannot be read; empty where it can. Nothing that a site sends stops the federation."""
        try:
            read()
        except FmError as error:
            return f"rejected: {error.message}"
        except Exception as error:
            where = "".join(traceback.format_tb(error.__traceback__))  # without its text, which may be the stranger's
            self.error(f"what {site} sent cannot be read: {printable(repr(error))}\n{where}")
            return f"rejected: malformed update ({type(error).__name__})"
        return ""

    def _accept_train_result(
        self, client_name: str, result: Shareable, fl_ctx: FLContext, is_unknown_task: bool = False
    ) -> bool:
        """NVFlare's own logs what a site gives as its return code, and where it fails ends the round of all."""
        code = result.get_return_code()
        if code != ReturnCode.OK:
            why = f"stopped: its trainer ended or could not start ({printable(code, 80)})"
        else:
            why = self._unreadable(client_name, partial(FLModelUtils.from_shareable, result))
        if why:
            return self._leave_out(client_name, why)
        return bool(super()._accept_train_result(client_name, result, fl_ctx, is_unknown_task))

    def process_result_of_unknown_task(
        self, client: Client, task_name: str, client_task_id: str, result: Shareable, fl_ctx: FLContext
    ) -> None:
        code = result.get_return_code()
        if code == ReturnCode.OK:
            self._too_late(client.name)

    def _too_late(self, site: str) -> bool:
        self.info(f"round {self.ledger.round}: {site} answered an earlier task too late for it to count")
        self.ledger.late.append(site)
        return False

    def _leave_out(self, site: str, reason: str) -> bool:
        self.warning(f"round {self.ledger.round}: {site} does not count: {reason}")
        self.ledger.out[site] = reason
        self._show()
        return False

    # --- the end of a round

    def _get_aggregated_result(self) -> FLModel:
        self._need(self.ledger.usable())
        result = super()._get_aggregated_result()
        combined = self.aggregator.combined
        self.ledger.close(combined, self.aggregator.updates)
        self.ledger.how = self.aggregator.how.model_dump(mode="json")
        self._close()
        if not combined.failed:
            self._need(len(combined.weights))
        if self.aggregator.task.adapter:
            self._consider(self.ledger.medians)
        return result

    def _need(self, usable: int) -> None:
        if usable < self.min_responses:
            self._close()
            raise TooFewAnswers(
                f"round {self.ledger.round}: {usable} of {len(self.ledger.asked)} sites gave a usable update and "
                f"min_responses is {self.min_responses}. {self.ledger.reasons()}"
            )

    def _close(self) -> None:
        self.ledger.write(Path(self.get_run_dir()))
        self.latest = self.ledger.medians or self.latest
        self._show()

    def _consider(self, metrics: Mapping[str, float]) -> None:
        """Keeps the adapter that the sites were sent if they measured it to be the best so far."""
        value = metrics.get(self.key_metric)
        if value is None or (self.best is not None and not self._better(value, self.best)):
            return
        self.info(f"the adapter sent in round {self.ledger.round} is the best so far: {self.key_metric} {value:.6g}")
        self.best = value
        self.event(AppEventType.GLOBAL_BEST_MODEL_AVAILABLE)

    def _better(self, value: float, than: float) -> bool:
        return value < than if self.key_metric_mode == "min" else value > than

    def _evaluate_last(self) -> None:
        """The adapter of the last round has not been measured yet: it may be the best."""
        last = self.fl_ctx.get_prop(AppConstants.GLOBAL_MODEL)
        saved = wire.read_saved(last[ModelLearnableKey.WEIGHTS], last[ModelLearnableKey.META], "the server")
        if not (self.key_metric and self.round_plan.evaluation.before and saved.adapter):
            return
        weights = self.aggregator.combined.weights
        task = RoundTask(self.round_plan, saved.adapter, saved.manifest, self.total_rounds, self.total_rounds)
        measured: dict[str, dict[str, float]] = {}

        def take(result: FLModel) -> bool:
            site = result.meta["client_name"]
            if reason := wire.refused(result):
                return self._leave_out(site, f"refused: {reason}")
            if reason := self._unreadable(site, lambda: measured.update({site: wire.read_metrics(result, site)})):
                return self._leave_out(site, reason)
            self.ledger.answered.append(site)
            return True

        sites = sorted(weights) if self.sites_per_round else self.sample_clients()
        self._ask(*self._encoded(task), AppConstants.TASK_VALIDATION, sites, take)
        self.ledger.sites = {site: {"before": metrics} for site, metrics in sorted(measured.items())}
        self.ledger.metrics, self.ledger.medians = mean(measured, weights), medians(measured, weights)
        self._close()
        self._consider(self.ledger.medians)
        self._tell_widgets()

    def _tell_widgets(self) -> None:
        """NVFlare's metric artifacts end with what they see after an aggregation: they see the last adapter's, too."""
        if self.ledger.metrics:
            last = FLModel(metrics=dict(self.ledger.metrics), current_round=self.ledger.round)
            self._set_metrics_aggregation_info(last)
            self.fire_event_with_data(
                AppEventType.AFTER_AGGREGATION, self.fl_ctx, AppConstants.AGGREGATION_RESULT, last
            )

    def _show(self) -> None:
        self.fl_ctx.set_prop(PROGRESS, self.ledger.progress(self.latest), private=True, sticky=True)


def _working(asked: Task) -> set[str]:
    """Sites that have not answered yet and still may."""
    done = {answered.client.name for answered in asked.client_tasks if answered.result_received_time}
    return set() if asked.completion_status else set(asked.targets) - done
