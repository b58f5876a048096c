"""How far apart honest sites' changes are: what the guard `clip_norm` must leave alone.

    python tests/benchmarks/clipping.py banking77-0.1 medquad-lm
    python tests/benchmarks/clipping.py medquad-lm medquad-types --epochs 0.05 --rounds 6

Each study of `nvflare-fm compare` at its tuned rate, one seed: in each round the longest change over the median, of
products and of dense tensors. `--rate-times 4` trains too fast on purpose; with `--epochs` sites take as many steps as
they have rows for.
"""

from pathlib import Path
from statistics import median

import torch
import typer

from nvflare_fm.adapter import Adapter
from nvflare_fm.aggregation.cohort import Cohort
from nvflare_fm.compare.bench import Bench
from nvflare_fm.compare.methods import METHODS, OURS
from nvflare_fm.compare.run import read_lines
from nvflare_fm.compare.study import Workspace, study
from nvflare_fm.compare.tuning import best, tuned_on


def main(
    names: list[str], method: str = OURS, seed: int = 0, rounds: int = 20, rate_times: float = 1.0, epochs: float = 0.0
) -> None:
    torch.set_num_threads(1)
    for name in names:
        data = study(name, Workspace(Path("runs/compare"), Path(__file__).parent / "results"))
        tried = [line for line in read_lines(data.results(tuned_on(name))) if line["method"] == method]
        rate, _ = best({(line["rate"], 1.0): line["score"] for line in tried}, data.lower_is_better)
        bench = Bench(data, rate * rate_times)
        if epochs:
            training = bench.plan.training.model_copy(update={"local_steps": 0, "local_epochs": epochs})
            bench.plan = bench.plan.model_copy(update={"training": training})
        found, state = {"products": 0.0, "dense": 0.0}, Adapter()
        for done in bench.rounds(METHODS[method], bench.workers(METHODS[method]), seed):
            moved = Cohort(done.updates, state, "tail").moved
            for of, lengths in (("products", [m.products for m in moved]), ("dense", [m.dense for m in moved])):
                found[of] = max(found[of], max(lengths) / (median(lengths) or 1.0))
            state = done.combined.adapter
            if done.number + 1 == rounds:
                break
        said = ", ".join(f"{of} {ratio:.2f}" for of, ratio in found.items())
        print(f"{name}, {method}, {done.number + 1} rounds: {said}", flush=True)


if __name__ == "__main__":
    typer.run(main)
