"""A federation in one process: for benchmarks, trials and law tests, with the same workers and the same combination."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from .adapter import Adapter, AdapterUpdate, Manifest, Report, RoundTask
from .aggregation.combine import Combined, combine
from .combination import max_rank, settle
from .config import Aggregation, RoundPlan
from .site.worker import Worker


@dataclass(frozen=True)
class Round:
    """One finished round."""

    number: int
    combined: Combined
    updates: tuple[AdapterUpdate, ...]

    @property
    def reports(self) -> dict[str, Report]:
        return {update.site: update.report for update in self.updates}


def federate(
    workers: Mapping[str, Worker],
    plan: RoundPlan,
    how: Aggregation,
    rounds: int,
    adapter: Adapter | None = None,
    manifest: Manifest | None = None,
) -> Iterator[Round]:
    """Rounds one after the other, each yielded as it ends; `adapter` and `manifest` continue an earlier federation.

    Raises:
        FmError: a site fails; unlike NVFlare's controller, nothing here goes on without it.
    """
    plan = settle(plan, how, {site: worker.overrides for site, worker in workers.items()})
    adapter = adapter or Adapter()
    for number in range(rounds):
        task = RoundTask(plan, adapter, manifest, number, rounds)
        updates = tuple(workers[site].train(task) for site in sorted(workers))
        combined = combine(adapter, manifest, updates, how, max_rank(plan, how))
        adapter, manifest = combined.adapter, combined.manifest
        yield Round(number, combined, updates)


def alone(worker: Worker, plan: RoundPlan, rounds: int) -> tuple[Adapter, Manifest, Report]:
    """The baseline: one worker trains by itself for as many steps as it would in `rounds` rounds."""
    steps = plan.training.local_steps * rounds
    epochs = plan.training.local_epochs * rounds
    training = plan.training.model_copy(update={"local_steps": steps, "local_epochs": epochs})
    update = worker.train(RoundTask(plan.model_copy(update={"training": training})))
    return *worker.submit(), update.report
