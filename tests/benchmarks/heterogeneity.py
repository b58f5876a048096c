"""Merge rules against each other where sites differ: in data, in rank, in both. Resumable; a line a measurement.

    python tests/benchmarks/heterogeneity.py tune banking77-0.1     # the same budget for every method, on held-out rows
    python tests/benchmarks/heterogeneity.py run banking77-0.1        # fixed settings, fresh seeds
    python tests/benchmarks/heterogeneity.py report banking77-0.1     # table, paired comparison and a figure

Studies: banking77-0 (IID), -1, -0.3, -0.1, medquad-types, medquad-lm. Data of your own, one folder per site with
train.jsonl and test.jsonl (`text` and `label`, or `prompt` and `completion`):

    python tests/benchmarks/heterogeneity.py run NAME --folder SITES --model BASE

All sites share one process and one quantized base model. Sites have the ranks 2, 2, 2, 4, 4, 8, 8, 16, 16, 32 in the
order of their names, at one α, unless a method needs one rank everywhere.
"""

import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import peers
import sites
import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from nvflare_fm.adapter import Adapter, Manifest, RoundTask
from nvflare_fm.aggregation.combine import combine
from nvflare_fm.combination import settle
from nvflare_fm.config import Aggregation, RoundPlan, SiteOverrides
from nvflare_fm.lora import svd
from nvflare_fm.simulate import Round, alone, federate
from nvflare_fm.site import base_model
from nvflare_fm.site.site_config import DataSource, ModelSource, SiteConfig
from nvflare_fm.site.worker import Worker

app = typer.Typer(add_completion=False)
console = Console(width=150)
RUNS = Path("runs/heterogeneity")
RANKS = (2, 2, 2, 4, 4, 8, 8, 16, 16, 32)
RATES = (1.5e-3, 5e-3, 1.5e-2)  # the tuning budget of every method
ROUNDS, EVERY, TUNING_SEED = 20, 4, 100


@dataclass(frozen=True)
class Method:
    """A peer as its paper has it, or ours."""

    how: Aggregation = field(default_factory=Aggregation)
    rank: int = 0  # of all sites; 0: mixed
    worker: type[Worker] = Worker
    folds: bool = False
    training: dict[str, Any] = field(default_factory=dict)


METHODS = {
    "ours (exact)": Method(),
    "ours + sites alike": Method(Aggregation(weigh=("uniform",))),
    "FedIT rank 4": Method(Aggregation(merge="factor_mean"), rank=4),
    "HetLoRA": Method(Aggregation(merge="zero_pad", weigh=("norm",))),
    "FlexLoRA": Method(Aggregation(merge="svd")),
    "HLoRA scale-blind": Method(Aggregation(merge="svd"), worker=peers.ScaleBlindWorker),
    "FFA-LoRA rank 4": Method(Aggregation(merge="freeze_a"), rank=4),
    "RoLoRA rank 4": Method(Aggregation(merge="alternate"), rank=4),
    "raFLoRA": Method(Aggregation(merge="rank_partition")),
    "FLoRA not folded": Method(Aggregation(merge="stack", max_rank=64)),
    "FLoRA folded into NF4": Method(Aggregation(merge="stack"), folds=True),
    "ours + FedRS": Method(training={"restricted_softmax": 0.5}),
    "ours + FedLC": Method(training={"logit_calibration": 1.0}),
    "ours + FedExP": Method(Aggregation(step="fedexp")),
    "ours + momentum": Method(Aggregation(step="momentum")),
    "ours + agreement": Method(Aggregation(weigh=("examples", "agreement"))),
}


@dataclass(frozen=True)
class Study:
    """A folder per site, a base model and a plan."""

    folder: Path
    model: Path
    plan: dict[str, Any]
    metric: str
    lower_is_better: bool = False


def study(name: str, folder: Path | None, model: Path | None) -> Study:
    root = folder or sites.write(name, RUNS / "data" / name)
    first = json.loads(next(root.glob("*/train.jsonl")).read_text().splitlines()[0])
    training = {"local_steps": 5, "batch_size": 16, "lr_scheduler_type": "cosine"}
    if "label" in first:
        labels = sorted(
            {json.loads(row)["label"] for f in root.glob("*/*.jsonl") for row in f.read_text().splitlines()}
        )
        plan = {"task": "sequence_classification", "labels": labels, "max_length": 24, "training": training}
        return Study(root, model or sites.minilm(), plan, "accuracy")
    plan = {"task": "causal_lm", "max_length": 128, "training": training | {"batch_size": 8}}
    return Study(root, model or sites.MODELS["stories260k"], plan, "bits_per_byte", lower_is_better=True)


class Bench:
    """One study: a worker for each site and rank, its arms and what they score."""

    def __init__(self, study: Study, rate: float, held_out: bool) -> None:
        self.study, self.names = study, sorted(p.parent.name for p in study.folder.glob("*/train.jsonl"))
        plan = {**study.plan, "quantization": "nf4", "peft": {"method": "lora", "rank": max(RANKS), "lora_alpha": 16}}
        plan["training"] = {**study.plan["training"], "learning_rate": rate}
        plan["evaluation"] = {"before": False, "after": False, "max_examples": 100}
        self.plan = RoundPlan.read(plan, "study")
        self.files = {name: self._files(name, held_out) for name in self.names}
        self.rows = {name: min(100, len(test.read_text().splitlines())) for name, (_, test) in self.files.items()}

    def _files(self, name: str, held_out: bool) -> tuple[Path, Path]:
        """Train and test, or for tuning a fifth of the training rows as test and the others to train on."""
        source = self.study.folder / name
        if not held_out:
            return source / "train.jsonl", source / "test.jsonl"
        parts: dict[str, list[str]] = {"fit": [], "valid": []}
        for row in (source / "train.jsonl").read_text().splitlines():
            parts["valid" if sites.fraction(row) < 0.2 else "fit"].append(row + "\n")
        folder = RUNS / "held_out" / self.study.folder.name / name
        folder.mkdir(parents=True, exist_ok=True)
        for part, rows in parts.items():
            (folder / part).with_suffix(".jsonl").write_text("".join(rows))
        return folder / "fit.jsonl", folder / "valid.jsonl"

    def workers(self, method: Method) -> dict[str, Worker]:
        return {
            name: self._worker(name, *self.files[name], method.rank or RANKS[place % len(RANKS)], method.worker)
            for place, name in enumerate(self.names)
        }

    def pooled(self) -> Worker:
        file = RUNS / f"{self.study.folder.name}-pooled.jsonl"
        file.write_text("".join(train.read_text() for train, _ in self.files.values()))
        return self._worker("pooled", file, self.files[self.names[0]][1], max(RANKS), Worker)

    def _worker(self, name: str, train: Path, test: Path, rank: int, kind: type[Worker]) -> Worker:
        data = {"notes": DataSource(train=str(train.resolve()), validation=str(test.resolve()))}
        models = {"base": ModelSource(path=str(self.study.model.resolve()))}
        return kind(name, SiteConfig(models=models, data=data), SiteOverrides(rank=rank))

    def rounds(self, method: Method, workers: dict[str, Worker], seed: int) -> Iterator[Round]:
        training = self.plan.training.model_copy(update=method.training)
        plan = self.plan.model_copy(update={"seed": seed, "training": training})
        if method.rank:
            plan = plan.model_copy(update={"peft": {**plan.peft, "rank": method.rank}})
        if method.folds:
            return self._folding(method, workers, plan)
        return federate(workers, plan, method.how, ROUNDS)

    def _folding(self, method: Method, workers: dict[str, Worker], plan: RoundPlan) -> Iterator[Round]:
        plan = settle(plan, method.how)
        adapter, manifest = Adapter(), None
        for number in range(ROUNDS):
            task = RoundTask(plan, adapter, manifest, number, ROUNDS)
            updates = tuple(workers[name].train(task) for name in sorted(workers))
            combined = combine(adapter, manifest, updates, method.how, sum(RANKS))
            adapter, manifest = peers.fold(combined, workers[self.names[0]], task)
            yield Round(number, replace(combined, adapter=adapter), updates)
        base_model._loaded.clear()  # what was folded into is nobody else's base

    def measure(self, workers: dict[str, Worker], adapter: Adapter, manifest: Manifest | None) -> dict[str, float]:
        task = RoundTask(settle(self.plan, Aggregation()), adapter, manifest)
        return {name: workers[name].validate(task)[self.study.metric] for name in self.names}


def above(adapter: Adapter, rank: int) -> float:
    """The share of energy in the directions above `rank`, over all layers."""
    energy = [svd(adapter.lora[layer])[1].square() for layer in adapter.lora]
    total = sum(float(e.sum()) for e in energy)
    return sum(float(e[rank:].sum()) for e in energy) / total if total else 0.0


def size(adapter: Adapter) -> int:
    return sum(t.numel() * t.element_size() for t in adapter.tensors().values())


def federated(bench: Bench, method: Method, seed: int, every: int) -> Iterator[dict[str, Any]]:
    workers, up, down = bench.workers(method), 0, 0
    for done in bench.rounds(method, workers, seed):
        up += sum(size(update.adapter) for update in done.updates)
        adapter = done.combined.adapter
        if (done.number + 1) % every == 0 or done.number + 1 == ROUNDS:
            scores = bench.measure(workers, adapter, done.combined.manifest)
            share = above(adapter, min(RANKS)) if not method.rank else None
            yield {"round": done.number + 1, "scores": scores, "bytes_up": up, "bytes_down": down, "above": share}
        down += len(workers) * size(adapter)


def baseline(bench: Bench, name: str, seed: int) -> Iterator[dict[str, Any]]:
    """Pooled training, or each site alone, for as many steps as a site takes in all rounds."""
    plan = settle(bench.plan.model_copy(update={"seed": seed}), Aggregation())
    judges = bench.workers(Method())
    for site in ["pooled"] if name == "pooled" else bench.names:
        adapter, manifest, _ = alone(bench.pooled() if name == "pooled" else judges[site], plan, ROUNDS)
        yield {"round": ROUNDS, "trained_at": site, "scores": bench.measure(judges, adapter, manifest)}


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


Folder = typer.Option(None, help="one folder per site with train.jsonl and test.jsonl")
Model = typer.Option(None, help="folder of the base model; else MiniLM, or stories260k")


def named(methods: str) -> list[str]:
    """The methods asked for; none: all of them.

    Raises:
        BadParameter: there is no such method.
    """
    known = ["pooled", "alone", *METHODS]
    asked = [method.strip() for method in methods.split(",")] if methods else known
    if unknown := sorted(set(asked) - set(known)):
        raise typer.BadParameter(f"no method {unknown[0]!r}; known: {known}")
    return asked


def overall(bench_rows: dict[str, int], scores: dict[str, float]) -> float:
    """Over all sites' test rows together."""
    return sum(bench_rows[s] * scores[s] for s in scores) / sum(bench_rows[s] for s in scores)


@app.command()
def tune(name: str, folder: Path = Folder, model: Path = Model, methods: str = "") -> None:
    """Finds each method's learning rate on held-out training rows; every method gets the same rates to try."""
    torch.set_num_threads(1)
    chosen, file = study(name, folder, model), RUNS / f"{name}-tuning.jsonl"
    for method in [m for m in named(methods) if m != "alone"]:  # a site alone takes the rate of pooled training
        for rate in RATES:
            if any((row["method"], row["rate"]) == (method, rate) for row in lines(file)):
                continue
            bench, began = Bench(chosen, rate, held_out=True), time.monotonic()
            arm = baseline(bench, method, TUNING_SEED) if method == "pooled" else None
            *_, last = arm or federated(bench, METHODS[method], TUNING_SEED, ROUNDS)
            score = overall(bench.rows, last["scores"])
            write(file, {"method": method, "rate": rate, "score": score})
            console.log(f"{method} at {rate:g}: {score:.4f} in {time.monotonic() - began:.0f} s")


def tuned(name: str, lower_is_better: bool) -> dict[str, float]:
    """The best rate of each method; sites alone take that of pooled training."""
    found: dict[str, list[tuple[float, float]]] = {}
    for row in lines(RUNS / f"{name}-tuning.jsonl"):
        found.setdefault(row["method"], []).append((row["score"], row["rate"]))
    best: Callable[..., tuple[float, float]] = min if lower_is_better else max
    rates = {method: best(scores)[1] for method, scores in found.items()}
    return rates | ({"alone": rates["pooled"]} if "pooled" in rates else {})


def write(file: Path, row: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as out:
        out.write(json.dumps(row) + "\n")


@app.command()
def run(
    name: str,
    folder: Path = Folder,
    model: Path = Model,
    methods: str = "",
    seeds: int = 3,
    first_seed: int = 0,
    rate: float = typer.Option(0.0, help="for all methods; else what `tune` found for each"),
) -> None:
    """Runs what the results file lacks."""
    torch.set_num_threads(1)
    chosen, file = study(name, folder, model), RUNS / f"{name}.jsonl"
    rates = tuned(name, chosen.lower_is_better)
    wanted = named(methods)
    if untuned := [m for m in wanted if not (rate or m in rates)]:
        raise typer.BadParameter(f"no rate for {untuned}: run tune first, or give --rate")
    jobs = [(method, seed) for seed in range(first_seed, first_seed + seeds) for method in wanted]
    for method, seed in track(jobs, description=name, console=console):
        if any((row["method"], row["seed"], row["round"]) == (method, seed, ROUNDS) for row in lines(file)):
            continue
        bench, began = Bench(chosen, rate or rates[method], held_out=False), time.monotonic()
        arm = baseline(bench, method, seed) if method not in METHODS else federated(bench, METHODS[method], seed, EVERY)
        for found in list(arm):
            score = overall(bench.rows, found["scores"])
            write(file, {"method": method, "seed": seed, "rate": rate or rates[method], "score": score, **found})
        console.log(f"{method}, seed {seed}: {score:.4f} in {time.monotonic() - began:.0f} s")


def spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values) if len(values) > 1 else 0:.3f}"


@app.command()
def report(name: str, folder: Path = Folder, model: Path = Model, against: str = "ours (exact)") -> None:
    """Final scores, worst sites, rounds and bytes to the score that FedIT at rank 4 ends with, paired differences."""
    chosen, rows = study(name, folder, model), lines(RUNS / f"{name}.jsonl")
    worst, sign = (max, -1) if chosen.lower_is_better else (min, 1)
    final = {(r["method"], r["seed"]): r for r in rows if r["round"] == ROUNDS and r["method"] != "alone"}
    methods = sorted({m for m, _ in final}, key=lambda m: -sign * statistics.mean(by_seed(final, m).values()))
    target = statistics.mean(by_seed(final, "FedIT rank 4").values()) if "FedIT rank 4" in methods else None
    table = Table("method", "rate", "seeds", chosen.metric, "worst site", "to target: rounds", "MB", f"minus {against}")
    for method in methods:
        scores = by_seed(final, method)
        base = by_seed(final, against)
        paired = [scores[s] - base[s] for s in scores if s in base]
        reached = to_target(rows, method, target, sign) if target is not None and method in METHODS else []
        table.add_row(
            method,
            f"{final[method, next(iter(scores))]['rate']:g}",
            str(len(scores)),
            spread(list(scores.values())),
            spread([worst(r["scores"].values()) for (m, _), r in final.items() if m == method]),
            spread([r for r, _ in reached]) if reached else "–",
            spread([b / 1e6 for _, b in reached]) if reached else "–",
            spread(paired) if method != against else "",
        )
    console.print(table)
    homes(rows, final, against, chosen)
    picture(rows, name, chosen.metric)


def by_seed(final: dict[Any, Any], method: str) -> dict[int, float]:
    return {seed: r["score"] for (m, seed), r in final.items() if m == method}


def to_target(rows: list[dict[str, Any]], method: str, target: float, sign: int) -> list[tuple[int, int]]:
    """(round, bytes) at which each seed first reaches the target, of the seeds that do."""
    reached: dict[int, tuple[int, int]] = {}
    for row in rows:
        if row["method"] == method and sign * (row["score"] - target) >= 0:
            reached.setdefault(row["seed"], (row["round"], row["bytes_up"] + row["bytes_down"]))
    return list(reached.values())


def homes(rows: list[dict[str, Any]], final: dict[Any, Any], ours: str, chosen: Study) -> None:
    """Each site alone against the federation on its own test rows, the smallest site first."""
    alone_ = [r for r in rows if r["method"] == "alone"]
    if not alone_:
        return
    rows_of = {p.parent.name: len(p.read_text().splitlines()) for p in chosen.folder.glob("*/train.jsonl")}
    table = Table("site", "training rows", "alone, at home", "alone, on all sites' rows", f"{ours}, at home")
    for site in sorted(rows_of, key=lambda s: rows_of[s]):
        mine = [r for r in alone_ if r["trained_at"] == site]
        here = [r["scores"][site] for (m, _), r in final.items() if m == ours]
        scores = [r["scores"][site] for r in mine], [r["score"] for r in mine], here
        table.add_row(site, str(rows_of[site]), *(spread(s) if s else "–" for s in scores))
    console.print(table)


def picture(rows: list[dict[str, Any]], name: str, metric: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5))
    for method in METHODS:
        curve: dict[int, list[float]] = {}
        share: dict[int, list[float]] = {}
        for row in rows:
            if row["method"] == method:
                curve.setdefault(row["round"], []).append(row["score"])
                if row.get("above") is not None:
                    share.setdefault(row["round"], []).append(row["above"])
        for axis, found in ((left, curve), (right, share)):
            if found:
                axis.plot(list(found), [statistics.mean(v) for v in found.values()], label=method, marker=".")
    left.set(xlabel="round", ylabel=f"{metric}, all sites' test rows", title=name)
    right.set(xlabel="round", ylabel=f"energy above rank {min(RANKS)}", title="do high directions live?")
    left.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(RUNS / f"{name}.png", dpi=120)
    console.print(f"figure: {RUNS / name}.png")


if __name__ == "__main__":
    app()
