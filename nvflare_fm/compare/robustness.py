"""The robustness study: attack × guard × data, from a few seeds. Every run is one line in the results.

Who attacks is drawn by the seed, so a mean over seeds is one over attackers too. What is told of honest sites is told
of the same ones with the attack and without.
"""

import hashlib
import json
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from random import Random
from typing import Any, get_args

import torch
from rich.table import Table

from ..adapter import Adapter, AdapterUpdate, Manifest, RoundTask
from ..aggregation import merge
from ..aggregation.asked import settings_of
from ..aggregation.combine import Combined
from ..aggregation.guard import registry as guards
from ..aggregation.metrics import medians
from ..aggregation.needed import needed
from ..config import Aggregation, Quantization
from ..errors import ConfigError, FmError
from ..simulate import SimulatedRound, federate
from ..site.tasks import IGNORED
from ..site.worker import Worker
from . import peers
from .attacks import ABSENT, NONE, Attack, Known, everything, named_rules
from .attacks.rows import is_target, triggered
from .bench import Bench, overall, silent
from .methods import METHODS, Method
from .results import spread, verdict
from .run import Line, read_lines
from .study import RANKS, Study, json_lines

CELLS = {"banking77-0": 1e-2, "banking77-0.1": 1e-2, "medquad-types": 5e-3, "banking77lm-0.1": 2e-2}  # tuned rates
PEER_RATES = {"banking77-0": 2e-2, "banking77-0.1": 2e-2, "medquad-types": 1e-2, "banking77lm-0.1": 4e-2}
PEERS: dict[str, Callable[[Sequence[AdapterUpdate], int], Adapter] | None] = {
    "FedIT": None, "FedIT, median of factors": peers.factor_median, "FedIT, Krum on factors": peers.factor_krum,
}  # fmt: skip
UNGUARDED, DEFAULT, STARTED = "none", "default", "default, head from features"
START_RATE = 1e-3  # of a head that is good from the start
ROUNDS, STEPS, BATCH = 12, 5, 16  # about a minute of one core where five sites train MiniLM's first two layers
PRECISION: tuple[Quantization, ...] = ("fp32",)  # of the base model: quantization is no question here
TRIES = 100  # rows that a round is chosen by


def guards_there_are() -> list[str]:
    """None, the default, and every guard by itself and, if it can look at mixed updates, with each way to mix them."""
    found = [UNGUARDED, DEFAULT]
    for name in guards:
        mix = settings_of(guards[name]).model_fields.get("mix")
        ways = [way for way in get_args(mix.annotation) if way != mix.default] if mix else []
        found += [name, *(json.dumps([{"rule": name, "mix": way}]) for way in ways)]
    return found


def aggregation(guard: str, attack: Attack) -> Aggregation:
    """How adapters become one.

    Args:
        guard: `none`, `default`, the same with a head from features, guards as `named_rules` reads them, or settings of
            the aggregation as a JSON object, for what is no guard: `{"merge": "NAME"}`.
        attack: of one that lies, sites weigh by their examples: a lie about them matters nowhere else.

    Raises:
        ConfigError: an unknown guard or setting.
    """
    asked: dict[str, Any] = (
        {} if guard in (DEFAULT, STARTED) else {"guard": () if guard == UNGUARDED else named_rules(guard)}
    )
    if len(rules := asked.get("guard", ())) == 1 and isinstance(rules[0], Mapping) and "rule" not in rules[0]:
        asked = {"guard": (), **rules[0]}
    if attack.lies:
        asked["weigh"] = ("examples",)
    return Aggregation.read(asked, "guard")


def prepared(study: Study, sites: int, rounds: int, steps: int) -> Study:
    """A study for attacks: fewer, larger sites, and all test rows scored.

    Args:
        sites: site i gets the rows of sites i, i + `sites`, and so on; 0: as they are.
        steps: of a site in a round.
    """
    plan = {**study.plan, "training": {**study.plan["training"], "local_steps": steps, "batch_size": BATCH}}
    study = replace(study, plan=plan, rounds=rounds, test_rows=10**6)
    names = study.names
    if not 0 < sites < len(names):
        return study
    folder = study.workspace.root / "merged" / f"{study.digest[:16]}-{sites}"
    for place in range(sites):
        for split in ("train", "test"):
            rows = [row for name in names[place::sites] for row in study.rows(name, split)]
            write_once(folder / names[place] / f"{split}.jsonl", "".join(row + "\n" for row in rows))
    return replace(study, folder=folder)


def write_once(file: Path, text: str) -> Path:
    """Write a file if it is not there yet, as a whole: runs side by side may want the same."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_name(f"{file.name}.{os.getpid()}")
        part.write_text(text)
        part.replace(file)
    return file


@dataclass(frozen=True)
class AttackedRun:
    """One attack on one guard in one study, from one seed.

    Args:
        study: as `prepared` makes it.
        attack: `none`, `absent`, or attacks as `named_rules` reads them.
        guard: see `aggregation`; or one of `PEERS`.
        attackers: how many sites attack.
    """

    study: Study
    attack: str
    guard: str
    rate: float
    seed: int
    attackers: int

    @property
    def file(self) -> Path:
        return self.study.workspace.results / f"robustness-{self.study.name}.jsonl"

    @property
    def site_rounds(self) -> int:
        return self.study.rounds * len(self.study.names)

    @property
    def title(self) -> str:
        return f"{self.study.name}, {self.attack} on {self.guard}, seed {self.seed}"

    @cached_property
    def attacking(self) -> list[str]:
        """The sites that attack."""
        return sorted(Random(f"attackers/{self.seed}").sample(self.study.names, self.attackers))

    @cached_property
    def asked(self) -> Attack:
        return Attack.read(self.attack)

    @cached_property
    def method(self) -> Method:
        if self.guard in PEERS:
            peer = METHODS["FedIT, rank 4"]
            weigh = ("examples",) if self.asked.lies else ("uniform",)
            asked = peer.aggregation.model_copy(update={"weigh": weigh, "guard": ()})
            return replace(peer, aggregation=asked, quantizations=PRECISION)
        how = aggregation(self.guard, self.asked)
        start = "features" if self.guard == STARTED else "random"
        rank = 0 if merge.choose(how.merge).mixed_ranks else 4
        return Method(how, rank=rank, quantizations=PRECISION, head_start=start)

    @cached_property
    def digest(self) -> str:
        """Of the configuration that its line depends on."""
        whole = [
            Bench(self.study, self.rate).plan.model_dump(mode="json", exclude={"personalize"}),
            self.method.aggregation.model_dump(mode="json"),
            [self.method.rank, self.method.quantizations, self.study.digest, self.study.rounds, self.study.model.name],
            [self.attack, self.guard, self.rate, self.seed, self.attackers],
        ]
        return hashlib.sha256(json.dumps(whole).encode()).hexdigest()[:16]

    @property
    def who(self) -> Line:
        """What tells its line from others."""
        who = {"attack": self.attack, "guard": self.guard, "seed": self.seed, "rate": self.rate}
        return {**who, "digest": self.digest, "attackers": self.attacking}

    def done(self) -> bool:
        """Whether the results have it."""
        return any(row["digest"] == self.digest for row in read_lines(self.file))

    def check(self) -> None:
        """Refuse what cannot be run.

        Raises:
            ConfigError: an unknown attack, guard or setting, or too many attackers.
        """
        if not 0 < self.attackers < len(self.study.names):
            raise ConfigError(
                f"{self.attackers} of {len(self.study.names)} sites cannot attack: one honest site at least is needed, "
                "and one attacker; see --attackers and --sites",
                code="too_many_attackers",
            )
        needed(self.method.aggregation)

    def carry_out(self, tick: Any = silent) -> tuple[list[Line], float]:
        """Do it.

        Returns:
            Its line, and the seconds it took.
        """
        torch.set_num_threads(1)
        began = time.monotonic()
        try:
            line = Federation(self, tick).line()
        except ConfigError as error:  # a guard that does not go with the rest of the job
            line = {**self.who, "rounds": 0, "stopped": error.code, "score": 0.0, "scores": {}, "trigger": None}
        seconds = time.monotonic() - began
        return [{**line, "seconds": round(seconds, 1)}], seconds


class Federation:
    """A run as it goes."""

    def __init__(self, run: AttackedRun, tick: Any = silent) -> None:
        self.run, self.bench = run, Bench(run.study, run.rate, tick=tick)
        self.labels = [str(label) for label in run.study.plan.get("labels", [])]
        self.plan = self.bench.settled(run.method, run.seed)
        self.generator = torch.Generator().manual_seed(run.seed)
        if run.asked.lies:
            told = {"before": True, "max_examples": TRIES}
            self.plan = self.plan.model_copy(update={"evaluation": self.plan.evaluation.model_copy(update=told)})
        if run.asked.changes_rows:
            for name in run.attacking:
                self.bench.files[name] = self._poisoned(name), self.bench.files[name][1]
        self.workers = self.bench.workers(run.method)
        if run.asked.entries and not run.method.rank:
            for name in run.attacking:  # as any site may that a job does not list
                self.workers[name].overrides = self.workers[name].overrides.model_copy(update={"rank": max(RANKS)})
        if run.attack == ABSENT:
            self.workers = {name: worker for name, worker in self.workers.items() if name not in run.attacking}
        self.honest = [name for name in run.study.names if name not in run.attacking]

    def _folder(self) -> Path:
        what = hashlib.sha256(self.run.attack.encode()).hexdigest()[:16]
        return self.run.study.workspace.root / "attacked" / self.run.study.digest[:16] / what / str(self.run.seed)

    def _poisoned(self, site: str) -> Path:
        rows = [*json_lines(self.bench.files[site][0])]
        rows = self.run.asked.poisoned(rows, self.labels, Random(f"{self.run.seed}/{site}"))
        return write_once(self._folder() / f"{site}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))

    def tampered(self, updates: tuple[AdapterUpdate, ...], task: RoundTask) -> tuple[AdapterUpdate, ...]:
        """What the server gets of a round, and with a peer's rule what comes of it: then all sites send that."""
        own = [update for update in updates if update.site in self.run.attacking]
        if own and self.run.asked.entries:
            honest = [update for update in updates if update.site not in self.run.attacking]
            known = Known(own, honest, task.adapter, self.generator, by_entry=self.run.guard in PEERS)
            updates = tuple(sorted([*honest, *self.run.asked.tampered(known)], key=lambda update: update.site))
        if rule := PEERS.get(self.run.guard):
            merged = rule(updates, self.run.attackers)
            updates = tuple(replace(update, adapter=merged) for update in updates)
        return updates

    def line(self) -> Line:
        """Run it, and tell what came of it."""
        done: list[SimulatedRound] = []
        stopped = ""
        try:
            for each in federate(
                self.workers, self.plan, self.run.method.aggregation, self.run.study.rounds, tampered=self.tampered
            ):
                done.append(each)
                self.bench.tick(len(self.workers))
        except FmError as error:  # a guard that refuses so few sites, or training that an attack has made diverge
            stopped = error.code
        line: Line = {**self.run.who, "rounds": len(done)}
        line |= {"stopped": stopped, "counted": _counted([each.combined for each in done], self.workers)}
        if not done:
            return {**line, "score": 0.0, "scores": {}, "trigger": None}
        kept = done[self.chosen(done)].combined
        honest = {name: self.workers[name] for name in self.honest}
        scores = self.bench.measure(honest, self.run.method, kept.adapter, kept.manifest)
        return {
            **line,
            "score": round(overall(scores, self.bench.rows), 5),
            "scores": {name: round(score, 5) for name, score in scores.items()},
            "trigger": self.triggered(kept.adapter, kept.manifest),
        }

    def chosen(self, done: Sequence[SimulatedRound]) -> int:
        """The round whose adapter is the result: the last; where sites tell metrics, the one that they say is best."""
        said = {}
        for each in done[1:]:  # in which the adapter of the round before was measured
            told = {site: report.before for site, report in each.reports.items()}
            said[each.number - 1] = medians(told, each.combined.weights).get(self.run.study.metric)
        known = {number: value for number, value in said.items() if value is not None}
        if not known:
            return len(done) - 1
        return (min if self.run.study.lower_is_better else max)(known, key=lambda number: known[number])

    def triggered(self, adapter: Adapter, manifest: Manifest | None) -> float | None:
        """The share of the honest sites' test rows that get the target for the trigger, of those that have another."""
        rows = {}
        for name in self.honest:
            for row in json_lines(self.bench.files[name][1]):
                if not is_target(row, self.labels):
                    found = triggered(row, self.labels)
                    rows[json.dumps(found)] = found
        if not rows:
            return None
        text = "".join(row + "\n" for row in rows)
        name = hashlib.sha256(text.encode()).hexdigest()[:16]
        file = write_once(self.run.study.workspace.root / "attacked" / "triggers" / f"{name}.jsonl", text)
        worker = self.bench._worker("trigger", self.bench.files[self.honest[0]][0], file, 0, self.run.method)
        task = RoundTask(self.bench.settled(self.run.method), adapter, manifest)
        return round(worker.validate(task)["accuracy"] if self.labels else completed(worker, task), 5)


def completed(worker: Worker, task: RoundTask) -> float:
    """The share of a site's test rows whose completion greedy decoding begins with: each of its tokens is the likeliest
    after those before it. What comes after it, an end or more text, does not matter.
    """
    job = worker.opened(task)
    plan = job.plan.model_copy(update={"rest": "tail"})
    right, end = [], job.base.tokenizer.eos_token_id
    with job.base.lent(), torch.inference_mode():
        model = job.attachment.attach(job.base, task.adapter, plan)
        model.eval()
        for row in job.measured or ():
            ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])[1:]
            said = model(input_ids=ids).logits[0, :-1].argmax(dim=-1)
            asked = (labels != IGNORED) & (labels != end)
            right.append(bool((said == labels)[asked].all()))
    return sum(right) / len(right) if right else 0.0


def _counted(rounds: Sequence[Combined], sites: Mapping[str, Worker]) -> dict[str, dict[str, float]]:
    """Of each site, over the rounds: how much of its change the guards left in the mean, in which share of the rounds
    they left nothing, and the mean share of what was merged.
    """
    found = {}
    for site in sites:
        left = [_left(combined, site) for combined in rounds]
        shares = [combined.weights.get(site, 0.0) * much for combined, much in zip(rounds, left, strict=True)]
        found[site] = {
            "multiplier": round(statistics.mean(left), 4),
            "rejected": round(sum(much == 0 for much in left) / len(left), 4),
            "share": round(statistics.mean(shares), 4),
        } if rounds else {}  # fmt: skip
    return found


def _left(combined: Combined, site: str) -> float:
    return combined.guarded[site].multiplier if site in combined.guarded else float(site in combined.weights)


def default_attacks() -> list[str]:
    """No attack, every attack by itself, and those that only harm together."""
    return [NONE, ABSENT, *everything(), "backdoor + scale", "sign_flip + lies"]


def runs(
    study: Study,
    attacks: Sequence[str],
    asked: Sequence[str],
    seeds: Sequence[int],
    attackers: int,
    rates: tuple[float, float],
) -> list[AttackedRun]:
    """Every attack on every guard, seed by seed, so that a whole table is there early.

    Args:
        asked: guards.
        rates: learning rate of ours, and of the peers.

    Raises:
        ConfigError: an unknown attack, guard or setting, or too many attackers.
    """
    found = [
        AttackedRun(study, attack, guard, START_RATE if guard == STARTED else rates[guard in PEERS], seed, attackers)
        for seed in seeds
        for guard in asked
        for attack in attacks
    ]
    for run in found[: len(attacks) * len(asked)]:
        run.check()
    return found


def table(study: Study, lines: Sequence[Line]) -> Table:
    """Attack × guard: what the honest sites get, and who counted.

    All scores are of the honest sites' rows. How much better one is than `none` on no guard is told seed by seed.
    """
    sign = -1 if study.lower_is_better else 1
    heads = ("guard", "attack", "seeds", study.metric, "better than unattacked by", "", "worst honest site")
    more = ("trigger", "honest rejected", "honest multiplier", "attackers' multiplier", "attackers' share")
    told = Table(*heads, *more, title=study.name)
    found: dict[tuple[str, str], dict[int, Line]] = {}
    for line in lines:
        found.setdefault((line["guard"], line["attack"]), {})[line["seed"]] = line  # the last one counts
    clean = found.get((UNGUARDED, NONE), {})
    for (guard, attack), by_seed in sorted(found.items(), key=lambda item: _place(*item[0])):
        ended = [line for line in by_seed.values() if line["scores"]]
        scores = [line["score"] for line in ended]
        paired = [sign * (line["score"] - clean[line["seed"]]["score"]) for line in ended if line["seed"] in clean]
        worst = [(max if study.lower_is_better else min)(line["scores"].values()) for line in ended]
        triggers = [line["trigger"] for line in ended if line["trigger"] is not None]
        stopped = sorted({line["stopped"] for line in by_seed.values() if line["stopped"]})
        is_peer = guard in PEERS
        told.add_row(
            guard,
            f"{attack} ({', '.join(stopped)})" if stopped else attack,
            str(len(by_seed)),
            spread(scores),
            *(("", "") if (guard, attack) == (UNGUARDED, NONE) else (spread(paired), verdict(paired))),
            spread(worst),
            spread(triggers),
            *("–" if is_peer else spread(_of(ended, what, honest), 2) for what, honest in _TOLD),
        )
    return told


_TOLD = (("rejected", True), ("multiplier", True), ("multiplier", False), ("share", False))


def _of(lines: Sequence[Line], what: str, honest: bool) -> list[float]:
    """A mean over the honest sites, or over the attackers, of each run; a share is what they have together."""
    found = []
    for line in lines:
        values = [
            counted[what] for site, counted in line["counted"].items() if (site not in line["attackers"]) == honest
        ]
        found += [sum(values) if what == "share" else statistics.mean(values)] if values else []
    return found


def _place(guard: str, attack: str) -> tuple[bool, bool, str, bool, bool, str]:
    """Peers last, what is unguarded and unattacked first."""
    return guard in PEERS, guard != UNGUARDED, guard, attack != NONE, attack != ABSENT, attack
