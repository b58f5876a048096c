"""What a method makes of a study: its rounds, its scores, and the bytes it sends.

All sites of a process share one quantized base model, and each tokenizes its rows once, whatever methods are run.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, cast

from .. import transforms
from ..adapter import LORA_A, LORA_B, Adapter, Description, Manifest, RoundTask
from ..aggregation.combine import combine
from ..algebra.lora import svd
from ..config import PrivacySettings, RoundPlan, Rule, SiteOverrides, TaskPlan
from ..job.settle import SettledPlan, settle
from ..job.tasks import promises
from ..simulate import SimulatedRound, federate, train_alone
from ..site.data.loading import SiteData
from ..site.model import base_model
from ..site.model.own_adapter import OwnAdapter
from ..site.offer.site_config import DataSource, ModelSource, SiteConfig
from ..site.worker import Worker
from . import data_sets, peers
from .head_rate import with_head_factor
from .methods import Method, is_lone
from .study import RANKS, Study

ALPHA = 2.0  # of rsLoRA: the scale is 1 at rank 4
POINTS = 5  # of a curve
Tick = Callable[[int], None]  # is told how many more rounds of a site are done


def silent(_: int) -> None:
    """Tell nobody."""


class Bench:
    """A study at one learning rate. Workers, with their base model and tokens, are kept from method to method."""

    _kept: ClassVar[dict[tuple[str, Path, Path, Path], Worker]] = {}

    def __init__(self, study: Study, rate: float, held_out: bool = False, tick: Tick = silent) -> None:
        self.study, self.names, self.held_out, self.tick = study, study.names, held_out, tick
        plan = {**study.plan, "quantization": "nf4"}
        plan["peft"] = {"method": "lora"}
        plan["training"] = {**study.plan["training"], "learning_rate": rate}
        plan["evaluation"] = {"before": False, "after": False, "max_examples": study.test_rows, "batch_size": 50}
        self.plan = RoundPlan.read(plan, "study")
        self.files = {name: self._files(name) for name in self.names}
        self.rows = {name: study.scored_rows(test) for name, (_, test) in self.files.items()}

    def _files(self, name: str) -> tuple[Path, Path]:
        """Train and test, or for tuning a fifth of the training rows as test and the others to train on."""
        source = self.study.folder / name
        if not self.held_out:
            return source / "train.jsonl", source / "test.jsonl"
        folder = self.study.workspace.root / "held_out" / self.study.digest[:16] / name
        found = folder / "fit.jsonl", folder / "valid.jsonl"
        if not folder.exists():
            folder.mkdir(parents=True)
            rows = self.study.rows(name, "train")
            for file, held in zip(found, (False, True), strict=True):
                file.write_text("".join(row + "\n" for row in rows if (data_sets.fraction(row) < 0.2) == held))
        return found

    def workers(self, method: Method) -> dict[str, Worker]:
        return {name: self._worker(name, *self.files[name], place, method) for place, name in enumerate(self.names)}

    def ranks(self, method: Method) -> list[int]:
        """The ranks at which the sites train, in the order of their names."""
        sites = max(1, len(self.names) - 1)
        mixed = [RANKS[round(place * (len(RANKS) - 1) / sites)] for place in range(len(self.names))]
        if method.at_our_bytes:  # a site of ours sends its own rank and receives the largest, after all rounds but one
            rounds = self.study.rounds
            ours = rounds * sum(mixed) / len(mixed) + (rounds - 1) * max(mixed)
            return [round(ours / (2 * rounds - 1))] * len(mixed)
        return [method.rank] * len(mixed) if method.rank else mixed

    def pooled(self, method: Method) -> Worker:
        """All rows in one place; a step sees as many of them as the sites see together."""
        split = "fit" if self.held_out else "train"
        file = self.study.workspace.root / "pooled" / f"{self.study.digest[:16]}-{split}.jsonl"
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("".join(train.read_text() for train, _ in self.files.values()))
        worker = self._worker("pooled", file, self.files[self.names[0]][1], len(self.names) - 1, method)
        together = len(self.names) * self.plan.training.batch_size
        worker.overrides = worker.overrides.model_copy(update={"batch_size": together})
        return worker

    def _worker(self, name: str, train: Path, test: Path, place: int, method: Method) -> Worker:
        data = {"notes": DataSource(train=str(train.resolve()), validation=str(test.resolve()))}
        models = {"base": ModelSource(path=str(self.study.model.resolve()))}
        config = SiteConfig(models=models, data=data, privacy=data_sets.OPEN)
        rank = self.ranks(method)[place]
        overrides = SiteOverrides(
            rank=None if method.peft else rank,
            lora_alpha=method.alpha(rank) if method.alpha else None,
            quantization=method.quantizations[place % len(method.quantizations)],
        )
        worker = with_head_factor(method.worker, method.head_factor)(name, config, overrides)
        first = self._kept.setdefault((name, train, test, self.study.model), worker)
        worker._data, worker._states = first._data, first._states
        return worker

    def digest(self, method: Method, seed: int) -> str:
        """Of all that a run's lines depend on but the base model's weights, in hexadecimal."""
        ranks = self.ranks(method)
        parts = [
            self.settled(method, seed).model_dump(mode="json", exclude={"personalize"}),
            method.aggregation.model_dump(mode="json"),
            [(rank, method.alpha(rank) if method.alpha else None) for rank in ranks],
            [method.worker.__name__, method.folds, method.quantizations, method.at_home, method.slow, method.waits],
            method.head_factor,
            [self.study.digest, self.study.rounds, self.study.test_rows, self.study.model.name, self.held_out],
            *([method.personal] if method.personal else []),
        ]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    def settled(self, method: Method, seed: int = 0) -> TaskPlan:
        """The plan as a method's sites carry it out."""
        return self.job(method, seed).plan

    def job(self, method: Method, seed: int = 0) -> SettledPlan:
        """What a method asks of its sites, and what follows from it."""
        rank = max(self.ranks(method))
        alpha = method.alpha(rank) if method.alpha else ALPHA
        peft = method.peft or {"method": "lora", "rank": rank, "use_rslora": not method.alpha, "lora_alpha": alpha}
        # who writes text has no new head
        none = {"head_lr_ratio": None} if promises(self.plan.task).learns_text else {}
        training = self.plan.training.model_copy(update={**method.training, **none})
        privacy = PrivacySettings.read(method.privacy, "method")
        asked = self.plan.model_copy(
            update={
                "seed": seed,
                "peft": peft,
                "training": training,
                "privacy": privacy,
                "head_start": None if none else method.head_start,
                "uplink": method.codec,
                "downlink": method.codec,
            }
        )
        return settle(asked, method.aggregation)

    def rounds(self, method: Method, workers: dict[str, Worker], seed: int) -> Iterator[SimulatedRound]:
        plan = self.settled(method, seed)
        if method.folds:
            return self._folding(method, workers, plan)
        takes = {} if method.waits else dict.fromkeys(self.names[2::3], method.slow)
        return federate(workers, plan, method.aggregation, self.together(method), takes=takes)

    def together(self, method: Method) -> int:
        """Rounds of the federation; in the others each site trains by itself, or waits for the slow ones."""
        rounds = math.ceil(self.study.rounds / method.slow) if method.waits else self.study.rounds
        return rounds - math.ceil(method.at_home * rounds)

    def _folding(self, method: Method, workers: dict[str, Worker], plan: TaskPlan) -> Iterator[SimulatedRound]:
        adapter, manifest = Adapter(), None
        for number in range(self.study.rounds):
            task = RoundTask(plan, adapter, manifest, number, self.study.rounds)
            updates = tuple(workers[name].train(task) for name in sorted(workers))
            combined = combine(adapter, manifest, updates, method.aggregation, sum(self.ranks(method)))
            adapter, manifest = peers.fold(combined, workers[self.names[0]], task)
            yield SimulatedRound(number, replace(combined, adapter=adapter), updates)
        base_model._loaded.clear()  # what was folded into is nobody else's base

    def measure(
        self, workers: dict[str, Worker], method: Method, adapter: Adapter, manifest: Manifest | None
    ) -> dict[str, float]:
        task = RoundTask(self.settled(method), adapter, manifest)
        return {name: worker.validate(task)[self.study.metric] for name, worker in workers.items()}

    def finished_at_home(
        self, method: Method, workers: dict[str, Worker], seed: int, last: SimulatedRound
    ) -> dict[str, float]:
        """The score at home of each site's own adapter, which goes on from the global one, at half the rate."""
        plan, scores = self.settled(method, seed), {}
        training = {
            "local_steps": plan.training.local_steps * (self.study.rounds - self.together(method)),
            "learning_rate": plan.training.learning_rate / 2,
        }
        plan = plan.model_copy(update={"training": plan.training.model_copy(update=training)})
        for name, worker in workers.items():
            worker.train(RoundTask(plan, last.combined.adapter, last.combined.manifest))
            scores[name] = worker.validate(RoundTask(plan, *worker.submit()))[self.study.metric]
        return scores

    def its_own(self, method: Method, workers: dict[str, Worker], seed: int, last: SimulatedRound) -> dict[str, float]:
        """The score at home of the adapter that each site trains on for itself. It is chosen on every second of the
        rows and scored on the others, and the other way round, so that no row has a say in its own score.
        """
        plan, scores = self.settled(method, seed), {}
        steps = round(method.personal * plan.training.local_steps * self.study.rounds)
        plan = plan.model_copy(update={"personalize": plan.personalize.model_copy(update={"steps": steps})})
        end = RoundTask(plan, last.combined.adapter, last.combined.manifest, self.study.rounds, self.study.rounds)
        for name, worker in workers.items():
            found, weighed = worker.rows(plan), []
            count = found.measured(plan.evaluation.max_examples, 1)
            for start in (0, 1):
                halves = [range(place, count, 2) for place in (start, 1 - start)]
                chooses, judges = (_measuring(worker, found, [*half]) for half in halves)
                chooses.personalize(end)
                own = RoundTask(plan, cast(Adapter, chooses.state.personal.read()), last.combined.manifest)
                weighed.append(len(halves[1]) * judges.validate(own)[self.study.metric])
            scores[name] = sum(weighed) / count
        return scores


def _measuring(worker: Worker, found: SiteData, rows: list[int]) -> Worker:
    """The same site with some of its validation rows, and no adapter of its own yet."""
    places = tuple(found.validation_rows[row] for row in rows)
    some = replace(found, validation=found.validation.select(rows), validation_rows=places)
    other = copy(worker)
    other._data, other.state = dict.fromkeys(worker._data, some), replace(worker.state, personal=OwnAdapter())
    return other


def overall(scores: dict[str, float], rows: dict[str, int]) -> float:
    """Over the test rows of all sites that have a score together."""
    return sum(rows[site] * score for site, score in scores.items()) / sum(rows[site] for site in scores)


def above(adapter: Adapter, rank: int) -> float:
    """The share of energy in the directions above `rank`, over all layers."""
    energy = [svd(adapter.lora[layer])[1].square() for layer in adapter.lora]
    total = sum(float(e.sum()) for e in energy)
    return sum(float(e[rank:].sum()) for e in energy) / total if total else 0.0


def sent(adapter: Adapter, codec: Sequence[Rule] = (), factors: str = "AB", rank: int | None = None) -> int:
    """Add up the bytes that an adapter has on its way.

    Args:
        codec: the transforms it goes through.
        factors: of each pair, those that travel.
        rank: directions of each pair that travel; None: all.
    """
    found = {}
    for name, before in adapter.descriptions().items():
        rows, *columns = before.shape or (1,)
        if name.endswith(LORA_A):
            found[name] = Description((min(rows, rank or rows), *columns), before.dtype)
        elif name.endswith(LORA_B):
            found[name] = Description((rows, *(min(n, rank or n) for n in columns)), before.dtype)
        else:
            found[name] = before
    left = tuple(end for factor, end in (("A", LORA_A), ("B", LORA_B)) if factor not in factors)
    travel = {name: each for name, each in found.items() if not name.endswith(left)}
    return sum(each.bytes for each in transforms.read(codec, "codec").described(travel).values())


class Traffic:
    """What a faithful implementation of a method sends, in bytes.

    Sites do not send a factor that they all hold already: one that is frozen from the seed on (FFA-LoRA), or that was
    not trained in this round (RoLoRA). Where a site has no use for directions above its own rank, the server cuts them
    off. Where updates are folded into the base model (FLoRA), each site gets all of them.
    """

    def __init__(self, bench: Bench, method: Method, seed: int) -> None:
        self.folds, self.codec, self.settled = method.folds, method.codec, bench.job(method, seed)
        self.cuts = self.settled.plan.rest == "none" and not method.peft
        self.rank_sum = 0 if method.peft else sum(bench.ranks(method))
        self.up = self.down = 0

    @property
    def told(self) -> dict[str, int]:
        """What a line says of it."""
        return {"rank_sum": self.rank_sum, "bytes_up": self.up, "bytes_down": self.down}

    def _factors(self, number: int) -> str:
        return self.settled.of_round(number).factors

    def add(self, done: SimulatedRound) -> None:
        """Count what the sites send in a round."""
        self.up += sum(sent(update.adapter, self.codec, self._factors(done.number)) for update in done.updates)

    def spread(self, done: SimulatedRound, workers: Sequence[Worker]) -> None:
        """Count what the server sends of a round's result, in the next round."""
        adapter = done.combined.adapter
        if self.folds:
            stack = sum(sent(Adapter(update.adapter.lora), self.codec) for update in done.updates)
            self.down += len(workers) * (stack + sent(Adapter(dense=adapter.dense), self.codec))
            return
        for worker in workers:
            rank = worker.overrides.rank if self.cuts else None
            self.down += sent(adapter, self.codec, self._factors(done.number), rank)


def federated(bench: Bench, method: Method, seed: int, points: int) -> Iterator[dict[str, Any]]:
    """What a federation scores at `points` of its rounds, the last one among them."""
    workers, traffic, rounds = bench.workers(method), Traffic(bench, method, seed), bench.together(method)
    mixed = not (method.rank or method.at_our_bytes or method.peft or method.folds)
    for done in bench.rounds(method, workers, seed):
        bench.tick(len(workers))
        traffic.add(done)
        adapter = done.combined.adapter
        if (done.number + 1) % max(1, rounds // points) == 0 or done.number + 1 == rounds:
            scores = bench.measure(workers, method, adapter, done.combined.manifest)
            share = above(adapter, min(RANKS)) if mixed else None
            yield {"round": done.number + 1, "scores": scores, **traffic.told, "above": share}
        traffic.spread(done, [*workers.values()])
    if method.at_home:
        scores = bench.finished_at_home(method, workers, seed, done)
        bench.tick(len(workers) * (bench.study.rounds - rounds))
        yield {"round": bench.study.rounds, "scores": scores, **traffic.told, "above": None}
    if method.personal:
        scores = bench.its_own(method, workers, seed, done)
        yield {"round": rounds, "scores": scores, **traffic.told, "above": None}


def baseline(bench: Bench, name: str, method: Method, seed: int) -> Iterator[dict[str, Any]]:
    """Pooled training, or each site alone, for as many steps as a site takes in all rounds. Tuned, a lone site is
    measured at home only.
    """
    plan, sites, rounds = bench.settled(method, seed), bench.workers(method), bench.study.rounds
    lone = is_lone(name)
    for trained_at, worker in sites.items() if lone else [("pooled", bench.pooled(method))]:
        adapter, manifest, _ = train_alone(worker, plan, rounds)
        bench.tick(rounds * (1 if lone else len(sites)))
        judges = {trained_at: worker} if lone and bench.held_out else sites
        yield {"round": rounds, "trained_at": trained_at, "scores": bench.measure(judges, method, adapter, manifest)}
