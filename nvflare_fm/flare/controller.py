"""The workflow that trains: round after round the sites train, and their adapters are merged."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from nvflare.apis.fl_constant import FLContextKey
from nvflare.app_common.abstract.fl_model import FLModel
from nvflare.app_common.abstract.model import ModelLearnableKey, make_model_learnable
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.app_event_type import AppEventType
from nvflare.app_common.utils.tensor_disk_offload_context import (
    cleanup_tensor_disk_offload,
    setup_tensor_disk_offload,
)
from pydantic import Field

from .. import transforms
from ..adapter import Adapter, AdapterUpdate, RoundTask
from ..aggregation.admit import Terms, check_terms, check_values
from ..aggregation.cohort import drawn
from ..aggregation.head_start import Start, check_sums, head_start
from ..aggregation.needed import needed
from ..aggregation.step import Memory
from ..config import SITES, RoundPlan, RoundSettings, SiteOverrides
from ..errors import ConfigError, FmError
from ..export.folder import Saved
from ..job.feasible import check_best, check_fewest
from ..job.settle import settle
from ..job.synthetic import check_labels
from ..privacy import clients
from ..record.reason import Reason
from ..synthesis.features import NAMES
from ..transforms.packed import pack
from ..untrusted import printable
from . import wire
from .aggregator import AdapterAggregator
from .arguments import Arguments, Id, taking
from .encryption import server_keys
from .persistor import REMEMBERED
from .rounds import Rounds


class _Arguments(Arguments, RoundSettings):
    plan: Mapping[str, Any] | None = Field(None, description="What the sites are to do; sent with every task.")
    aggregator: AdapterAggregator | None = Field(None, description="How the sites' adapters become one.")
    persistor_id: Id = Field("persistor", description="Id of the AdapterPersistor among the components.")
    sites: Mapping[str, Mapping[str, Any]] | None = Field(
        None,
        max_length=SITES,
        description="Rank, lora_alpha and local_steps of single sites, by name. Their updates must match.",
    )


class FedPEFT(Rounds):
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
        super().__init__(persistor_id, given.num_rounds, aggregator.aggregation.max_staleness)
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
        self.best: float | None = None
        self._sums: dict[str, AdapterUpdate] = {}  # of the sites, before the first round
        self._apart: dict[str, Reason] = {}  # sites that the job goes on without

    # --- one round after the other

    def _work(self) -> None:
        offload = setup_tensor_disk_offload(self.engine, self.disk_offload, self.fl_ctx.get_job_id())
        try:
            self._run_rounds()
            if not self.abort_signal.triggered:
                self._evaluate_last()
                self._have_them_personalize()
        finally:
            cleanup_tensor_disk_offload(self.engine, offload)

    def _run_rounds(self) -> None:
        if self.settled.encrypts:
            startup = Path(self.engine.get_workspace().get_startup_kit_dir())
            self.aggregator.keys = server_keys(startup)
        check_fewest(len(self.engine.get_clients()), needed(self.settled.aggregation).fewest)
        if self.settled.plan.synthetic.asked:  # before a round is lost: the sites have the same file
            check_labels(self.settled.plan, self._brought(self.settled.plan.synthetic.digest))
        model = self.load_model()
        first = self._first_round(model)
        start = None if model.params else self._head_start()
        if self.abort_signal.triggered:
            return
        for number in range(first, self.num_rounds):
            self.set_fl_context(FLModel(params={}, current_round=number, total_rounds=self.num_rounds))
            self.event(AppEventType.ROUND_STARTED)
            self._train(model, number, start)
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
        return drawn(self._free() - self._apart.keys(), self.sites_per_round, self.settled.plan.seed, number)

    def _head_start(self) -> Start | None:
        """The start of the head, from sums over the sites' features; nothing where no site tells, or none is asked."""
        if self.settled.plan.head_start != "features":
            return None
        task, self._sums = RoundTask(self.settled.summing, total_rounds=self.num_rounds), {}
        sites = sorted(self._free())
        self._ask(task, wire.write_task(task), AppConstants.TASK_TRAIN, sites, partial(self._came, task))
        if self.abort_signal.triggered:
            return None
        if not self._sums:
            self.info(
                "no site tells of its features (privacy.label_statistics), so the head starts from random numbers"
            )
            return None
        updates, self._sums = [*self._sums.values()], {}
        if not (start := self._fitted(updates)):
            return None
        for site, reason in start.refused.items():
            self.warning(f"of {site} no features count: {reason}")
        self._apart = {site: start.refused[site] for site in start.mislabelled}
        counted = ", ".join(f"{site} {share:.3g}" for site, share in start.shares.items())
        self.info(f"the head starts from features; a row counts so often, by site: {counted}")
        return start

    def _fitted(self, updates: Sequence[AdapterUpdate]) -> Start | None:
        """The head that follows from the sites' sums; nothing where none does: no sums end the job."""
        try:
            return head_start(updates)
        except FmError as error:
            why = error.message
        except Exception as error:  # what no check foresaw must not end the job
            why = f"{type(error).__name__}: {printable(str(error))}"
        self.warning(f"no head follows from the sites' features ({why}), so it starts from random numbers")
        return None

    def _train(self, model: FLModel, number: int, start: Start | None) -> None:
        """Has the sites train from `model`, or where there is none from `start`; returns when the round is over."""
        saved = wire.read_saved(model.params, model.meta, "the server")
        adapter, manifest = (saved.adapter, saved.manifest) if saved else (Adapter(), None)
        whole = RoundTask(self.settled.of_round(number), adapter, manifest, number, self.num_rounds)
        task, message = self._encoded(whole)
        if start and not saved:
            message = wire.write_task(replace(whole, adapter=start.adapter, manifest=start.manifest))
        self.aggregator.begin(task, self.settled, whole.adapter if whole.plan.downlink else None)
        self._ask(task, message, AppConstants.TASK_TRAIN, self._free_sites(number), partial(self._came, task))
        self.ledger.out |= self._apart

    def _encoded(self, task: RoundTask) -> tuple[RoundTask, FLModel]:
        """The task as the sites read it, and the message, encoded once for all of them."""
        packed = pack(task.adapter, transforms.read(task.plan.downlink, "downlink"), "the server")
        for event in packed.events:
            self.info(f"round {task.round}, to each site: {event}")
        received = replace(task, adapter=packed.adapter()) if packed.chain else task
        return received, wire.write_task(task, packed)

    def _take(self, result: FLModel, trained_in: RoundTask | None = None) -> bool:
        site = result.meta["client_name"]
        if (asked := trained_in or self._open) and asked.plan.sums:
            return self._too_late(site) if trained_in else self._tells(result, site)
        if trained_in and not (wire.refused(result) or self.standing.counts(trained_in, self.ledger.round)):
            return self._too_late(site)
        if not self._counted(result, partial(self.aggregator.accept_model, result, trained_in)):
            return False
        of = f" round {trained_in.round}" if trained_in else f", {self.ledger.usable()} of {len(self.ledger.asked)}"
        self.info(f"round {self.ledger.round}: {site} answered{of}")
        return True

    def _tells(self, result: FLModel, site: str) -> bool:
        """Whether a site told of its features; that it keeps them to itself is nothing to worry about."""
        if reason := wire.refused(result):
            self.info(f"{site} tells nothing of its features: {reason}")
            self.ledger.out[site] = Reason.of("refused", reason)
            return False
        return self._counted(result, partial(self._take_sums, result, site))

    def _take_sums(self, result: FLModel, site: str) -> None:
        settled = self.settled
        update = wire.read_update(result, site, settled.plan.labels, NAMES)
        terms = Terms(settled.plan.task, str(settled.plan.peft["method"]), settled.plan.fingerprint, pairs=False)
        check_terms(update, terms, Adapter(), None)
        check_values(update)
        check_sums(update, len(settled.plan.labels))
        self._sums[site] = update

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
            return self._counted(result, lambda: measured.update({site: wire.read_metrics(result, site)}))

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
        self._ask(*self._encoded(task), AppConstants.TASK_TRAIN, sites, self._counted)
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
