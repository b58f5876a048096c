"""Measuring an adapter on the site's validation rows, exactly: the batch size does not show."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from datasets import Dataset

from ...config import RoundPlan
from ...errors import ModelError, TrainingError
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
            parts += _parts(model, base, [rows[i] for i in chosen], plan)
    return _metrics(base, [part for share in gather(parts) for part in share], plan)


def losses(
    model: Any,
    base: BaseModel,
    rows: Dataset,
    groups: Sequence[Sequence[int]],
    plan: RoundPlan,
    should_stop: Callable[[], bool] = lambda: False,
) -> list[float]:
    """The task's loss of each row by itself.

    Args:
        groups: of each row, the places of its examples in `rows`.

    Raises:
        TrainingError: it was told to stop.
        ModelError: a loss is not a finite number.
    """
    model.eval()
    rank, world = processes()
    mine: dict[int, float] = {}
    for start in range(0, len(groups), world):  # each process measures one of so many rows
        if any_process(should_stop()):
            raise TrainingError("stopped while evaluating, as told", code="stopped")
        if start + rank < len(groups):
            parts = _parts(model, base, [rows[i] for i in groups[start + rank]], plan)
            mine[start + rank] = _metrics(base, parts, plan)["loss"]
    everyone = {place: loss for share in gather(mine) for place, loss in share.items()}
    found = [everyone[place] for place in range(len(groups))]
    if not all(map(math.isfinite, found)):
        raise ModelError(
            "the loss of a row is not a finite number, so nothing can be told of it; is the adapter damaged?",
            code="loss_not_finite",
        )
    return found


def _parts(model: Any, base: BaseModel, rows: list[dict[str, Any]], plan: RoundPlan) -> list[dict[str, torch.Tensor]]:
    """What the metrics need of some rows, as many at a time as fit into memory."""
    at_once = texts_at_once(len(rows), max(len(row["input_ids"]) for row in rows))
    return [_measured(model, base, rows[i : i + at_once], plan) for i in range(0, len(rows), at_once)]


def _metrics(base: BaseModel, parts: list[dict[str, torch.Tensor]], plan: RoundPlan) -> dict[str, float]:
    columns = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return base.task.metrics(columns, plan)


@torch.inference_mode()
def _measured(model: Any, base: BaseModel, rows: list[dict[str, Any]], plan: RoundPlan) -> dict[str, torch.Tensor]:
    batch = {k: v.to(base.model.device) for k, v in base.task.batch(rows, base.tokenizer.pad_token_id).items()}
    with base.autocast():
        parts = base.task.measure(model, base, batch, plan)
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: torch.cat([part[name] for part in parts if name in part]).cpu() for name in names}
