"""The server's aggregator: hands what the sites sent to `aggregation.combine`, and hands the result back.

The same for every merge and weight rule. It loads neither the base model nor transformers.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_context import FLContext
from nvflare.app_common.abstract.fl_model import FLModel
from nvflare.app_common.aggregators.model_aggregator import ModelAggregator
from nvflare.app_opt.pt.decomposers import TensorDecomposer
from nvflare.fuel.utils import fobs

from ..adapter import AdapterUpdate, Manifest, RoundTask
from ..aggregation.cohort import check_values
from ..aggregation.combine import Combined, combine, per_step
from ..aggregation.late import trained_from
from ..aggregation.step import Memory
from ..aggregation.weigh import check
from ..config import Aggregation, RoundPlan, Rule
from ..lora import effective_rank
from . import wire
from .ledger import mean, received

_OF_ONE_SITE = ("r", "lora_alpha", "rank_pattern", "alpha_pattern")


class AdapterAggregator(ModelAggregator):
    """How many adapters become one. The arguments are those of `config.Aggregation`.

    Raises:
        ConfigError: a rule or setting nobody knows; the job is refused while it loads.
    """

    def __init__(
        self,
        merge: str = "exact",
        weigh: Sequence[Rule] = ("uniform",),
        max_weight: float = 1.0,
        normalize_steps: bool = False,
        step: Rule | None = None,
        max_rank: int = 0,
        max_staleness: int = 0,
        keep_energy: float = 1.0,
        sigma: str = "B",
        seed: int = 0,
    ) -> None:
        FLComponent.__init__(self)
        super().__init__()
        self.merge, self.weigh, self.max_weight = merge, list(weigh), max_weight
        self.normalize_steps, self.step = normalize_steps, step
        self.max_rank, self.max_staleness = max_rank, max_staleness
        self.keep_energy, self.sigma, self.seed = keep_energy, sigma, seed
        self.how = Aggregation.read({name: getattr(self, name) for name in Aggregation.model_fields}, "aggregator")
        self.updates: dict[str, AdapterUpdate] = {}
        self.combined: Combined | None = None
        self.memory = Memory()  # of the server step
        self.begin(RoundTask(RoundPlan()), rank=1)

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        super().handle_event(event_type, fl_ctx)
        if event_type == EventType.START_RUN:
            fobs.register(TensorDecomposer)

    def begin(self, task: RoundTask, rank: int) -> None:
        """Opens a round in which the sites train from `task`; the result has at most `rank` directions."""
        self.task, self.rank = task, rank
        self.reset_stats()

    def reset_stats(self) -> None:
        self.updates, self.combined = {}, None

    def accept_model(self, model: FLModel, began: RoundTask | None = None) -> None:
        """
        Args:
            began: what the site was sent, if that was in an earlier round.

        Raises:
            WireError, ConfigError: names the site and what is wrong; its update does not count.
        """
        update = wire.read_update(model, model.meta["client_name"], self.task.plan.labels)
        check_values(update)
        check(self.how.weigh, update)
        if self.how.normalize_steps:
            per_step([1.0], [update])
        self.updates[update.site] = trained_from(began or self.task, update, self.task)

    def aggregate_model(self) -> FLModel:
        """
        Raises:
            WireError: nothing can be merged.
        """
        task = self.task
        updates = list(self.updates.values())
        combined = combine(task.adapter, task.manifest, updates, self.how, self.rank, self.memory)
        self.combined, self.memory = combined, combined.memory
        self._log(combined)
        manifest = _shared(combined.manifest) if combined.adapter.lora else combined.manifest
        model = wire.write_saved(wire.Saved(combined.adapter, manifest, task.round, task.plan))
        model.metrics = mean(received(self.updates), combined.weights) or None
        return model

    def _log(self, combined: Combined) -> None:
        shares = ", ".join(f"{site} {weight:.4f}" for site, weight in sorted(combined.weights.items()))
        size = "" if combined.step_size is None else f"; server step {combined.step_size:.2f}"
        self.logger.info(f"round {self.task.round}: weights {shares}{size}")
        for site, reason in sorted(combined.refused.items()):
            self.logger.warning(f"round {self.task.round}: {site} is left out: {reason}")
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
                f"round {self.task.round}: shortening to rank {self.rank} lost {average:.2e} of the energy on average, "
                f"{lost[worst]:.2e} in {worst}"
            )


def _shared(manifest: Manifest) -> Manifest:
    """Without the rank and alpha of the site whose manifest it is; `export` sets those of the merged adapter."""
    return replace(manifest, adapter_config={k: v for k, v in manifest.adapter_config.items() if k not in _OF_ONE_SITE})
