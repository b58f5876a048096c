"""What differential privacy adds to a training step: rounds with it and without, in turn, in one process.

    nice python tests/benchmarks/dp_step.py                 MiniLM and stories260k, NF4, by hooks
    nice python tests/benchmarks/dp_step.py --loop          the same a row at a time

Real rows: banking77's questions, MedQuAD's answers. A private round draws its rows, so time counts per token. It is the
CPU time of one thread, which a machine shared with others does not change.
"""

import argparse
import json
import statistics
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from nvflare_fm.adapter import RoundTask
from nvflare_fm.compare import data_sets
from nvflare_fm.config import TaskPlan
from nvflare_fm.site.offer.site_config import SiteConfig
from nvflare_fm.site.training.per_sample import PerSample
from nvflare_fm.site.worker import Worker

STEPS, BATCH, ROWS = 16, 16, 400


def cases() -> dict[str, tuple[Path, list[dict[str, Any]], dict[str, Any]]]:
    """Model, rows, and what its plan says."""
    questions = data_sets.banking77()["train"][:: 10_003 // ROWS][:ROWS]
    labels = sorted({row["label"] for row in questions})
    answers = list(islice(map(data_sets.question_and_answer, data_sets.medquad()), ROWS))
    return {
        "MiniLM": (data_sets.minilm(), questions, {"task": "sequence_classification", "labels": labels}),
        "stories260k": (data_sets.stories260k(), answers, {"task": "causal_lm", "max_length": 256}),
    }


def compare(model: Path, rows: list[dict[str, Any]], said: dict[str, Any], repeats: int) -> dict[str, float]:
    """Medians, and the median of the ratios of neighbours."""
    unmeasured = {"evaluation": {"before": False, "after": False}}
    training = {"training": {"local_steps": STEPS, "batch_size": BATCH}}
    plain = TaskPlan.read(said | training | unmeasured, "benchmark")
    private = TaskPlan.read({**dict(plain), "privacy": {"noise_multiplier": 1.0, "delta": 1e-4}}, "benchmark")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        data = {"notes": {"train": str(file), "validation": str(file)}}
        offered = {"models": {"base": {"path": str(model)}}, "data": data, "limits": {"threads": 1}}
        worker = Worker("here", SiteConfig.read(offered | {"privacy": data_sets.OPEN.model_dump()}, "benchmark"))

        def rate(plan: TaskPlan, number: int) -> float:
            report = worker.train(RoundTask(plan, round=number, total_rounds=2 * repeats)).report
            assert report.tokens
            return report.seconds / report.tokens

        rate(plain, 0)  # loads the model
        pairs = [(rate(plain, number), rate(private, number)) for number in range(repeats)]
    plain_s, private_s = (statistics.median(side) for side in zip(*pairs, strict=True))
    ratios = [b / a for a, b in pairs]
    return {"plain": plain_s * 1e3, "private": private_s * 1e3, "ratio": statistics.median(ratios),
            "least": min(ratios), "most": max(ratios)}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--loop", action="store_true", help="take rows one at a time, as for DoRA, IA³ and int8")
    given = parser.parse_args()
    torch.set_num_threads(1)
    time.perf_counter = time.process_time  # what a round is timed with
    if given.loop:
        PerSample._known = lambda self: False  # type: ignore[method-assign]
    print("| model | plain, ms a token | private, ms a token | ratio | least | most |\n|---|---:|---:|---:|---:|---:|")
    for name, case in cases().items():
        found = compare(*case, given.repeats)
        shown = [f"{found[key]:.3f}" for key in ("plain", "private", "ratio", "least", "most")]
        print(f"| {name} | {' | '.join(shown)} |", flush=True)


if __name__ == "__main__":
    main()
