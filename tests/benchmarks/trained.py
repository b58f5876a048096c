"""PEFT folders for exactness.py: three sites trained MiniLM in NF4 on MedQuAD, at mixed ranks and alphas.

python tests/benchmarks/trained.py OUT && python tests/benchmarks/exactness.py OUT/*
"""

from pathlib import Path

import torch
import typer

from nvflare_fm.adapter import RoundTask
from nvflare_fm.compare.bench import Bench
from nvflare_fm.compare.methods import METHODS, OURS
from nvflare_fm.compare.study import Workspace, study
from nvflare_fm.config import SiteOverrides
from nvflare_fm.export.folder import Saved, write_adapter
from nvflare_fm.site.worker import Worker

SITES = {"cancergov": (4, 16.0), "nhlbi": (8, 8.0), "seniorhealth": (16, 24.0)}  # rank, alpha: scales 4, 1 and 1.5


def main(out: Path, steps: int = 15) -> None:
    torch.set_num_threads(1)
    bench, ours = Bench(study("medquad-types", Workspace.at(Path("runs/compare"))), 5e-3), METHODS[OURS]
    plan, workers = bench.settled(ours), bench.workers(ours)
    training = plan.training.model_copy(update={"local_steps": steps})
    task = RoundTask(plan.model_copy(update={"training": training}))
    for site, (rank, alpha) in SITES.items():
        worker = Worker(site, workers[site].config, SiteOverrides(rank=rank, lora_alpha=alpha))
        update = worker.train(task)
        print(write_adapter(out / site, Saved(update.adapter, update.manifest)))


if __name__ == "__main__":
    typer.run(main)
