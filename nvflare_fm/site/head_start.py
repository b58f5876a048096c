"""The start of a head at a site: what the frozen base model makes of its rows is summed up, and the head that follows
from all sites' sums is put in.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from torch import Tensor, nn

from ..adapter import Adapter
from ..config import RoundPlan
from ..errors import ConfigError, TrainingError, WireError
from ..job.cost import texts_at_once
from ..job.tasks import promises
from ..synthesis.features import START, WIDEST, Head, Sums
from .model.attach import heads
from .model.base_model import BaseModel

if TYPE_CHECKING:
    from peft import PeftModel

MOST = 2**14  # rows that are summed up: many more than a model has features


def check_task(task: str) -> None:
    """Refuse a task whose texts do not have one class each.

    Raises:
        ConfigError: its code is that of the server's refusal.
    """
    if not promises(task).one_label:
        raise ConfigError(
            f"sums over features are asked of texts that have one label each, and the task is {task}; leave head_start "
            "out",
            code="head_start_task",
        )


def spread(rows: int) -> range:
    """Some of so many rows, spread evenly, so that a site with very many does not read them all before it trains."""
    return range(0, rows, max(1, -(-rows // MOST)))


def enough(labels: Sequence[int], contents: Sequence[str], fewest: int) -> list[int]:
    """Find the rows of classes that have many enough: a class's sum of one row would be that row.

    Args:
        labels: of the rows.
        contents: of the rows, alike where they are trained on alike.
        fewest: different rows that a class must have.
    """
    different = Counter(label for label, _ in {*zip(labels, contents, strict=True)})
    return [place for place, label in enumerate(labels) if different[label] >= fewest]


def sums(base: BaseModel, rows: Dataset, plan: RoundPlan, should_stop: Callable[[], bool]) -> Sums:
    """Sum up the features of rows: what the head reads of each.

    Args:
        base: lent, without an adapter.
        rows: tokenized, with a class each.

    Raises:
        ConfigError: the base model's head is more than one linear layer, or reads too many features.
        TrainingError: it was told to stop.
    """
    found = Sums.none(len(plan.labels), _linear(base).in_features)
    for read, labels in features(base, rows, plan, should_stop):
        found.add(read, labels)
    return found


def features(
    base: BaseModel, rows: Dataset, plan: RoundPlan, should_stop: Callable[[], bool]
) -> Iterator[tuple[Tensor, list[int]]]:
    """Yield the features of some rows after others, (rows, width), and their labels; the shortest texts come first.

    Raises:
        ConfigError: the base model's head is more than one linear layer, or reads too many features.
        TrainingError: it was told to stop.
    """
    layer = _linear(base)
    order = sorted(range(len(rows)), key=lambda place: (len(rows[place]["input_ids"]), place))
    start = 0
    while start < len(order):
        if should_stop():
            raise TrainingError("stopped at the features of its rows, as told", code="stopped")
        longest = len(rows[order[min(start + plan.evaluation.batch_size, len(order)) - 1]]["input_ids"])
        some = [rows[i] for i in order[start : start + texts_at_once(plan.evaluation.batch_size, longest)]]
        yield _features(base, layer, some), [row["labels"] for row in some]
        start += len(some)


def _linear(base: BaseModel) -> nn.Linear:
    layer = base.model.get_submodule(base.heads[0]) if len(base.heads) == 1 else None
    if not isinstance(layer, nn.Linear):
        raise ConfigError(
            "head_start = features needs a base model whose new head is one linear layer, and this one's is not; leave "
            "head_start out",
            code="head_not_linear",
        )
    if layer.in_features > WIDEST:
        raise ConfigError(
            f"head_start = features: the head reads more than {WIDEST} features; leave head_start out",
            code="too_many_features",
        )
    return layer


@torch.inference_mode()
def _features(base: BaseModel, layer: nn.Linear, rows: list[dict[str, Any]]) -> Tensor:
    """What the head reads of each row; of models that answer at each token, at the last one."""
    batch = {k: v.to(base.model.device) for k, v in base.task.batch(rows, base.tokenizer.pad_token_id).items()}
    read: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    try:
        with base.autocast():
            base.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    finally:
        hook.remove()
    (found,) = read
    if found.ndim == 3:
        last = batch["attention_mask"].sum(1) - 1
        found = found[torch.arange(len(found), device=found.device), last]
    return found.float().cpu()


def is_start(adapter: Adapter) -> bool:
    """Whether what the server sent is the start of a head, and no adapter."""
    return {*adapter.dense} == {*START} and not adapter.lora


def fill(model: "PeftModel", base: BaseModel, start: Mapping[str, Tensor]) -> None:
    """Put the start of the head into a fresh adapter.

    Raises:
        WireError: it is the start of another head, or none.
    """
    layer = _linear_of(model, base)
    found = Head.read(start)
    fits = {"weight": layer[0].shape, "bias": layer[0].shape[:1], "constant": layer[0].shape[1:]}
    if any(getattr(found, name).shape != shape for name, shape in fits.items()) or not all(
        bool(tensor.isfinite().all()) for tensor in vars(found).values()
    ):
        raise WireError("the server's start of the head does not fit this site's model", code="adapter_misfit")
    with torch.no_grad():
        layer[0].copy_(found.weight if len(layer) == 2 else found.without_bias)
        if len(layer) == 2:
            layer[1].copy_(found.bias)


def _linear_of(model: "PeftModel", base: BaseModel) -> list[Tensor]:
    """Weight of the trained head, and its bias where it has one."""
    found = heads(model, base)
    if len(base.heads) != 1 or not 1 <= len(found) <= 2 or found[0].ndim != 2:
        raise WireError("the server's start of the head does not fit this site's model", code="adapter_misfit")
    return found
