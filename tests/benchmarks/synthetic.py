"""What synthetic rows are worth, and what they tell: arms that differ in the rows that sites add, in one process.

    nvflare-fm synth generate LABELS … -o runs/synthetic/banking77.jsonl          (see docs/synthetic_data.md)
    python tests/benchmarks/synthetic.py banking77 --seeds 0 --arms none,head,duplicates,zero-shot,1,4,inf,public

Sites are as in `nvflare-fm compare`; each adds rows up to `--share` of its training rows, by the product's own
functions. One line of JSON a run is added to `--results`; what is there already is not run again. The rate is that of
the study's tuning without synthetic rows, for all arms; `--tune` tries others on held-out public rows.
"""

import hashlib
import json
import math
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
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
from nvflare_fm.synthesis import candidates, keep, measure
from nvflare_fm.synthesis.add import add
from nvflare_fm.synthesis.choose import choose, threshold
from nvflare_fm.synthesis.embed import Encoder, embed, load
from nvflare_fm.synthesis.vote import noised, votes

DELTA = 1e-5
Row = dict[str, str]
ARMS = ("none", "head", "duplicates", "zero-shot", "1", "4", "inf", "public")  # a number is the ε of the votes


@dataclass(frozen=True)
class Setup:
    """A data set as the arms see it.

    Args:
        private: of a class, all sites together, or of a site where `by_site`.
        alpha: of the split over sites.
        per_label: candidates that are chosen of each label.
        rate: learning rate, from the study's tuning.
    """

    source: str
    private: int
    per_label: int
    rate: float
    by_site: bool = False


SETUPS = {
    "banking77": Setup("banking77-0.1", 20, 10, 0.01),
    "mts": Setup("mts-0.1", 20, 10, 0.005),
    "medquad": Setup("medquad-types", 60, 20, 0.005, by_site=True),
}


@dataclass(frozen=True)
class Split:
    """Rows of each site: private ones to train on, and those to test on; and public ones that no site has."""

    train: dict[str, list[Row]]
    test: dict[str, list[Row]]
    public: list[Row]


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
    ordered = sorted(rows, key=lambda each: data_sets.fraction(f"{seed}/{each[2]['text']}"))
    taken: Counter[str] = Counter()
    for site, part, row in ordered:
        group = site if setup.by_site else row["label"]
        if part == "test":
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
        public,
    )


@dataclass(eq=False)
class Experiment:
    """A data set at a seed."""

    name: str
    seed: int
    share: float
    candidates: Path
    encoder: Encoder
    nearest: int = 1
    turns: bool = True

    @cached_property
    def setup(self) -> Setup:
        return SETUPS[self.name]

    @cached_property
    def split(self) -> Split:
        return split(self.setup, self.seed)

    @cached_property
    def made(self) -> candidates.CandidateSet:
        found = candidates.read(self.candidates.read_bytes(), self.candidates.name)
        out = {**keep.duplicates(found.texts), **keep.personal_data(found.texts)}
        return replace(found, rows=found.select([place for place in range(len(found.rows)) if place not in out]))

    @cached_property
    def points(self) -> Tensor:
        return embed(self.made.texts, self.encoder)

    @cached_property
    def held_out(self) -> Tensor:
        return embed([row["text"] for site in self.split.test for row in self.split.test[site]], self.encoder)

    @cache  # noqa: B019  one experiment lives as long as the program
    def private_points(self, site: str) -> Tensor:
        return embed([row["text"] for row in self.split.train[site]], self.encoder)

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
        if arm == "public":
            wanted = dict.fromkeys((row["label"] for row in self.split.public), self.setup.per_label)
            return _first(self.split.public, wanted)
        if arm == "zero-shot":
            return _first([each.row for each in self.made.rows], dict.fromkeys(self.made.labels, self.setup.per_label))
        found, sigma = self.votes(float(arm))
        chosen = choose(found, self.made.labels, self.setup.per_label, threshold(sigma, 0.5))
        return [each.row for each in self.made.select(chosen)]

    def added(self, arm: str, site: str, offered: Sequence[Row]) -> list[Row]:
        """What a site adds."""
        own = self.split.train[site]
        counts = Counter(row["label"] for row in own)
        turn = int(hashlib.sha256(site.encode()).hexdigest()[:8], 16) if self.turns else 0
        if arm in ("none", "head"):
            return []
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
    offered = [] if arm in ("none", "head", "duplicates") else experiment.offered(arm)
    folder, added = root / f"{experiment.name}-{experiment.seed}-{arm}", []
    for site, own in rows.train.items():
        more = experiment.added(arm, site, offered)
        added += more
        _write(folder / site / "train.jsonl", [*own, *more])
        _write(folder / site / "test.jsonl", rows.test[site])
    everything = {
        "own": [row for site in rows.train for row in rows.train[site]],
        "test": [row for site in rows.test for row in rows.test[site]],
    }
    for part, found in everything.items():
        _write(root / folder.name / f"{part}.jsonl", found)
    workspace = Workspace(root / "work", root / "work" / "results")
    length = {"banking77": 24, "mts": 48, "medquad": 24}[experiment.name]
    small = study(f"synthetic-{model}", workspace, folder, _model(model, workspace), "", length, rounds, 0, (rate,))
    found = _trained(small, folder, arm, rate, experiment.seed)
    return {
        "set": experiment.name, "arm": arm, "seed": experiment.seed, "rate": rate, "rounds": rounds, "model": model,
        "share": experiment.share, "nearest": experiment.nearest, "turns": experiment.turns,
        "rows": len(everything["own"]), "added": len(added), "different": len({row["text"] for row in added}),
        **found, **_measured(experiment, arm, offered, added, everything), "seconds": round(time.monotonic() - began),
    }  # fmt: skip


def _trained(small: Study, folder: Path, arm: str, rate: float, seed: int) -> dict[str, Any]:
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
    gaps = {name: parts["own"][name] - parts["test"][name] for name in ("accuracy", "macro_f1")}
    return {
        "macro_f1": round(parts["test"]["macro_f1"], 4), "accuracy": round(parts["test"]["accuracy"], 4),
        "worst_f1": round(min(found["macro_f1"] for found in home.values()), 4),
        "worst_accuracy": round(min(found["accuracy"] for found in home.values()), 4),
        "gap_f1": round(gaps["macro_f1"], 4), "gap_accuracy": round(gaps["accuracy"], 4),
    }  # fmt: skip


def _measured(
    experiment: Experiment, arm: str, offered: list[Row], added: list[Row], everything: dict[str, list[Row]]
) -> dict[str, Any]:
    """Of the rows, not of what is trained on them."""
    encoder = experiment.encoder
    private = torch.cat([experiment.private_points(site) for site in experiment.split.train])
    held_out = experiment.held_out
    texts = [row["text"] for row in everything["own"]] + [row["text"] for row in added]
    more = {row["text"] for row in added}
    points = embed(sorted(more), encoder)
    found = {
        "distinct_2": round(measure.distinct_2(texts), 4),
        "coverage": round(measure.coverage(held_out, torch.cat([private, points])), 4),
    }
    if not offered:
        return found
    whole = embed(sorted({row["text"] for row in offered}), encoder)
    near = measure.copying(whole, private, held_out)
    return found | {
        "coverage_added": round(measure.coverage(held_out, points), 4),
        "distance_made": round(near.made, 4), "distance_held_out": round(near.held_out, 4),
        "nearer": round(near.nearest, 4), "auc": round(measure.membership_auc(whole, private, held_out), 4),
    }  # fmt: skip


def _model(model: str, workspace: Workspace) -> Path | None:
    return data_sets.minilm() if model == "full" else None


def _write(file: Path, rows: Sequence[Row]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


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
    root: Path = Path("runs/synthetic"),
    results: Path = Path("tests/benchmarks/results/synthetic.jsonl"),
) -> None:
    torch.set_num_threads(1)
    encoder = load(data_sets.minilm())
    for seed in map(int, seeds.split(",")):
        experiment = Experiment(name, seed, share, root / f"{name}.jsonl", encoder, nearest, turns)
        for arm in arms.split(","):
            asked = {"set": name, "arm": arm, "seed": seed, "rate": rate or experiment.setup.rate, "rounds": rounds}
            asked |= {"model": model, "share": share, "nearest": nearest, "turns": turns}
            if not any(asked.items() <= line.items() for line in read_lines(results)):
                line = carried_out(experiment, arm, asked["rate"], rounds, model, root)
                results.parent.mkdir(parents=True, exist_ok=True)
                with results.open("a") as out:
                    out.write(json.dumps(line) + "\n")
                print(json.dumps(line), flush=True)


if __name__ == "__main__":
    typer.run(main)
