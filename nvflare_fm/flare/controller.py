"""Rounds that do not need everyone: a minimum of answers, a grace time, a deadline, late answers.

Built on NVFlare's ModelController. Its FedAvg stops at the first failed trainer, cannot resume, and tells every site
the others' names and sample counts.
"""

import math
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from nvflare.apis.client import Client
from nvflare.apis.controller_spec import Task
from nvflare.apis.fl_constant import FLContextKey, ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.app_common.abstract.fl_model import FLModel
from nvflare.app_common.abstract.model import ModelLearnableKey, make_model_learnable
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.app_event_type import AppEventType
from nvflare.app_common.utils.fl_model_utils import FLModelUtils
from nvflare.app_common.utils.tensor_disk_offload_context import (
    cleanup_tensor_disk_offload,
    setup_tensor_disk_offload,
)
from nvflare.app_common.workflows.model_controller import ModelController
from pydantic import Field

from .. import transforms
from ..adapter import Adapter, RoundTask
from ..aggregation.cohort import drawn
from ..aggregation.needed import needed
from ..aggregation.step import Memory
from ..config import SITES, RoundPlan, RoundSettings, SiteOverrides
from ..errors import ConfigError, FmError
from ..export.folder import Saved
from ..job.feasible import check_best, check_fewest
from ..job.settle import settle
from ..privacy import clients
from ..record.reason import Kind, Reason, Verdict
from ..transforms.packed import pack
from ..untrusted import printable
from . import wire
from .aggregator import AdapterAggregator
from .arguments import Arguments, Id, taking
from .encryption import server_keys
from .ledger import Ledger
from .persistor import REMEMBERED
from .standing import SentTask, StandingTasks, call_offs
from .stats import PROGRESS, let_be_seen

POLL_S = 0.2  # how often a round looks whether it is over


class TooFewAnswers(Exception):
    """A round ended with less than it needs."""


class _Arguments(Arguments, RoundSettings):
    plan: Mapping[str, Any] | None = Field(None, description="What the sites are to do; sent with every task.")
    aggregator: AdapterAggregator | None = Field(None, description="How the sites' adapters become one.")
    persistor_id: Id = Field("persistor", description="Id of the AdapterPersistor among the components.")
    sites: Mapping[str, Mapping[str, Any]] | None = Field(
        None,
        max_length=SITES,
        description="Rank, lora_alpha and local_steps of single sites, by name. Their updates must match.",
    )


class FedPEFT(ModelController):
    """Runs the rounds: has sites train, has their adapters merged, keeps the last and the best.

    Args:
        plan: what the sites are to do, a `config.RoundPlan`; sent with every task.
        aggregator: how their adapters become one.
        persistor_id: of the `AdapterPersistor`.
        sites: for each site what the job asks of it differently, as `config.SiteOverrides`: its updates are held to it.
            A lora_alpha of its own must be here, as must local_steps under `normalize_steps`.
        settings: those of `config.RoundSettings` (num_rounds, grace_s, key_metric, …).

    Raises:
        ConfigError: a setting nobody knows or a combination that cannot work; the job is refused while it loads.
    """

    @taking(RoundSettings)
    def __init__(
        self,
        plan: Mapping[str, Any] | None = None,
        aggregator: AdapterAggregator | None = None,
        persistor_id: str = "persistor",
        sites: Mapping[str, Mapping[str, Any]] | None = None,
        **settings: Any,
    ) -> None:
        built = {"plan": plan, "aggregator": aggregator, "persistor_id": persistor_id, "sites": sites}
        given = _Arguments.read({**built, **settings}, "controller")
        rounds = {name: getattr(given, name) for name in RoundSettings.model_fields}
        if given.sites_per_round and given.sites_per_round < given.min_responses:
            raise ConfigError(
                f"sites_per_round {given.sites_per_round} cannot give min_responses {given.min_responses} answers",
                code="too_few_sites",
            )
        aggregator = aggregator or AdapterAggregator()
        check_fewest(given.sites_per_round, needed(aggregator.aggregation).fewest)
        if aggregator.aggregation.max_staleness and not (given.grace_s or given.deadline_s):
            raise ConfigError(
                "max_staleness: a round that waits for every site has nobody late; set grace_s as well",
                code="nobody_late",
            )
        super().__init__(
            persistor_id=persistor_id,
            ignore_result_error=True,
            allow_empty_global_weights=True,
            task_check_period=POLL_S,
        )
        self.__dict__.update(rounds)  # by their names: NVFlare writes them into the job
        self.plan, self.persistor_id, self.aggregator = dict(plan or {}), persistor_id, aggregator
        self.sites = dict(sites or {})
        overrides = {site: SiteOverrides.read(said, f"sites: {site}") for site, said in self.sites.items()}
        self.settled = settle(RoundPlan.read(self.plan, "plan"), aggregator.aggregation, overrides)
        check_best(self.settled.plan.task, given.key_metric, given.key_metric_mode)
        if aggregator.aggregation.client_privacy.asked and given.key_metric:
            raise ConfigError(
                "client_privacy does not go with a best round: which one it is follows from metrics that no noise "
                'covers; set key_metric = ""',
                code="client_best",
            )
        self.ledger = Ledger(0, given.num_rounds, [], 0)
        self.latest: Mapping[str, float] = {}  # the sites' median metrics known last
        self.scaled: Mapping[str, Verdict] = {}  # what the guards said of the round that was merged last
        self.best: float | None = None
        self._turn = threading.Lock()  # answers come in NVFlare's threads
        self._open: RoundTask | None = None  # the round that is going on
        self.standing = StandingTasks(aggregator.aggregation.max_staleness, given.num_rounds)
        self._late: list[tuple[RoundTask, FLModel]] = []  # answers to earlier rounds, for the next one to count

    # --- one round after the other

    def run(self) -> None:
        offload = setup_tensor_disk_offload(self.engine, self.disk_offload, self.fl_ctx.get_job_id())
        try:
            self._run_rounds()
            if not self.abort_signal.triggered:
                self._evaluate_last()
                self._have_them_personalize()
                let_be_seen(self.fl_ctx, lambda: self.abort_signal.triggered)
        except TooFewAnswers as reason:
            let_be_seen(self.fl_ctx, lambda: self.abort_signal.triggered, failed=True)
            self.panic(str(reason))
        except FmError as reason:  # a setting that does not fit, or a disk that is full: no traceback
            self.error(str(reason))
            self.panic(reason.message)
        finally:
            cleanup_tensor_disk_offload(self.engine, offload)

    def _run_rounds(self) -> None:
        if self.settled.encrypts:
            startup = Path(self.engine.get_workspace().get_startup_kit_dir())
            self.aggregator.keys = server_keys(startup)
        check_fewest(len(self.engine.get_clients()), needed(self.settled.aggregation).fewest)
        model = self.load_model()
        for number in range(self._first_round(model), self.num_rounds):
            self.set_fl_context(FLModel(params={}, current_round=number, total_rounds=self.num_rounds))
            self.event(AppEventType.ROUND_STARTED)
            self._train(model, number)
            if self.abort_signal.triggered:
                return
            self.event(AppEventType.BEFORE_AGGREGATION)
            model = self._merged()
            self.fire_event_with_data(
                AppEventType.AFTER_AGGREGATION, self.fl_ctx, AppConstants.AGGREGATION_RESULT, model
            )
            learnable = make_model_learnable(weights=model.params, meta_props=model.meta)
            self.fl_ctx.set_prop(AppConstants.GLOBAL_MODEL, learnable, private=True, sticky=True)
            self.save_model(model)

    def _first_round(self, model: FLModel) -> int:
        """The round after the one that made `model`, where the job resumes; what the step remembered comes with it."""
        saved = wire.read_saved(model.params, model.meta, "the persistor")
        if saved and saved.adapter.sealed != self.settled.encrypts:
            raise ConfigError(
                "a job that encrypts what sites send starts afresh or from an encrypted adapter, and no other job does "
                "from one that is encrypted; leave initial_adapter out, or change uplink",
                code="other_start",
            )
        if (private := self.settled.aggregation.client_privacy).asked:
            clients.checked(private, self.num_rounds, saved.adapter if saved else None)
            self._check_alone()
        made_by = saved.round if saved else None
        first = 0 if made_by is None else made_by + 1
        if first >= self.num_rounds:
            raise ConfigError(
                f"the adapter is of round {made_by} and num_rounds is {self.num_rounds}: raise num_rounds",
                code="no_round_left",
            )
        if first:
            self.info(f"resuming with round {first} of {self.num_rounds}")
        step, memory = self.fl_ctx.get_prop(REMEMBERED) or (None, Memory())
        if step == self.settled.aggregation.step:  # what one step remembers is of no use to another
            self.aggregator.memory = memory
        return first

    def _check_alone(self) -> None:
        """Holds the job to this workflow: one that sends the sites' own adapters around would do so without noise.

        Raises:
            ConfigError: the job has another.
        """
        runner = self.fl_ctx.get_prop(FLContextKey.RUNNER)
        if any(workflow.controller is not self for workflow in runner.config.workflows):
            raise ConfigError(
                "client_privacy does not go with another workflow, such as cross-site evaluation: no noise covers what "
                "that sends; leave it out",
                code="client_alone",
            )

    def save_model(self, model: FLModel) -> None:
        """Saves the global adapter, and what the server's step remembers with it."""
        remembered = self.settled.aggregation.step, self.aggregator.memory
        self.fl_ctx.set_prop(REMEMBERED, remembered, private=True, sticky=False)
        super().save_model(model)

    def _free_sites(self, number: int) -> list[str]:
        """The sites of a round: of those that are free, all or as many as are drawn; in the order of their names."""
        return drawn(self._free(), self.sites_per_round, self.settled.plan.seed, number)

    def _free(self) -> set[str]:
        """The connected sites that are not at an earlier round."""
        there = {client.name for client in self.engine.get_clients()}
        return {site for site in there if not self.get_client_disconnect_time(site)} - self.standing.working()

    def _train(self, model: FLModel, number: int) -> None:
        """Has the sites train from `model`; returns when the round is over."""
        saved = wire.read_saved(model.params, model.meta, "the server")
        adapter, manifest = (saved.adapter, saved.manifest) if saved else (Adapter(), None)
        whole = RoundTask(self.settled.of_round(number), adapter, manifest, number, self.num_rounds)
        task, message = self._encoded(whole)
        self.aggregator.begin(task, self.settled, whole.adapter if whole.plan.downlink else None)
        self._ask(task, message, AppConstants.TASK_TRAIN, self._free_sites(number), partial(self._came, task))

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
        """Sends a task to all sites at once, and returns when the round is over."""
        self.ledger = Ledger(task.round, self.num_rounds, sites, task.adapter.bytes_sent())
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

    def _take(self, result: FLModel, trained_in: RoundTask | None = None) -> bool:
        """Takes an answer to this round, or to the earlier round `trained_in`."""
        site = result.meta["client_name"]
        if reason := wire.refused(result):
            return self._leave_out(site, "refused", reason)
        if trained_in and not self.standing.counts(trained_in, self.ledger.round):
            return self._too_late(site)
        if reason := self._unreadable(site, partial(self.aggregator.accept_model, result, trained_in)):
            return self._leave_out(site, "rejected", reason)
        self.ledger.answered.append(site)
        of = f" round {trained_in.round}" if trained_in else f", {self.ledger.usable()} of {len(self.ledger.asked)}"
        self.info(f"round {self.ledger.round}: {site} answered{of}")
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

    def _merged(self) -> FLModel:
        """The next global adapter, made of what has been accepted."""
        self._need(self.ledger.usable())
        model = self.aggregator.aggregate_model()
        self._sign(model)
        combined = self.aggregator.combined
        self.ledger.close(combined, self.aggregator.updates, self.settled.aggregation.model_dump(mode="json"))
        self._close()
        if not combined.failed:
            self._need(len(combined.weights))
        if self.aggregator.task.adapter:
            self._consider(self.ledger.line.medians)
        return model

    def _sign(self, model: FLModel) -> None:
        """What NVFlare's writer of metric artifacts reads beside the metrics."""
        model.current_round = self.ledger.round
        model.meta = (model.meta or {}) | {
            "current_round": self.ledger.round,
            "nr_aggregated": len(self.ledger.answered),
            AppConstants.METRICS_AGGREGATION_INFO: {
                "metric_source": "custom_aggregator_flmodel_metrics",
                "use_contribution_sites": False,
            },
        }

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
        """The adapter of the last round has not been measured yet: it may be the best. Where only the sites can read
        it, they are sent it for good.
        """
        saved = self._last_saved()
        measures = bool(self.key_metric) and self.settled.plan.evaluation.before
        if not saved or not (measures or saved.adapter.sealed):
            return
        weights = self.aggregator.combined.weights
        task = RoundTask(self.settled.plan, saved.adapter, saved.manifest, self.num_rounds, self.num_rounds)
        measured: dict[str, dict[str, float]] = {}

        def take(result: FLModel) -> bool:
            site = result.meta["client_name"]
            if reason := wire.refused(result):
                return self._leave_out(site, "refused", reason)
            if reason := self._unreadable(site, lambda: measured.update({site: wire.read_metrics(result, site)})):
                return self._leave_out(site, "rejected", reason)
            self.ledger.answered.append(site)
            return True

        all_sites = saved.adapter.sealed or not self.sites_per_round
        sites = sorted(self._free() if all_sites else weights)
        self._ask(*self._encoded(task), AppConstants.TASK_VALIDATION, sites, take)
        self.ledger.measured(measured, weights)
        self._close()
        if measures:
            self._consider(self.ledger.line.medians)
        self._tell_widgets()
        if self.best is None:
            self.info(
                f"no site tells {self.key_metric}, so no round was chosen as the best: the last adapter is the result"
            )

    def _last_saved(self) -> Saved | None:
        last = self.fl_ctx.get_prop(AppConstants.GLOBAL_MODEL)
        return wire.read_saved(last[ModelLearnableKey.WEIGHTS], last[ModelLearnableKey.META], "the server")

    def _have_them_personalize(self) -> None:
        """Has each site train on for itself, and waits as long as for a round. What comes of it stays at the sites, and
        nothing that they answer, or that goes wrong, changes the job.
        """
        try:
            self._personalize()
        except FmError as error:
            self.warning(f"personalize: {error}")

    def _personalize(self) -> None:
        sites, saved = sorted(self._free()), self._last_saved()
        if not (self.settled.plan.personalize.steps and sites and saved) or self.abort_signal.triggered:
            return
        task = RoundTask(self.settled.plan, saved.adapter, saved.manifest, self.num_rounds, self.num_rounds)

        def take(result: FLModel) -> bool:
            site = result.meta["client_name"]
            if reason := wire.refused(result):
                return self._leave_out(site, "refused", reason)
            self.ledger.answered.append(site)
            return True

        self._ask(*self._encoded(task), AppConstants.TASK_TRAIN, sites, take)
        done = len(self.ledger.answered)
        self.info(f"{done} of {len(sites)} sites trained on for themselves, as far as they could")

    def _tell_widgets(self) -> None:
        """NVFlare's metric artifacts end with what they see after an aggregation: they see the last adapter's, too."""
        if metrics := self.ledger.line.metrics:
            last = FLModel(metrics=dict(metrics))
            self._sign(last)
            self.fire_event_with_data(
                AppEventType.AFTER_AGGREGATION, self.fl_ctx, AppConstants.AGGREGATION_RESULT, last
            )

    def _show(self) -> None:
        self.fl_ctx.set_prop(PROGRESS, self.ledger.progress(self.latest, self.scaled), private=True, sticky=True)


def _is_ok(code: object) -> bool:
    """What a site gives as its return code may be anything, also an array, whose comparison has no truth value."""
    return type(code) is str and code == ReturnCode.OK
