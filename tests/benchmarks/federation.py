"""Federated against zero-shot, local-only and pooled training, on real data: one folder per site, one command.

    python tests/benchmarks/federation.py run lm                 # MedQuAD by NIH institute, stories260k in NF4
    python tests/benchmarks/federation.py run classification     # answer → question type, MiniLM in NF4
    python tests/benchmarks/federation.py report lm

Every arm takes the same number of optimizer steps at the same batch size and learning rate: a site alone and the
pooled data S steps, the federation S steps at each site in rounds of `local_steps`. Every adapter is measured on
every site's test set. Results are appended to a file, a line per measurement; what is there is not run again.
"""

import json
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sites
import torch
import typer
from rich.console import Console
from rich.table import Table

from nvflare_fm.adapter import Adapter, Manifest, RoundTask
from nvflare_fm.combination import settle
from nvflare_fm.config import Aggregation, RoundPlan, SiteOverrides
from nvflare_fm.simulate import alone, federate
from nvflare_fm.site.site_config import DataSource, ModelSource, SiteConfig
from nvflare_fm.site.worker import Worker

app = typer.Typer(add_completion=False)
console = Console(width=140)
RUNS = Path("runs/federation")


@dataclass(frozen=True)
class Study:
    """A data set, a base model and a plan."""

    data: str
    model: Path
    metric: str
    plan: Mapping[str, Any]
    rounds: int
    ranks: tuple[int, ...]  # of the sites by name, in turn
    test_rows: int = 100  # of each site, the first ones: the file's order says nothing about how hard they are


def lm() -> Study:
    return Study(
        data="medquad-lm",
        model=sites.MODELS["stories260k"],
        metric="bits_per_byte",
        plan={
            "task": "causal_lm",
            "max_length": 256,
            "peft": {"method": "lora", "rank": 8, "lora_alpha": 16},
            "training": {"local_steps": 8, "batch_size": 8, "learning_rate": 5e-3, "lr_scheduler_type": "cosine"},
        },
        rounds=15,
        ranks=(8,),
    )


def classification() -> Study:
    return Study(
        data="medquad-types",
        model=sites.minilm(),
        metric="macro_f1",
        plan={
            "task": "sequence_classification",
            "max_length": 32,
            "peft": {"method": "lora", "rank": 16, "lora_alpha": 16},
            "training": {
                "local_steps": 8,
                "batch_size": 16,
                "learning_rate": 1e-3,
                "lr_scheduler_type": "cosine",
                "warmup_ratio": 0.05,
            },
        },
        rounds=20,
        ranks=(4, 8, 16),
    )


STUDIES = {"lm": lm, "classification": classification}


class Bench:
    """One study: its workers, which keep their tokenized rows, its arms, its measurements."""

    def __init__(self, study: Study, lr: float | None) -> None:
        root = sites.write(study.data, RUNS / "data" / study.data)
        self.study, self.names = study, sorted(p.name for p in root.iterdir() if p.is_dir())
        plan = {**study.plan, "labels": json.loads((root / "labels.json").read_text())}
        plan["training"] = {**plan["training"], **({"learning_rate": lr} if lr else {})}
        plan["evaluation"] = {"before": False, "after": False, "max_examples": study.test_rows}
        self.plan = settle(RoundPlan.read(plan, "study"), Aggregation())
        (root / "pooled.jsonl").write_text("".join((root / n / "train.jsonl").read_text() for n in self.names))
        ranks = {n: study.ranks[i % len(study.ranks)] for i, n in enumerate(self.names)}
        self.workers = {n: self._worker(n, root / n / "train.jsonl", root / n, ranks[n]) for n in self.names}
        self.pooled = self._worker("pooled", root / "pooled.jsonl", root / self.names[0], max(study.ranks))

    def _worker(self, name: str, train: Path, folder: Path, rank: int) -> Worker:
        config = SiteConfig(
            models={"base": ModelSource(path=str(self.study.model))},
            data={"notes": DataSource(train=str(train.resolve()), validation=str((folder / "test.jsonl").resolve()))},
        )
        return Worker(name, config, SiteOverrides(rank=rank))

    def sow(self, seed: int) -> None:
        self.plan = self.plan.model_copy(update={"seed": seed})

    def measure(self, adapter: Adapter, manifest: Manifest | None) -> dict[str, dict[str, float]]:
        task = RoundTask(self.plan, adapter, manifest)
        return {n: self.workers[n].validate(task) for n in self.names}

    def arm(self, name: str) -> tuple[Adapter, Manifest | None]:
        if name == "zero_shot":
            return Adapter(), None
        if name == "federated":
            last = None
            for last in federate(self.workers, self.plan, Aggregation(), self.study.rounds):
                console.log(f"round {last.number + 1}/{self.study.rounds}")
            assert last
            return last.combined.adapter, last.combined.manifest
        worker = self.pooled if name == "pooled" else self.workers[name.removeprefix("alone:")]
        adapter, manifest, _ = alone(worker, self.plan, self.study.rounds)
        return adapter, manifest


@app.command()
def run(name: str, seeds: int = 3, first_seed: int = 0, lr: float = 0.0, arms: str = "", out: str = "") -> None:
    """Runs what the results file lacks, a line per arm, seed and test set."""
    torch.set_num_threads(1)
    study = STUDIES[name]()
    file = RUNS / f"{out or name}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    bench = Bench(study, lr or None)
    for seed in range(first_seed, first_seed + seeds):
        bench.sow(seed)
        wanted = arms.split(",") if arms else ["zero_shot", "pooled", *(f"alone:{n}" for n in bench.names), "federated"]
        done = {(r["arm"], r["seed"]) for r in rows(file)}
        for arm in wanted:
            if (arm, seed) in done:
                continue
            started = time.monotonic()
            measured = bench.measure(*bench.arm(arm))
            console.log(f"seed {seed} {arm}: {time.monotonic() - started:.0f} s")
            with file.open("a") as results:
                for site, metrics in measured.items():
                    results.write(json.dumps({"arm": arm, "seed": seed, "test": site, "lr": lr, **metrics}) + "\n")


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def spread(values: Iterable[float]) -> str:
    found = list(values)
    return f"{statistics.mean(found):.3f} ± {statistics.stdev(found) if len(found) > 1 else 0:.3f}"


@app.command()
def report(name: str, out: str = "") -> None:
    """Per site and over all: mean ± standard deviation over seeds, and the gap closed."""
    metric = STUDIES[name]().metric
    score = {(r["arm"], r["seed"], r["test"]): r[metric] for r in rows(RUNS / f"{out or name}.jsonl")}
    seeds = sorted({s for _, s, _ in score})
    tests = sorted({t for _, _, t in score})

    def by_seed(arm: str, test: str) -> Iterator[float]:
        for seed in seeds:
            yield score[arm, seed, test]

    def alone_elsewhere(test: str) -> Iterator[float]:
        """The mean over the sites' own models of the score on `test`: what a site can expect of a lone model."""
        for seed in seeds:
            yield statistics.mean(score[f"alone:{n}", seed, test] for n in tests)

    arms = {
        "zero-shot": lambda t: by_seed("zero_shot", t),
        "alone, at home": lambda t: by_seed(f"alone:{t}", t),
        "alone, mean of all sites' models": alone_elsewhere,
        "federated": lambda t: by_seed("federated", t),
        "pooled": lambda t: by_seed("pooled", t),
    }
    table = Table("test set", *arms, title=f"{name}: {metric}, seeds {seeds}")
    for test in tests:
        table.add_row(test, *(spread(arm(test)) for arm in arms.values()))
    means = {a: [statistics.mean(v) for v in zip(*(list(f(t)) for t in tests), strict=True)] for a, f in arms.items()}
    table.add_row("mean over test sets", *(spread(v) for v in means.values()), style="bold")
    worst = max if metric == "bits_per_byte" else min
    table.add_row(
        "worst site",
        *(spread(worst(v) for v in zip(*(list(f(t)) for t in tests), strict=True)) for f in arms.values()),
    )
    console.print(table)
    for alone_ in ("alone, at home", "alone, mean of all sites' models"):
        closed = [(f - a) / (p - a) for a, f, p in zip(means[alone_], means["federated"], means["pooled"], strict=True)]
        console.print(f"gap closed from '{alone_}' to pooled: {spread(closed)} {[f'{c:.2f}' for c in closed]}")


if __name__ == "__main__":
    app()
