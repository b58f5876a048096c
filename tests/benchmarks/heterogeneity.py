"""Sites that differ: our default against what others do, in data, in rank, in both. Resumable; a line a measurement.

    python tests/benchmarks/heterogeneity.py run banking77-0.1       # tunes, runs, and reports as below
    python tests/benchmarks/heterogeneity.py report banking77-0.1    # tables, paired differences and a figure
    python tests/benchmarks/heterogeneity.py grid                    # the comparison of the docs; then: parts
    python tests/benchmarks/heterogeneity.py overview                # what the grid found, a study a column

Studies: banking77-A, banking77lm-A, mts-A and mtslm-A with A = 0 (IID), 1, 0.3 or 0.1, medquad-types, medquad-lm.
`@random` behind a name: from a base model whose weights are random. Data of your own, one folder per site with
train.jsonl and test.jsonl (`text` and `label`, or `prompt` and `completion`):

    python tests/benchmarks/heterogeneity.py run NAME --folder SITES --model BASE

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
from methods import AT_HOME, BASELINES, COMPARED, METHODS, OURS, OWN_RATE, PARTS, PRECISIONS, SLOW, TOGETHER
from rich.console import Console
from rich.progress import track

app = typer.Typer(add_completion=False)
console = Console(width=150)
RATES = [5e-3, 1e-2, 2e-2]  # what every method tries first; then half or double, while the best is at an end
MOST_RATES, TUNING_SEED = 5, 100
ALPHAS = ("0", "1", "0.3", "0.1")
BANKING = [f"{kind}-{alpha}" for alpha in reversed(ALPHAS) for kind in ("banking77", "banking77lm")]
GRID = [*BANKING[:2], "medquad-types", "medquad-lm", *BANKING[2:]]
BESIDE = {  # what the grid runs besides
    "banking77-0.1": [AT_HOME, *PRECISIONS],
    "banking77lm-0.1": [AT_HOME, *PRECISIONS],
    "medquad-types": [AT_HOME],
    "medquad-lm": [AT_HOME],
    "banking77-0.1@random": [OURS, "pooled"],
    "banking77-0@random": [OURS, "pooled"],
}
APART = {  # what the lead is made of, and what becomes of slow sites
    "banking77-0.1": ["ours, FedExP's steps", *OWN_RATE, TOGETHER, *SLOW],
    "banking77lm-0.1": ["ours, plain steps", *SLOW],
    "medquad-types": ["ours, FedExP's steps", "ours, by examples"],
    "medquad-lm": ["ours, plain steps", "ours, by examples"],
    "banking77-0": [TOGETHER],
    "banking77-0.1@random": [TOGETHER],
    "banking77-0@random": [TOGETHER],
}
AS_OURS = [AT_HOME, *PARTS, *PRECISIONS, *SLOW]  # at the rate of ours

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


def tuned_on(name: str) -> str:
    """The study whose rates are this one's."""
    data, at, start = name.partition("@")
    kind, _, alpha = data.rpartition("-")
    return f"{f'{kind}-0.3' if alpha in ALPHAS else data}{at}{start}"


def tuning_file(name: str) -> Path:
    return RESULTS / f"{tuned_on(name)}-tuning.jsonl"


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
    """The best rate of each method."""
    rates = {method: best(scores, lower_is_better) for method, scores in tried(name).items()}
    return rates | (dict.fromkeys(AS_OURS, rates[OURS]) if OURS in rates else {})


def next_rates(scores: dict[float, float], lower_is_better: bool) -> list[float]:
    """What a method is still to try."""
    if missing := [rate for rate in RATES if rate not in scores]:
        return missing
    found = best(scores, lower_is_better)
    beyond = found / 2 if found == min(scores) else found * 2
    return [] if len(scores) == MOST_RATES or beyond in scores else [beyond]


def tune_all(data: Study, methods: list[str], cores: int) -> None:
    """Finds each method's learning rate on held-out training rows; every method tries by the same rule."""
    while jobs := [
        Job(data, method, rate, TUNING_SEED, True)
        for method in dict.fromkeys(OURS if method in AS_OURS else method for method in methods)
        for rate in next_rates(tried(data.name).get(method, {}), data.lower_is_better)
    ]:
        carry_out_all(jobs, cores)


def to_run(data: Study, methods: list[str], seeds: list[int]) -> list[Job]:
    rates = tuned(data.name, data.lower_is_better)
    return [Job(data, method, rates[method], seed) for seed in seeds for method in methods]


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
    """Tunes what has no rate yet, runs what the results lack, and reports."""
    data, asked = study(name, folder, model, max_length), named(methods, COMPARED)
    tune_all(data if folder else study(tuned_on(name)), asked, cores)
    carry_out_all(to_run(data, asked, list(range(first_seed, first_seed + seeds))), cores)
    show(data)


@app.command()
def grid(seeds: int = 3, cores: int = Cores) -> None:
    """The comparison of the docs, the most skewed data first."""
    cells = {name: [*COMPARED, *BESIDE.get(name, [])] for name in GRID}
    run_all(cells | {name: methods for name, methods in BESIDE.items() if name not in GRID}, seeds, cores)


@app.command()
def parts(seeds: int = 3, cores: int = Cores) -> None:
    """Ours with one part changed, others who train as ours do, and slow sites."""
    run_all(APART, seeds, cores)


def run_all(asked: dict[str, list[str]], seeds: int, cores: int) -> None:
    """Tunes what has no rate yet and runs what the results lack."""
    for name in dict.fromkeys(map(tuned_on, asked)):
        together = [method for other in asked if tuned_on(other) == name for method in asked[other]]
        tune_all(study(name), together, cores)
    jobs = [job for name in asked for job in to_run(study(name), asked[name], list(range(seeds)))]
    carry_out_all(jobs, cores)


@app.command()
def report(name: str, folder: Path = Folder, model: Path = Model, against: str = OURS) -> None:
    """Tables and a figure of what has been run."""
    show(study(name, folder, model), against)


def show(data: Study, against: str = OURS) -> None:
    results = Results(data)
    console.print(comparison.compared(results, against))
    if any(row["method"] == "alone" for row in results.rows):
        console.print(comparison.homes(results))
    console.print(f"figure: {comparison.picture(data)}")


@app.command()
def overview() -> None:
    """All studies of the grid side by side: what was labelled, then what was written."""
    for lower in (False, True):
        studies = [found for found in map(study, GRID) if found.lower_is_better == lower]
        console.print(comparison.overview(studies))


if __name__ == "__main__":
    app()
