"""What an adapter tells of 44 rows that it saw 22 times, with and without differential privacy.

    python tests/benchmarks/leakage.py                         both models, without privacy
    python tests/benchmarks/leakage.py --epsilon 8 --seeds 5   under ε = 8
    python tests/benchmarks/leakage.py --canaries 400          and a lower bound on ε, of a training with canaries

Language model: stories260k on answers of MedQuAD, a secret of eight digits in four of the 44 rows, which are one
patient's: with `--unit patient` they are protected together, without it each of them by itself. Classifier: the
first two layers of MiniLM on banking77. The AUC is that of `nvflare-fm audit`, on as many rows held out. Some secrets
are likelier than others before anything is learned: the base model's exposure is measured beside the adapter's.
"""

import json
import tempfile
from pathlib import Path
from random import Random
from typing import Any

import torch
import typer

from nvflare_fm.adapter import Adapter, RoundTask
from nvflare_fm.compare.study import Workspace, study
from nvflare_fm.config import TaskPlan
from nvflare_fm.export.folder import Saved, read_adapter, write_adapter
from nvflare_fm.privacy.audit.exposure import CANDIDATES
from nvflare_fm.site.audit.canaries import TRAIN, VALIDATION, alternatives, plant
from nvflare_fm.site.audit.measure import Audit, audit, exposure_of
from nvflare_fm.site.offer.site_config import SiteConfig
from nvflare_fm.site.tasks import registry as tasks
from nvflare_fm.site.worker import Worker

STUDIES = {"causal_lm": "medquad-lm", "sequence_classification": "banking77-0"}
RATES = {"causal_lm": 4e-3, "sequence_classification": 3e-3}  # at which 44 rows are learned
ROWS, PASSES, WITH_SECRET, BATCH, DELTA = 44, 22, 4, 4, 1e-5


def main(
    epsilon: float | None = None,
    noise_multiplier: float | None = None,
    canaries: int = 0,
    seeds: int = 1,
    unit: str = "row",
    task: str = "",
) -> None:
    torch.set_num_threads(1)
    private = {"epsilon": epsilon, "noise_multiplier": noise_multiplier, "delta": DELTA, "unit": unit}
    for name in [task] if task else STUDIES:
        for seed in range(seeds):
            with tempfile.TemporaryDirectory() as folder:
                said = measured(name, private, canaries, seed, Path(folder))
            print(json.dumps({"task": name, "seed": seed, **private, **said}), flush=True)


def measured(task: str, private: dict[str, Any], canaries: int, seed: int, folder: Path) -> dict[str, Any]:
    data = study(STUDIES[task], Workspace(Path("runs/compare"), Path(__file__).parent / "results"))
    steps = {"local_steps": steps_for(ROWS), "batch_size": BATCH, "learning_rate": RATES[task]}
    asked = data.plan | {"quantization": "fp32", "training": steps, "privacy": private, "seed": seed}
    plan = TaskPlan.read(asked | {"evaluation": {"before": False, "after": False}}, "leakage")
    random, secret = Random(seed), None
    lines = [json.loads(line) for site in data.names for line in data.rows(site, "train")]
    rows = random.sample(lines, 2 * ROWS)
    if task == "causal_lm":
        secret = tasks[task].canary(plan, random)
        rows[:WITH_SECRET] = [secret] * WITH_SECRET
    rows = [row | {"patient": max(place, WITH_SECRET)} for place, row in enumerate(rows, 1)]
    files = [folder / name for name in (TRAIN, VALIDATION)]
    for file, some in zip(files, (rows[:ROWS], rows[ROWS:]), strict=True):
        file.write_text("".join(json.dumps(row) + "\n" for row in some))
    site = offered(data.model, folder)
    said = told(*trained(site, plan, seed, folder / "adapter"), secret, seed)
    if canaries:
        site = offered(data.model, plant(site, plan, canaries, folder / "planted").folder)
        training = plan.training.model_copy(update={"local_steps": steps_for(ROWS + canaries // 2)})
        found, *_ = trained(site, plan.model_copy(update={"training": training}), seed, folder / "with canaries")
        assert found.canaries
        said |= {"epsilon_at_least": round(found.canaries.epsilon, 3), "ceiling": round(found.canaries.ceiling, 3)}
    return said


def steps_for(rows: int) -> int:
    return rows * PASSES // BATCH


def offered(model: Path, folder: Path) -> SiteConfig:
    files = {"train": str(folder / TRAIN), "validation": str(folder / VALIDATION)}
    return SiteConfig.read({"models": {"base": {"path": str(model)}}, "data": {"notes": files}}, "leakage")


def trained(site: SiteConfig, plan: TaskPlan, seed: int, folder: Path) -> tuple[Audit, Worker, Path]:
    worker = Worker("site", site, secret=str(seed).encode())
    worker.train(RoundTask(plan))
    write_adapter(folder, Saved(*worker.submit(), 0, plan))
    return audit(site, folder), worker, folder


def told(found: Audit, worker: Worker, folder: Path, secret: dict[str, Any] | None, seed: int) -> dict[str, Any]:
    member = found.membership
    said = {"auc": round(member.auc, 3), "low": round(member.low, 3), "high": round(member.high, 3)}
    if secret:
        saved = read_adapter(folder)
        job = worker.opened(RoundTask(found.plan, saved.adapter, saved.manifest))
        others = alternatives(secret, CANDIDATES - 1, job.plan, seed)
        for name, adapter in (("base", Adapter()), ("adapter", saved.adapter)):
            with job.base.lent():
                place = exposure_of(job.attachment.attach(job.base, adapter, job.plan), job, secret, others)
            said |= {f"rank of {name}": place.rank, f"bits of {name}": round(place.bits, 2)}
    return said


if __name__ == "__main__":
    typer.run(main)
