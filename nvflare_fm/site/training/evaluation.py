"""Measuring an adapter on the site's validation rows, exactly: the batch size does not show."""

from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset

from ...config import RoundPlan
from ...errors import TrainingError
from ...job.cost import texts_at_once
from ..model.base_model import BaseModel
from .distributed import any_process, gather, processes


def evaluate(
    model: Any, base: BaseModel, rows: Dataset, plan: RoundPlan, should_stop: Callable[[], bool]
) -> dict[str, float]:
    """The task's metrics of `model` over all `rows`. Every process of a distributed trainer measures its share.

    Raises:
        TrainingError: it was told to stop.
    """
    model.eval()
    settings = plan.evaluation
    count = len(rows)
    rank, world = processes()
    # By length, so that batches hold little padding; ties by place, so that every run makes the same batches.
    order = sorted(range(count), key=lambda i: (len(rows[i]["input_ids"]), i))[rank::world]
    parts: list[dict[str, torch.Tensor]] = []
    steps = -(-count // (world * settings.batch_size))  # the same at every process: they agree on stopping together
    for start in range(0, steps * settings.batch_size, settings.batch_size):
        if any_process(should_stop()):
            raise TrainingError("stopped while evaluating, as told", code="stopped")
        if chosen := order[start : start + settings.batch_size]:
            longest = len(rows[chosen[-1]]["input_ids"])
            at_once = texts_at_once(len(chosen), longest)
            for some in (chosen[i : i + at_once] for i in range(0, len(chosen), at_once)):
                parts.append(_measured(model, base, [rows[i] for i in some], plan))
    everyone = [part for share in gather(parts) for part in share]
    columns = {name: torch.cat([part[name] for part in everyone]) for name in everyone[0]}
    return base.task.metrics(columns, plan)


@torch.inference_mode()
def _measured(model: Any, base: BaseModel, rows: list[dict[str, Any]], plan: RoundPlan) -> dict[str, torch.Tensor]:
    batch = {k: v.to(base.model.device) for k, v in base.task.batch(rows, base.tokenizer.pad_token_id).items()}
    with base.autocast():
        parts = base.task.measure(model, base, batch, plan)
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: torch.cat([part[name] for part in parts if name in part]).cpu() for name in names}
