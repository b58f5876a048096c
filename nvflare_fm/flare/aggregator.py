"""The server's aggregator: hands what the sites sent to `aggregation.combine`, and hands the result back.

The same for every merge and weight rule. It loads neither the base model nor transformers.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_context import FLContext
from nvflare.app_common.abstract.fl_model import FLModel
from nvflare.app_common.aggregators.model_aggregator import ModelAggregator
from nvflare.app_opt.pt.decomposers import TensorDecomposer
from nvflare.fuel.utils import fobs
from pydantic import Field

from ..adapter import Adapter, AdapterUpdate, RoundTask
from ..aggregation.admit import check_terms, check_values
from ..aggregation.combine import Combined, combine, per_step
from ..aggregation.encrypted import combine_unread
from ..aggregation.late import trained_from
from ..aggregation.metrics import mean
from ..aggregation.noised import combine_noised
from ..aggregation.salvage import without_the_largest
from ..aggregation.step import Memory
from ..aggregation.weigh import check
from ..algebra.lora import effective_rank
from ..config import Aggregation
from ..encryption.keys import Keys
from ..errors import FmError, WireError
from ..export.folder import Saved
from ..job.settle import SettledPlan
from ..privacy import clients
from ..transforms.packed import added, check_sealed
from ..untrusted import printable
from . import wire
from .arguments import Arguments
from .ledger import received


class _Arguments(Arguments):
    settings: Mapping[str, Any] | None = Field(description="The settings of the aggregation.")


class AdapterAggregator(ModelAggregator):
    """How many adapters become one.

    Args:
        settings: a `config.Aggregation`.

    Raises:
        ConfigError: a rule or setting nobody knows; the job is refused while it loads.
    """

    def __init__(self, settings: Mapping[str, Any] | None = None) -> None:
        _Arguments.check(locals(), "aggregator")
        FLComponent.__init__(self)
        super().__init__()
        self.settings = dict(settings or {})  # as given: NVFlare writes it into the job
        self.aggregation = Aggregation.read(self.settings, "aggregator")
        self.updates: dict[str, AdapterUpdate] = {}
        self.memory = Memory()  # of the server step
        self.keys: Keys | None = None  # of the server, where it adds what it cannot read

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        super().handle_event(event_type, fl_ctx)
        if event_type == EventType.START_RUN:
            fobs.register(TensorDecomposer)

    def begin(self, task: RoundTask, settled: SettledPlan, whole: Adapter | None = None) -> None:
        """Open a round in which the sites train from `task`, a round of `settled`, whose adapter is as they receive it.

        Args:
            whole: the adapter as the server keeps it, where it is encoded for the way; None: as the sites receive it.
        """
        self.task, self.settled, self.whole = task, settled, whole
        self.reset_stats()

    def reset_stats(self) -> None:
        self.updates, self.combined = {}, Combined(self.task.adapter, self.task.manifest, {})

    def accept_model(self, model: FLModel, sent: RoundTask | None = None) -> None:
        """Check a site's update, and keep it for the merge.

        Args:
            sent: what the site was sent, if that was in an earlier round.

        Raises:
            WireError, ConfigError: names the site and what is wrong; its update does not count.
        """
        sent = sent or self.task
        names = () if self.keys else sent.adapter.descriptions()  # what is encrypted travels under other names
        update = wire.read_update(model, model.meta["client_name"], self.task.plan.labels, names, sent.plan.uplink)
        check_terms(update, self.settled.terms(update.site), sent.adapter, self.task.manifest)
        if self.keys:
            check_sealed(self.keys, update.adapter, update.site, apart=True)
        else:
            check_values(update)
        check(self.aggregation.weigh, update)
        if self.aggregation.normalize_steps:
            per_step([1.0], [update])
        self.updates[update.site] = trained_from(sent, update, self.task)

    def aggregate_model(self) -> FLModel:
        """The next global adapter; this one again where nothing can be merged, which `combined` then says."""
        task, updates = self.task, list(self.updates.values())
        combined = self._combined(updates)
        self.combined, self.memory = combined, combined.memory
        self._log(combined)
        made = Saved(combined.adapter, combined.manifest, task.round, task.plan) if combined.manifest else None
        model = wire.write_saved(made)
        model.metrics = mean(received(self.updates), combined.weights) or None
        return model

    def _combined(self, updates: Sequence[AdapterUpdate]) -> Combined:
        task, aggregation, rank = self.task, self.settled.aggregation, self.settled.global_rank
        private = aggregation.client_privacy

        def merge(updates: Sequence[AdapterUpdate]) -> Combined:
            if self.keys:
                return combine_unread(task.adapter, task.manifest, updates, aggregation, partial(added, self.keys))
            if private.asked and task.manifest:
                noise = clients.checked(private, task.total_rounds, task.adapter)
                given = task.adapter, task.manifest, updates, aggregation, noise, task.round, rank
                return combine_noised(*given, self.memory, self.whole)
            return combine(task.adapter, task.manifest, updates, aggregation, rank, self.memory, self.whole)

        try:
            return merge(updates)
        except Exception as error:  # what no check foresaw must not end the job
            why = error.message if isinstance(error, FmError) else f"{type(error).__name__}: {printable(str(error))}"
            log = self.logger.error if isinstance(error, FmError) else self.logger.exception
            log(f"round {task.round}: the updates cannot be merged as they are ({why})")
        try:
            if private.asked:  # a choice by size would be one that no noise covers
                raise WireError(f"the round cannot be merged: {why}", code="merge_failed")
            return without_the_largest(merge, updates, why)
        except FmError as error:
            self.logger.error(f"round {task.round}: {error.message}; the adapter stays as it was")
            as_it_was = self.whole or task.adapter
            return Combined(as_it_was, task.manifest, {}, memory=self.memory, failed=error.message)

    def _log(self, combined: Combined) -> None:
        if combined.failed:
            return
        shares = ", ".join(f"{site} {weight:.4f}" for site, weight in sorted(combined.weights.items()))
        size = "" if combined.step_size is None else f"; server step {combined.step_size:.2f}"
        self.logger.info(f"round {self.task.round}: weights {shares}{size}")
        if combined.noised:
            self.logger.info(f"round {self.task.round}: {combined.noised}")
        for site, reason in sorted(combined.refused.items()):
            self.logger.warning(f"round {self.task.round}: {site} is left out: {reason}")
        for site, verdict in sorted(combined.guarded.items()):
            self.logger.warning(f"round {self.task.round}: {site}: {verdict}")
        for site, counted in sorted(combined.held.items()):
            self.logger.warning(f"round {self.task.round}: of {site} {counted}")
        if combined.spectrum:
            ranks = [effective_rank(torch.tensor(values)) for values in combined.spectrum.values()]
            self.logger.info(
                f"round {self.task.round}: effective rank {sum(ranks) / len(ranks):.2f} on average, "
                f"{min(ranks):.2f} to {max(ranks):.2f} over the layers"
            )
        if lost := combined.energy_lost:
            worst = max(lost, key=lambda layer: lost[layer])
            average = sum(lost.values()) / len(lost)
            self.logger.info(
                f"round {self.task.round}: shortening to rank {self.settled.global_rank} lost {average:.2e} of the "
                f"energy on average, {lost[worst]:.2e} in {worst}"
            )
