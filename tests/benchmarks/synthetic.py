"""What synthetic rows are worth, and what they tell: arms that differ in the rows that sites add, in one process.

    nvflare-fm synth generate LABELS … -o runs/synthetic/banking77.jsonl          (see docs/synthetic_data.md)
    python tests/benchmarks/synthetic.py banking77 --seeds 0 --arms none,head,duplicates,zero-shot,1,4,inf,public

    python tests/benchmarks/synthetic.py banking77 --model frozen --seeds 0,1,2,3,4

Sites are as in `nvflare-fm compare`; each adds rows up to `--share` of its training rows, by the product's own
functions. One line of JSON a run is added to `--results`; what is there already is not run again.

`--model two` trains LoRA on the first two layers of MiniLM with the product's own workers, at the rate of the study's
tuning, for all arms. `--model frozen` trains heads alone on the embeddings of all six layers, by the same rounds, steps
and head treatment, in seconds a run. Each arm then takes the rate that is best at seed 100, on public rows that no arm
trains on (mts: on two fifths of the test rows, which do not count then): of six, and then of half or double the best
while that is at an end.
"""

import hashlib
import json
import math
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from nvflare_fm.adapter import RoundTask
from nvflare_fm.compare import data_sets
from nvflare_fm.compare.bench import Bench
from nvflare_fm.compare.methods import METHODS, OURS, Method
from nvflare_fm.compare.run import read_lines
from nvflare_fm.compare.study import Study, Workspace, study
from nvflare_fm.privacy import gaussian
from nvflare_fm.site.tasks import classification_metrics
from nvflare_fm.site.training.fit import order
from nvflare_fm.site.training.layerwise import LayerwiseStep
from nvflare_fm.synthesis import candidates, keep, measure
from nvflare_fm.synthesis.add import add
from nvflare_fm.synthesis.choose import choose, threshold
from nvflare_fm.synthesis.embed import Encoder, embed, load
from nvflare_fm.synthesis.vote import noised, votes

DELTA, TUNING_SEED = 1e-5, 100
RATES, BOUNDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05), (1e-5, 1.0)  # of heads alone; tried first, and at most
SCALE = 5.0  # of unit vectors, about the length of a mean over tokens
COLUMNS = (  # of a table: name in a line, factor, digits
    ("worst_accuracy", 100, 1), ("worst_f1", 100, 1), ("gap_f1", 100, 1), ("distinct_2", 1, 3), ("coverage", 1, 3),
    ("nearer", 100, 1), ("auc", 1, 3),
)  # fmt: skip
HEAD = ("arm", "macro-F1", "over head", "over duplicates", *(name.replace("_", " ") for name, *_ in COLUMNS))
STEPS, BATCH = 5, 64  # of a round, of heads alone, as in `compare`'s "ours, head alone"
Row = dict[str, str]
ARMS = ("none", "head", "duplicates", "zero-shot", "1", "4", "inf", "public")  # a number is the ε of the votes


@dataclass(frozen=True)
class Setup:
    """A data set as the arms see it.

    Args:
        private: of a class, all sites together, or of a site where `by_site`.
        source: of the rows, as `compare` splits them over sites.
        per_label: candidates that are chosen of each label.
        rate: learning rate, from the study's tuning.
        words: of a text that are read, as few as the study's max_length leaves; 0: all.
        holds_out: two fifths of the test rows, to tune on: too few classes have public rows left.
    """

    source: str
    private: int
    per_label: int
    rate: float
    by_site: bool = False
    words: int = 0
    holds_out: bool = False


SETUPS = {
    "banking77": Setup("banking77-0.1", 20, 10, 0.01),
    "mts": Setup("mts-0.1", 20, 10, 0.005, words=60, holds_out=True),
    "medquad": Setup("medquad-types", 60, 10, 0.005, by_site=True, words=40),
}


@dataclass(frozen=True)
class Split:
    """Rows of each site: private ones to train on, and those to test on; public ones that no site has; and those to
    tune on, which are in none of the others where no public ones of most classes are left.
    """

    train: dict[str, list[Row]]
    test: dict[str, list[Row]]
    public: list[Row]
    tuning: list[Row]


def split(setup: Setup, seed: int) -> Split:
    """Take the private rows by chance, so many of each class (or site); the other rows to train on are public."""
    rows = (
        data_sets.split_by_label(setup.source, seed)
        if not setup.by_site
        else data_sets.split_medquad(setup.source, 0.2)
    )
    train: dict[str, list[Row]] = {}
    test: dict[str, list[Row]] = {}
    public: list[Row] = []
    tuning: list[Row] = []
    ordered = sorted(rows, key=lambda each: data_sets.fraction(f"{seed}/{each[2]['text']}"))
    taken: Counter[str] = Counter()
    for site, part, whole in ordered:
        row = whole | {"text": " ".join(whole["text"].split()[: setup.words])} if setup.words else whole
        group = site if setup.by_site else row["label"]
        if part == "test" and setup.holds_out and data_sets.fraction(f"tuning/{row['text']}") < 0.4:
            tuning.append(row)
        elif part == "test":
            test.setdefault(site, []).append(row)
        elif taken[group] < setup.private:
            taken[group] += 1
            train.setdefault(site, []).append(row)
        else:
            public.append(row)
    known = {row["label"] for found in train.values() for row in found}
    sites = sorted(site for site in train if test.get(site))
    return Split(
        {site: train[site] for site in sites},
        {site: [row for row in test[site] if row["label"] in known][:400] for site in sites},
        [row for row in public if row["label"] in known],
        [row for row in tuning if row["label"] in known],
    )


class Points:
    """Embeddings of texts, each made once."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder, self.known = encoder, dict[str, Tensor]()

    def __call__(self, texts: Sequence[str]) -> Tensor:
        new = [*dict.fromkeys(text for text in texts if text not in self.known)]
        self.known.update(zip(new, embed(new, self.encoder), strict=True))
        return torch.stack([self.known[text] for text in texts])


@dataclass(eq=False)
class Experiment:
    """A data set at a seed."""

    name: str
    seed: int
    share: float
    candidates: Path
    points_of: "Points"
    nearest: int = 1
    turns: bool = True
    chance: float = 0.5
    plain: bool = False  # no arm has the head treatment

    @cached_property
    def setup(self) -> Setup:
        return SETUPS[self.name]

    @cached_property
    def split(self) -> Split:
        return split(self.setup, self.seed)

    @cached_property
    def classes(self) -> list[str]:
        return sorted({row["label"] for rows in self.split.train.values() for row in rows})

    @cached_property
    def made(self) -> candidates.CandidateSet:
        found = candidates.read(self.candidates.read_bytes(), self.candidates.name)
        out = {**keep.duplicates(found.texts), **keep.personal_data(found.texts)}
        kept = [place for place, label in enumerate(found.labels) if place not in out and label in self.classes]
        return replace(found, rows=found.select(kept))

    @cached_property
    def points(self) -> Tensor:
        return self.points_of(self.made.texts)

    @cached_property
    def held_out(self) -> Tensor:
        return self.points_of([row["text"] for site in self.split.test for row in self.split.test[site]])

    def private_points(self, site: str) -> Tensor:
        return self.points_of([row["text"] for row in self.split.train[site]])

    def votes(self, epsilon: float) -> tuple[Tensor, float]:
        """The votes of all sites, each with its own noise, and the noise's standard deviation over all."""
        sigma = 0.0 if math.isinf(epsilon) else gaussian.noise_multiplier(epsilon, 1, DELTA)
        draw = torch.Generator().manual_seed(self.seed)
        total = torch.zeros(len(self.made.rows))
        for site, rows in self.split.train.items():
            mine = votes(
                self.private_points(site),
                [row["label"] for row in rows],
                range(len(rows)),
                self.points,
                self.made.labels,
                self.nearest,
            )
            total += noised(mine, sigma, lambda count: torch.randn(count, generator=draw, dtype=torch.float64))
        return total, sigma * math.sqrt(len(self.split.train))

    def offered(self, arm: str) -> list[Row]:
        """What an arm offers to every site, the best first."""
        if arm in ("none", "head", "duplicates"):
            return []
        if arm == "public":
            wanted = dict.fromkeys((row["label"] for row in self.split.public), self.setup.per_label)
            return _first(self.split.public, wanted)
        if arm == "zero-shot":
            return _first([each.row for each in self.made.rows], dict.fromkeys(self.made.labels, self.setup.per_label))
        found, sigma = self.votes(float(arm))
        chosen = choose(found, self.made.labels, self.setup.per_label, threshold(sigma, self.chance))
        return [each.row for each in self.made.select(chosen)]

    def added(self, arm: str, site: str, offered: Sequence[Row]) -> list[Row]:
        """What a site adds."""
        own = self.split.train[site]
        counts = Counter(row["label"] for row in own)
        turn = int(hashlib.sha256(site.encode()).hexdigest()[:8], 16) if self.turns else 0
        if arm == "duplicates":
            copies = own * 10
            return [copies[place] for place in add(counts, [row["label"] for row in copies], self.share, turn)]
        if arm != "public":
            copied = keep.near_copies([row["text"] for row in offered], [row["text"] for row in own])
            offered = [row for place, row in enumerate(offered) if place not in copied]
        return [offered[place] for place in add(counts, [row["label"] for row in offered], self.share, turn)]


def _first(rows: Sequence[Row], wanted: dict[Any, int]) -> list[Row]:
    left, found = Counter(wanted), []
    for row in rows:
        if left[row["label"]] > 0:
            left[row["label"]] -= 1
            found.append(row)
    return found


def carried_out(experiment: Experiment, arm: str, rate: float, rounds: int, model: str, root: Path) -> dict[str, Any]:
    """Train a federation and measure it: a line of the results."""
    began, rows = time.monotonic(), experiment.split
    offered = experiment.offered(arm)
    more = {site: experiment.added(arm, site, offered) for site in rows.train}
    everything = {
        "own": [row for site in rows.train for row in rows.train[site]],
        "test": [row for site in rows.test for row in rows.test[site]],
    }
    if model == "frozen":
        found = _scores(*_heads(experiment, arm, rate, rounds, more), experiment, rows.test)
    else:
        found = _workers(experiment, arm, rate, rounds, model, root, more, everything)
    added = [row for site in more for row in more[site]]
    return {
        "set": experiment.name, "arm": arm, "seed": experiment.seed, "rate": rate, "rounds": rounds, "model": model,
        "share": experiment.share, "nearest": experiment.nearest, "turns": experiment.turns,
        "chance": experiment.chance, "plain": experiment.plain, "rows": len(everything["own"]), "added": len(added),
        "different": len({row["text"] for row in added}), **{name: round(value, 4) for name, value in found.items()},
        **_measured(experiment, offered, added, everything), "seconds": round(time.monotonic() - began),
    }  # fmt: skip


def _heads(
    experiment: Experiment, arm: str, rate: float, rounds: int, more: dict[str, list[Row]]
) -> tuple[Tensor, Tensor]:
    """A federation that trains linear heads on embeddings, from zero: weight and bias."""
    classes = experiment.classes
    data = {}
    for site, own in experiment.split.train.items():
        rows = [*own, *more[site]]
        labels = torch.tensor([classes.index(row["label"]) for row in rows])
        data[site] = experiment.points_of([row["text"] for row in rows]), labels
    width = next(iter(data.values()))[0].shape[1]
    state = [torch.zeros(len(classes), width), torch.zeros(len(classes))]
    for number in range(rounds):
        sums = [torch.zeros_like(each) for each in state]
        for site, (points, labels) in data.items():
            parts = [each.clone().requires_grad_() for each in state]
            optimizer = torch.optim.AdamW(parts, lr=rate, weight_decay=0.0)
            if arm != "none" and not experiment.plain:
                optimizer.register_step_pre_hook(LayerwiseStep(parts, 8.0))
            count = STEPS * BATCH
            chosen = order(len(labels), number * count, count, f"{experiment.seed}/{site}")
            for step in range(STEPS):
                done = (number * STEPS + step) / (rounds * STEPS)
                optimizer.param_groups[0]["lr"] = rate * (1 + math.cos(math.pi * done)) / 2
                some = chosen[step * BATCH : (step + 1) * BATCH]
                optimizer.zero_grad()
                logits = SCALE * points[some] @ parts[0].T + parts[1]
                torch.nn.functional.cross_entropy(logits, labels[some]).backward()
                optimizer.step()
            sums = [total + part.detach() / len(data) for total, part in zip(sums, parts, strict=True)]
        state = sums
    return state[0], state[1]


def _scores(weight: Tensor, bias: Tensor, experiment: Experiment, test: dict[str, list[Row]]) -> dict[str, float]:
    """What a head scores on the test rows of each site, of all together, and on the sites' own rows to train on."""
    classes = experiment.classes

    def measured(rows: list[Row]) -> dict[str, float]:
        truth = torch.tensor([classes.index(row["label"]) for row in rows])
        logits = SCALE * experiment.points_of([row["text"] for row in rows]) @ weight.T + bias
        nats = torch.nn.functional.cross_entropy(logits, truth, reduction="none")
        columns = {"label": truth, "answer": logits.argmax(1), "nats": nats}
        return classification_metrics(columns, range(len(classes)))

    home = {site: measured(rows) for site, rows in test.items()}
    return _summary(
        home,
        measured([row for site in experiment.split.train for row in experiment.split.train[site]]),
        measured([row for site in test for row in test[site]]),
    )


def _summary(home: dict[str, dict[str, float]], own: dict[str, float], test: dict[str, float]) -> dict[str, float]:
    return {
        "macro_f1": test["macro_f1"],
        "accuracy": test["accuracy"],
        "worst_f1": min(found["macro_f1"] for found in home.values()),
        "worst_accuracy": min(found["accuracy"] for found in home.values()),
        "gap_f1": own["macro_f1"] - test["macro_f1"],
        "gap_accuracy": own["accuracy"] - test["accuracy"],
    }


def tuned(experiment: Experiment, arm: str, rounds: int, results: Path) -> float:
    """The rate at which an arm's heads score best on public rows that no arm trains on, at the tuning seed."""
    asked = {"tuning": True, "set": experiment.name, "arm": arm, "rounds": rounds, "share": experiment.share}
    asked |= {"nearest": experiment.nearest, "turns": experiment.turns, "chance": experiment.chance}
    asked |= {"plain": experiment.plain}
    lines = [line for line in read_lines(results) if asked.items() <= line.items()]
    if not lines:
        offered = experiment.offered(arm)
        more = {site: experiment.added(arm, site, offered) for site in experiment.split.train}
        taken = {row["text"] for row in experiment.offered("public")}
        known = {*experiment.classes}
        judge = (
            experiment.split.tuning
            or [r for r in experiment.split.public if r["text"] not in taken and r["label"] in known][:2000]
        )
        scores: dict[float, float] = {}
        left = [*RATES]
        while left:
            for rate in left:
                head = _heads(experiment, arm, rate, rounds, more)
                scores[rate] = round(_scores(*head, experiment, {"public": judge})["macro_f1"], 4)
            best = max(scores, key=lambda rate: scores[rate])
            left = [best / 2] if best == min(scores) else [best * 2] if best == max(scores) else []
            left = [rate for rate in left if BOUNDS[0] <= rate <= BOUNDS[1]]
        lines = [{**asked, "rate": best, "scores": scores}]
        _append(results, lines[0])
    return float(lines[-1]["rate"])


def _append(results: Path, line: dict[str, Any]) -> None:
    results.parent.mkdir(parents=True, exist_ok=True)
    with results.open("a") as out:
        out.write(json.dumps(line) + "\n")


def _workers(
    experiment: Experiment,
    arm: str,
    rate: float,
    rounds: int,
    model: str,
    root: Path,
    more: dict[str, list[Row]],
    everything: dict[str, list[Row]],
) -> dict[str, float]:
    """A federation of the product's workers."""
    rows, folder = experiment.split, root / f"{experiment.name}-{experiment.seed}-{arm}"
    for site, own in rows.train.items():
        _write(folder / site / "train.jsonl", [*own, *more[site]])
        _write(folder / site / "test.jsonl", rows.test[site])
    for part, found in everything.items():
        _write(folder / f"{part}.jsonl", found)
    workspace = Workspace(root / "work", root / "work" / "results")
    length = {"banking77": 24, "mts": 48, "medquad": 24}[experiment.name]
    small = study(f"synthetic-{model}", workspace, folder, _model(model), "", length, rounds, 0, (rate,))
    return _trained(small, folder, arm, rate, experiment.seed)


def _trained(small: Study, folder: Path, arm: str, rate: float, seed: int) -> dict[str, float]:
    bench = Bench(small, rate)
    method = METHODS[OURS] if arm != "none" else Method(training={"head_lr_ratio": 0.0})
    workers = bench.workers(method)
    done = deque(bench.rounds(method, workers, seed), maxlen=1)[0]
    task = RoundTask(bench.settled(method), done.combined.adapter, done.combined.manifest)
    home = {site: worker.validate(task) for site, worker in workers.items()}
    parts = {}
    for part in ("own", "test"):
        judge = bench._worker(f"judge-{part}", folder / "test.jsonl", folder / f"{part}.jsonl", 0, method)
        parts[part] = judge.validate(task)
    return _summary(home, parts["own"], parts["test"])


def _measured(
    experiment: Experiment, offered: list[Row], added: list[Row], everything: dict[str, list[Row]]
) -> dict[str, Any]:
    """Of the rows, not of what is trained on them."""
    private = torch.cat([experiment.private_points(site) for site in experiment.split.train])
    held_out = experiment.held_out
    texts = [row["text"] for row in everything["own"]] + [row["text"] for row in added]
    more = {row["text"] for row in added}
    points = experiment.points_of(sorted(more)) if more else torch.zeros(0, private.shape[1])
    found = {
        "distinct_2": round(measure.distinct_2(texts), 4),
        "coverage": round(measure.coverage(held_out, torch.cat([private, points])), 4),
    }
    if not offered:
        return found
    whole = experiment.points_of(sorted({row["text"] for row in offered}))
    near = measure.copying(whole, private, held_out)
    return found | {
        "coverage_added": round(measure.coverage(held_out, points), 4),
        "distance_made": round(near.made, 4), "distance_held_out": round(near.held_out, 4),
        "nearer": round(near.nearest, 4), "auc": round(measure.membership_auc(whole, private, held_out), 4),
    }  # fmt: skip


def _model(model: str) -> Path | None:
    return data_sets.minilm() if model == "full" else None


def _write(file: Path, rows: Sequence[Row]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def table(lines: Sequence[dict[str, Any]]) -> str:
    """Runs of one set as a table in Markdown, means over seeds, with the difference of each seed to two of the arms."""
    by = {arm: {line["seed"]: line for line in lines if line["arm"] == arm} for arm in ARMS}
    rows = [f"| {' | '.join(HEAD)} |", f"|{'---|' * len(HEAD)}"]
    for arm, found in by.items():
        if not found:
            continue
        scores = [100 * line["macro_f1"] for line in found.values()]
        spread = f" ± {stdev(scores):.1f}" if len(scores) > 1 else ""
        cells = [arm, f"{mean(scores):.1f}{spread}"]
        for other in ("head", "duplicates"):
            both = [
                100 * (found[seed]["macro_f1"] - by[other][seed]["macro_f1"]) for seed in found if seed in by[other]
            ]
            cells.append(
                "" if arm == other or not both else f"{mean(both):+.1f} ({min(both):+.1f} to {max(both):+.1f})"
            )
        for name, factor, digits in COLUMNS:
            known = [factor * line[name] for line in found.values() if name in line]
            cells.append(f"{mean(known):.{digits}f}" if known else "")
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def main(
    name: Annotated[str, typer.Argument(help=", ".join(SETUPS))],
    arms: str = ",".join(ARMS),
    seeds: str = "0",
    rounds: int = 20,
    rate: Annotated[float, typer.Option(help="0: that of the study's tuning")] = 0.0,
    share: float = 0.4,
    model: Annotated[str, typer.Option(help="two: the first two layers of MiniLM; full: all six")] = "two",
    nearest: Annotated[int, typer.Option(help="candidates that a row votes for")] = 1,
    turns: Annotated[bool, typer.Option(help="whether sites begin at different candidates")] = True,
    chance: Annotated[float, typer.Option(help="with which noise alone passes the threshold")] = 0.5,
    plain: Annotated[bool, typer.Option("--plain", help="no arm has the head treatment; frozen alone")] = False,
    show: Annotated[bool, typer.Option("--table", help="print the results as a table, and run nothing")] = False,
    root: Path = Path("runs/synthetic"),
    results: Path = Path("tests/benchmarks/results/synthetic.jsonl"),
) -> None:
    if show:
        same = {"set": name, "rounds": rounds, "model": model, "share": share, "nearest": nearest, "turns": turns}
        same |= {"chance": chance, "plain": plain}
        print(table([line for line in read_lines(results) if same.items() <= line.items() and "tuning" not in line]))
        return
    torch.set_num_threads(1)
    points_of = Points(load(data_sets.minilm()))

    def at(seed: int) -> Experiment:
        return Experiment(name, seed, share, root / f"{name}.jsonl", points_of, nearest, turns, chance, plain)

    for seed in map(int, seeds.split(",")):
        experiment = at(seed)
        for arm in arms.split(","):
            chosen = rate or (
                tuned(at(TUNING_SEED), arm, rounds, results) if model == "frozen" else experiment.setup.rate
            )
            asked = {"set": name, "arm": arm, "seed": seed, "rate": chosen, "rounds": rounds, "model": model}
            asked |= {"share": share, "nearest": nearest, "turns": turns, "chance": chance, "plain": plain}
            if not any(asked.items() <= line.items() for line in read_lines(results)):
                line = carried_out(experiment, arm, chosen, rounds, model, root)
                _append(results, line)
                print(json.dumps(line), flush=True)


if __name__ == "__main__":
    typer.run(main)
