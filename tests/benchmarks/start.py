"""What starting a trainer costs: its imports, with and without `quick_imports`, and two rounds of a tiny model.

    python tests/benchmarks/start.py --repeats 5

In turn in fresh processes. Processor time, which tells much the same on a busy machine.
"""

import json
import resource
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import typer

ROOT = Path(__file__).parents[2]
NAMES = "imports (s)", "first round (s)", "second round (s)", "memory (MiB)"


def started(folder: Path, quick: bool) -> list[float]:
    """Start as a trainer does, and train for two rounds."""
    from nvflare_fm.flare import trainer

    with trainer.quick_imports() if quick else nullcontext():
        from nvflare_fm.site.worker import Worker

    from nvflare_fm.adapter import RoundTask
    from tests.site import tiny

    times = [time.process_time()]
    worker = Worker("site-1", tiny.site(folder / "model", folder / "rows.jsonl", limits={"threads": 1}))
    training = {"local_steps": 4, "batch_size": 4, "learning_rate": 1e-2}
    for _ in range(2):
        worker.train(RoundTask(tiny.plan(quantization="nf4", training=training)))
        times.append(time.process_time())
    used = [times[0], *(after - before for before, after in pairwise(times))]
    return [*used, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10]


def main(repeats: int = 5, folder: Path | None = None, quick: bool = True) -> None:
    if folder:
        print(json.dumps(started(folder, quick)))
        return
    from tests.site import tiny

    found: dict[str, list[list[float]]] = {"--no-quick": [], "--quick": []}
    with TemporaryDirectory() as made:
        tiny.save(Path(made) / "model")
        tiny.jsonl(Path(made) / "rows.jsonl", tiny.rows("causal_lm"))
        for _ in range(repeats):
            for kind, rows in found.items():
                command = [sys.executable, __file__, "--folder", made, kind]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                rows.append(json.loads(done.stdout.splitlines()[-1]))
    for kind, rows in found.items():
        medians = map(statistics.median, zip(*rows, strict=True))
        print(kind, *(f"{name} {value:.2f}" for name, value in zip(NAMES, medians, strict=True)), sep=", ")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    typer.run(main)
