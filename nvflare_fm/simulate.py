"""A federation in one process: for benchmarks, trials and law tests, with the same workers and the same combination."""

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial

from . import transforms
from .adapter import Adapter, AdapterUpdate, Manifest, Report, RoundTask
from .aggregation.admit import check_values
from .aggregation.cohort import drawn
from .aggregation.combine import Combined, combine
from .aggregation.encrypted import combine_unread
from .aggregation.head_start import Start, check_sums, head_start
from .aggregation.late import trained_from
from .aggregation.noised import combine_noised
from .aggregation.step import Memory
from .config import Aggregation, RoundPlan, TaskPlan
from .encryption.keys import Keys
from .errors import ConfigError, PolicyError, WireError
from .job.settle import SettledPlan, settle
from .privacy import clients
from .site.training.job_events import JobEvents
from .site.worker import Worker
from .transforms.packed import added, check_sealed, pack


@dataclass(frozen=True)
class SimulatedRound:
    """One finished round."""

    number: int
    combined: Combined
    updates: tuple[AdapterUpdate, ...]

    @property
    def reports(self) -> dict[str, Report]:
        """What each site reported."""
        return {update.site: update.report for update in self.updates}


def federate(
    workers: Mapping[str, Worker],
    plan: RoundPlan,
    aggregation: Aggregation,
    rounds: int,
    adapter: Adapter | None = None,
    manifest: Manifest | None = None,
    sites_per_round: int = 0,
    takes: Mapping[str, int] | None = None,
    keys: Keys | None = None,
    tampered: Callable[[tuple[AdapterUpdate, ...], RoundTask], tuple[AdapterUpdate, ...]] = lambda updates, _: updates,
) -> Iterator[SimulatedRound]:
    """Run a federation in this process, and yield each round as it ends.

    Args:
        workers: site → its worker.
        plan: what the sites are asked to do.
        aggregation: how their adapters become one.
        rounds: how many to run.
        adapter: to start from; None: a fresh one.
        manifest: of that adapter.
        sites_per_round: sites drawn for each round; 0: all.
        takes: site → rounds that its answer takes, if more than one. An answer that is more than
            `aggregation.max_staleness` rounds late does not count.
        keys: the server's, where the plan encrypts what sites send.
        tampered: what the server gets in place of a round's updates, for studies of attacks.

    Yields:
        The rounds, in order.
    Raises:
        FmError: a site fails; unlike NVFlare's controller, this function does not go on without it.
    """
    settled = settle(plan, aggregation, {site: worker.overrides for site, worker in workers.items()})
    for worker in workers.values():
        worker.state.events = JobEvents()  # a job of its own
    adapter = adapter or Adapter()
    memory, private = Memory(), settled.aggregation.client_privacy
    noise = clients.checked(private, rounds, adapter) if private.asked else None
    at: dict[str, RoundTask] = {}  # site → what it works at
    start = _head_start(workers, settled, rounds) if settled.plan.head_start == "features" and not adapter else None
    if start:  # the federation goes on without whose labels mean something else
        workers = {site: worker for site, worker in workers.items() if site not in start.mislabelled}
    for number in range(rounds):
        down = pack(adapter, transforms.read(plan.downlink, "downlink"), "the server")
        received = down.adapter() if down.chain else adapter
        task = RoundTask(settled.of_round(number), received, manifest, number, rounds)
        at |= dict.fromkeys(drawn(workers.keys() - at.keys(), sites_per_round, plan.seed, number), task)
        due = sorted(site for site, sent in at.items() if number - sent.round + 1 >= (takes or {}).get(site, 1))
        tasks = {site: at.pop(site) for site in due}
        updates = tuple(trained_from(sent, _answer(workers[site], sent, start), task) for site, sent in tasks.items())
        updates = tampered(updates, task)
        for update in updates:
            if keys:
                check_sealed(keys, update.adapter, update.site, apart=False)
            else:
                check_values(update)
        whole = adapter if down.chain else None
        if keys:
            combined = combine_unread(received, manifest, updates, settled.aggregation, partial(added, keys))
        elif noise and manifest:
            given = received, manifest, updates, settled.aggregation, noise, number, settled.global_rank
            combined = combine_noised(*given, memory, whole)
        else:
            combined = combine(received, manifest, updates, settled.aggregation, settled.global_rank, memory, whole)
        adapter, manifest, memory = combined.adapter, combined.manifest, combined.memory
        at = {
            site: sent for site, sent in at.items() if sent.adapter and number - sent.round < aggregation.max_staleness
        }
        if number == 0:
            gc.freeze()  # a Trainer collects garbage once a round: over all that transformers holds, half its time
        yield SimulatedRound(number, combined, updates)


def _head_start(workers: Mapping[str, Worker], settled: SettledPlan, rounds: int) -> Start | None:
    """The start of the head that follows from the features of the sites that tell them; nothing where none does."""
    updates, task = [], RoundTask(settled.summing, total_rounds=rounds)
    for _, worker in sorted(workers.items()):
        with suppress(PolicyError, ConfigError):
            updates.append(worker.train(task))
    for update in updates:
        check_values(update)
        check_sums(update, len(settled.plan.labels))
    with suppress(WireError):  # as at the server, no sums end the job
        return head_start(updates) if updates else None
    return None


def _answer(worker: Worker, task: RoundTask, start: Start | None) -> AdapterUpdate:
    """A site's update as the server reads it; before there is an adapter, it has `start`."""
    if start and not task.adapter:
        task = replace(task, adapter=start.adapter, manifest=start.manifest)
    update = worker.train(task)
    packed = worker.packed(update, task.plan)
    return replace(update, adapter=packed.adapter()) if packed.chain else update


def train_alone(worker: Worker, plan: TaskPlan, rounds: int) -> tuple[Adapter, Manifest, Report]:
    """Train one worker by itself for as many steps as it would take in `rounds` rounds, as a baseline."""
    steps = plan.training.local_steps * rounds
    epochs = plan.training.local_epochs * rounds
    training = plan.training.model_copy(update={"local_steps": steps, "local_epochs": epochs})
    worker.state.events = JobEvents()
    update = worker.train(RoundTask(plan.model_copy(update={"training": training})))
    return *worker.submit(), update.report
