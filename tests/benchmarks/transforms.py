"""What transforms save and cost: the demo's federation in one process, by transform and seed.

    nice python tests/benchmarks/transforms.py                    float32, int8 and bf16 both ways, 3 seeds each
    nice python tests/benchmarks/transforms.py --seeds 1 int8     one of them

Prints macro-F1 of the last adapter over the sites' own test notes, and all bytes that would travel.
"""

import argparse
import tempfile
import time
from pathlib import Path
from statistics import mean

import torch

from nvflare_fm import transforms
from nvflare_fm.adapter import RoundTask
from nvflare_fm.config import Aggregation, EvaluationSettings, SiteOverrides
from nvflare_fm.demo.notes import prepare
from nvflare_fm.demo.trial import Trial
from nvflare_fm.job.settle import settle
from nvflare_fm.simulate import federate
from nvflare_fm.site.worker import Worker
from nvflare_fm.transforms.packed import pack


def federation(trial: Trial, names: tuple[str, ...]) -> tuple[dict[str, float], int, int]:
    """The score at each site, and the bytes sent to and by all of them."""
    plan = trial.plan.model_copy(
        update={"uplink": names, "downlink": names, "evaluation": EvaluationSettings(before=False, after=False)}
    )
    how = Aggregation(max_rank=trial.plan.rank)
    workers = {
        site.name: Worker(site.name, trial.offer(site.folder), SiteOverrides(rank=site.rank)) for site in trial.sites
    }
    chain, down, up = transforms.read(names, "downlink"), 0, 0
    for done in federate(workers, plan, how, trial.rounds):
        last = pack(done.combined.adapter, chain, "the server")
        down += last.parcel.bytes * len(workers)
        up += sum(update.adapter.bytes_sent() for update in done.updates)
    task = RoundTask(settle(plan, how).plan, last.adapter(), done.combined.manifest)
    return {site: worker.validate(task)[trial.subject.metric] for site, worker in sorted(workers.items())}, down, up


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("transforms", nargs="*", default=["float32", "int8", "bf16"])
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    print("| both ways | seed | macro-F1, mean | worst site | MB down | MB up | s |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for seed in range(given.seeds):
        for name in given.transforms:
            with tempfile.TemporaryDirectory() as folder:
                trial = prepare(None, Path(folder), rounds=8, steps=10, seed=seed)
                started = time.monotonic()
                scores, down, up = federation(trial, () if name == "float32" else (name,))
                took = time.monotonic() - started
            found = f"{mean(scores.values()):.3f} | {min(scores.values()):.3f} | {down / 1e6:.1f} | {up / 1e6:.1f}"
            print(f"| {name} | {seed} | {found} | {took:.0f} |", flush=True)


if __name__ == "__main__":
    main()
