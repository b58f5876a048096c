"""A few training steps on rows that are made up, to tell how fast a machine is with a base model."""

import json
import tempfile
from pathlib import Path

from ...adapter import RoundTask
from ...config import LABELS, LENGTH, MANY, ROWS, WIDEST, EvaluationSettings, TaskPlan
from ..offer.site_config import SiteConfig
from ..tasks import registry as tasks

STEPS = 3
_LIMITS = {  # as much as any plan may ask
    "max_rank": WIDEST,
    "max_batch_size": ROWS,
    "max_rows_per_step": MANY,
    "max_length": LENGTH,
    "max_labels": LABELS,
    "max_virtual_tokens": WIDEST,
    "max_adapter_mib": 1e6,
    "memory_gib": 1e6,
    "train_embeddings": True,
}
_PRIVACY = {"min_examples": 1, "min_update_rows": 1, "min_metric_rows": 1}  # the rows are all the same


def seconds_per_step(model: Path, plan: TaskPlan) -> float:
    """Train a few steps on made-up rows, and tell how long one takes.

    Args:
        model: folder of the base model, weights included.
        plan: as a site is to carry it out. The rows are as long as its `max_length`.

    Raises:
        FmError: the model cannot be trained so on this machine.
    """
    from ..worker import Worker

    training = plan.training.model_copy(update={"local_steps": STEPS})
    trial = plan.model_copy(
        update={"training": training, "evaluation": EvaluationSettings(before=False, after=False), "fingerprint": ""}
    )
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        file.write_text((json.dumps(tasks[plan.task].made_up(plan)) + "\n") * (2 * plan.training.batch_size))
        source = {plan.data: {"train": str(file), "validation": str(file)}}
        offer = {"models": {plan.model: {"path": str(model)}}, "data": source, "limits": _LIMITS, "privacy": _PRIVACY}
        site = SiteConfig.read(offer, "this machine")
        report = Worker("this machine", site).train(RoundTask(trial)).report
    return report.seconds / STEPS
