"""Federated against zero-shot, local-only and pooled training: stories260k in NF4 on MedQuAD by NIH institute.

    python tests/benchmarks/federation.py run
    python tests/benchmarks/federation.py report

Every arm takes the same number of optimizer steps at the same batch size and learning rate: a site alone and the
pooled data S steps, the federation S steps at each site in rounds of `local_steps`. Every adapter is measured on
every site's test set. Results are appended to a file, a line per measurement; what is there is not run again.
"""

import json
import statistics
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from nvflare_fm.adapter import Adapter, Manifest, RoundTask
from nvflare_fm.compare import data_sets
from nvflare_fm.config import Aggregation, RoundPlan
from nvflare_fm.job.settle import settle
from nvflare_fm.simulate import federate, train_alone
from nvflare_fm.site.offer.site_config import DataSource, ModelSource, SiteConfig
from nvflare_fm.site.worker import Worker

app = typer.Typer(add_completion=False)
console = Console(width=140)
RUNS = Path("runs/federation")
RESULTS = RUNS / "lm.jsonl"
ROUNDS, TEST_ROWS = 15, 100  # of each site, the first ones: the file's order says nothing about how hard they are
PLAN = {
    "task": "causal_lm",
    "max_length": 256,
    "peft": {"method": "lora", "rank": 8, "lora_alpha": 16},
    "training": {"local_steps": 8, "batch_size": 8, "learning_rate": 5e-3, "lr_scheduler_type": "cosine"},
    "evaluation": {"before": False, "after": False, "max_examples": TEST_ROWS},
}
METRIC = "bits_per_byte"


class Bench:
    """Its workers, which keep their tokenized rows, its arms, its measurements."""

    def __init__(self, lr: float | None) -> None:
        root = data_sets.write("medquad-lm", RUNS / "data" / "medquad-lm")
        self.names = sorted(p.name for p in root.iterdir() if p.is_dir())
        plan = settle(RoundPlan.read(PLAN, "study"), Aggregation()).plan
        training = plan.training.model_copy(update={"learning_rate": lr or plan.training.learning_rate})
        self.plan = plan.model_copy(update={"training": training})
        (root / "pooled.jsonl").write_text("".join((root / n / "train.jsonl").read_text() for n in self.names))
        self.workers = {n: self._worker(n, root / n / "train.jsonl", root / n) for n in self.names}
        self.pooled = self._worker("pooled", root / "pooled.jsonl", root / self.names[0])

    def _worker(self, name: str, train: Path, folder: Path) -> Worker:
        config = SiteConfig(
            models={"base": ModelSource(path=str(data_sets.stories260k()))},
            data={"notes": DataSource(train=str(train.resolve()), validation=str((folder / "test.jsonl").resolve()))},
            privacy=data_sets.OPEN,
        )
        return Worker(name, config)

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
            for last in federate(self.workers, self.plan, Aggregation(), ROUNDS):
                console.log(f"round {last.number + 1}/{ROUNDS}")
            assert last
            return last.combined.adapter, last.combined.manifest
        worker = self.pooled if name == "pooled" else self.workers[name.removeprefix("alone:")]
        adapter, manifest, _ = train_alone(worker, self.plan, ROUNDS)
        return adapter, manifest


@app.command()
def run(seeds: int = 3, first_seed: int = 0, lr: float = 0.0, arms: str = "") -> None:
    """Runs what the results file lacks, a line per arm, seed and test set."""
    torch.set_num_threads(1)
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    bench = Bench(lr or None)
    for seed in range(first_seed, first_seed + seeds):
        bench.sow(seed)
        wanted = arms.split(",") if arms else ["zero_shot", "pooled", *(f"alone:{n}" for n in bench.names), "federated"]
        done = {(r["arm"], r["seed"]) for r in rows()}
        for arm in wanted:
            if (arm, seed) in done:
                continue
            started = time.monotonic()
            measured = bench.measure(*bench.arm(arm))
            console.log(f"seed {seed} {arm}: {time.monotonic() - started:.0f} s")
            with RESULTS.open("a") as results:
                for site, metrics in measured.items():
                    results.write(json.dumps({"arm": arm, "seed": seed, "test": site, "lr": lr, **metrics}) + "\n")


def rows() -> list[dict[str, Any]]:
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def spread(values: Iterable[float]) -> str:
    found = list(values)
    return f"{statistics.mean(found):.3f} ± {statistics.stdev(found) if len(found) > 1 else 0:.3f}"


@app.command()
def report() -> None:
    """Per site and over all: mean ± standard deviation over seeds, and the gap closed."""
    score = {(r["arm"], r["seed"], r["test"]): r[METRIC] for r in rows()}
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
    table = Table("test set", *arms, title=f"{METRIC}, seeds {seeds}")
    for test in tests:
        table.add_row(test, *(spread(arm(test)) for arm in arms.values()))
    means = {a: [statistics.mean(v) for v in zip(*(list(f(t)) for t in tests), strict=True)] for a, f in arms.items()}
    table.add_row("mean over test sets", *(spread(v) for v in means.values()), style="bold")
    table.add_row(
        "worst site",
        *(spread(max(v) for v in zip(*(list(f(t)) for t in tests), strict=True)) for f in arms.values()),
    )
    console.print(table)
    for alone_ in ("alone, at home", "alone, mean of all sites' models"):
        closed = [(f - a) / (p - a) for a, f, p in zip(means[alone_], means["federated"], means["pooled"], strict=True)]
        console.print(f"gap closed from '{alone_}' to pooled: {spread(closed)} {[f'{c:.2f}' for c in closed]}")


if __name__ == "__main__":
    app()
