"""Sites that differ: our default against what others do, in data, in rank, in both. Resumable; a line a measurement.

    python tests/benchmarks/heterogeneity.py tune banking77-0.3      # the same budget for every method, held-out rows
    python tests/benchmarks/heterogeneity.py run banking77-0.1       # fixed settings, fresh seeds
    python tests/benchmarks/heterogeneity.py report banking77-0.1    # tables, paired differences and a figure
    python tests/benchmarks/heterogeneity.py grid                    # tunes and runs all that the docs report
    python tests/benchmarks/heterogeneity.py overview                # what the grid found, a study a column

Studies: banking77-A and banking77lm-A with A = 0 (IID), 1, 0.3 or 0.1, medquad-types, medquad-lm. `@random` behind a
name: from a base model whose weights are random. Data of your own, one folder per site with train.jsonl and
test.jsonl (`text` and `label`, or `prompt` and `completion`):

    python tests/benchmarks/heterogeneity.py tune NAME --folder SITES --model BASE     # then run, then report

What was measured lies in tests/benchmarks/results and is gone on with; `--cores` says how many runs go side by side.

A method's learning rate is chosen once for a data set and a model: banking77 is tuned at A = 0.3, for all A. Sites have
the ranks 2, 2, 2, 4, 4, 8, 8, 16, 16, 32 in the order of their names, unless a method needs one rank everywhere.
"""

import json
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import comparison
import torch
import typer
from bench import POINTS, RESULTS, Bench, Study, baseline, federated, overall, study
from comparison import Results, lines
from methods import AT_HOME, BASELINES, COMPARED, METHODS, OURS, OWN_RATE, PARTS, PRECISIONS, TOGETHER
from rich.console import Console
from rich.progress import track

app = typer.Typer(add_completion=False)
console = Console(width=150)
RATES = [5e-3, 1e-2, 2e-2]  # what every method tries first; then half or double, while the best is at an end
MOST_RATES, TUNING_SEED = 5, 100
ALPHAS = ("0", "1", "0.3", "0.1")
BANKING = [f"{kind}-{alpha}" for alpha in reversed(ALPHAS) for kind in ("banking77", "banking77lm")]
RANDOM = [OURS, "pooled", TOGETHER]  # also from random weights
GRID = [*BANKING[:2], "medquad-types", "medquad-lm", *BANKING[2:]]
BESIDE = [AT_HOME, *PARTS, *PRECISIONS]  # in the first four of them …
SAME = {
    "sequence_classification": "ours, plain steps",
    "causal_lm": "ours, FedExP's steps",
}  # … but what ours does anyway

Folder = typer.Option(None, help="one folder per site with train.jsonl and test.jsonl")
Model = typer.Option(None, help="folder of the base model; else MiniLM's first two layers, or stories260k")
Length = typer.Option(0, help="tokens a text is cut at; 0: as the docs say")
Cores = typer.Option(2, help="runs at a time, one core each")
Methods = typer.Option("", help="names, separated by semicolons; else all that the docs compare")


@dataclass(frozen=True)
class Job:
    """One run: a method in a study, at a rate, from a seed."""

    study: Study
    method: str
    rate: float
    seed: int
    tuning: bool = False

    @property
    def file(self) -> Path:
        return tuning_file(self.study.name) if self.tuning else RESULTS / f"{self.study.name}.jsonl"

    def done(self) -> bool:
        mine = (self.method, self.seed, self.rate)
        return any((row["method"], row["seed"], row["rate"]) == mine for row in lines(self.file))


def tuning_file(name: str) -> Path:
    data, at, start = name.partition("@")
    kind, _, alpha = data.rpartition("-")
    return RESULTS / f"{f'{kind}-0.3' if alpha in ALPHAS else data}{at}{start}-tuning.jsonl"


def carry_out(job: Job) -> tuple[list[dict[str, Any]], float]:
    """The lines of one run, and the seconds it took."""
    torch.set_num_threads(1)
    began, bench = time.monotonic(), Bench(job.study, job.rate, job.tuning)
    if job.method in BASELINES:
        found = list(baseline(bench, job.method, job.seed))
    else:
        found = list(federated(bench, METHODS[job.method], job.seed, 1 if job.tuning else POINTS))
    who = {"method": job.method, "seed": job.seed, "rate": job.rate}
    return [
        rounded({**who, "score": overall(row["scores"], bench.rows), **row}) for row in found
    ], time.monotonic() - began


def rounded(row: dict[str, Any]) -> dict[str, Any]:
    """Without digits that say nothing; the rate is a setting, no measurement."""
    return row | {
        "score": round(row["score"], 5),
        "scores": {site: round(score, 5) for site, score in row["scores"].items()},
    }


def carry_out_all(jobs: list[Job], cores: int) -> None:
    """Those that the results lack; what is found is written as each run ends."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(cores, mp_context=context) as pool:
        running = {pool.submit(carry_out, job): job for job in jobs if not job.done()}
        try:
            for future in track(as_completed(running), "runs", len(running), console=console):
                write(running[future], *future.result())
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def write(job: Job, rows: list[dict[str, Any]], seconds: float) -> None:
    job.file.parent.mkdir(parents=True, exist_ok=True)
    with job.file.open("a") as out:
        out.writelines(json.dumps(row) + "\n" for row in rows)
    scores = " ".join(f"{row['score']:.4f}" for row in rows)
    console.log(f"{job.study.name}, {job.method} at {job.rate:g}, seed {job.seed}: {scores} in {seconds:.0f} s")


def named(methods: str, known: list[str]) -> list[str]:
    """
    Raises:
        BadParameter: there is no such method.
    """
    asked = [method.strip() for method in methods.split(";")] if methods else known
    if unknown := sorted({*asked} - {*METHODS, *BASELINES}):
        raise typer.BadParameter(f"no method {unknown[0]!r}; known: {[*METHODS, *BASELINES]}")
    return asked


def tried(name: str) -> dict[str, dict[float, float]]:
    """method → rate → score; of sites alone the mean over them."""
    found: dict[str, dict[float, list[float]]] = {}
    for row in lines(tuning_file(name)):
        found.setdefault(row["method"], {}).setdefault(row["rate"], []).append(row["score"])
    return {method: {rate: mean(scores) for rate, scores in rates.items()} for method, rates in found.items()}


def best(scores: dict[float, float], lower_is_better: bool) -> float:
    return (min if lower_is_better else max)(scores, key=lambda rate: scores[rate])


def tuned(name: str, lower_is_better: bool) -> dict[str, float]:
    """The best rate of each method. Parts of ours that were not tuned take that of ours."""
    rates = {method: best(scores, lower_is_better) for method, scores in tried(name).items()}
    if OURS in rates:
        rates = dict.fromkeys([AT_HOME, *PARTS, *PRECISIONS], rates[OURS]) | rates
    return rates


def next_rates(scores: dict[float, float], lower_is_better: bool) -> list[float]:
    """What a method is still to try."""
    if missing := [rate for rate in RATES if rate not in scores]:
        return missing
    found = best(scores, lower_is_better)
    beyond = found / 2 if found == min(scores) else found * 2
    return [] if len(scores) == MOST_RATES or beyond in scores else [beyond]


def tune_all(data: Study, methods: list[str], cores: int) -> None:
    while jobs := [
        Job(data, method, rate, TUNING_SEED, True)
        for method in methods
        if method != AT_HOME  # goes on from ours
        for rate in next_rates(tried(data.name).get(method, {}), data.lower_is_better)
    ]:
        carry_out_all(jobs, cores)


def to_run(data: Study, methods: list[str], seeds: list[int]) -> list[Job]:
    """
    Raises:
        BadParameter: a method has no rate yet.
    """
    rates = tuned(data.name, data.lower_is_better)
    if untuned := [method for method in methods if method not in rates]:
        raise typer.BadParameter(f"no rate for {untuned}: run tune first")
    return [Job(data, method, rates[method], seed) for seed in seeds for method in methods]


@app.command()
def tune(
    name: str,
    folder: Path = Folder,
    model: Path = Model,
    max_length: int = Length,
    methods: str = Methods,
    cores: int = Cores,
) -> None:
    """Finds each method's learning rate on held-out training rows; every method tries by the same rule."""
    tune_all(study(name, folder, model, max_length), named(methods, COMPARED), cores)


@app.command()
def run(
    name: str,
    folder: Path = Folder,
    model: Path = Model,
    max_length: int = Length,
    methods: str = Methods,
    seeds: int = 3,
    first_seed: int = 0,
    cores: int = Cores,
) -> None:
    """Runs what the results lack."""
    seeds_ = list(range(first_seed, first_seed + seeds))
    carry_out_all(to_run(study(name, folder, model, max_length), named(methods, COMPARED), seeds_), cores)


@app.command()
def grid(seeds: int = 3, cores: int = Cores) -> None:
    """All that the docs report, the most skewed data first."""
    for name in ("banking77-0.3", "medquad-types"):
        tune_all(study(name), [*COMPARED, *OWN_RATE, TOGETHER], cores)
    for name in ("banking77lm-0.3", "medquad-lm"):
        tune_all(study(name), COMPARED, cores)
    tune_all(study("banking77-0.3@random"), RANDOM, cores)
    jobs = [job for name in GRID for job in to_run(study(name), COMPARED, list(range(seeds)))]
    for data in map(study, GRID[:4]):
        jobs += to_run(data, [part for part in BESIDE if part != SAME[data.plan["task"]]], list(range(seeds)))
    for name in ("banking77-0.1", "medquad-types"):
        jobs += to_run(study(name), [*OWN_RATE, TOGETHER], list(range(seeds)))
    for name in ("banking77-0.1", "banking77-0"):
        jobs += to_run(study(f"{name}@random"), RANDOM, list(range(seeds)))
    carry_out_all(jobs, cores)


@app.command()
def report(name: str, folder: Path = Folder, model: Path = Model, against: str = OURS) -> None:
    """Tables and a figure of what has been run."""
    results = Results(study(name, folder, model))
    console.print(comparison.compared(results, against))
    if any(row["method"] == "alone" for row in results.rows):
        console.print(comparison.homes(results))
    console.print(f"figure: {comparison.picture(results.study)}")


@app.command()
def overview() -> None:
    """All studies of the grid side by side: what was labelled, then what was written."""
    for lower in (False, True):
        studies = [found for found in map(study, GRID) if found.lower_is_better == lower]
        console.print(comparison.overview(studies))


if __name__ == "__main__":
    app()
