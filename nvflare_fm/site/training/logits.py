"""Logits at the positions that are learned, and at no others; a language model's, a few positions at a time.

A language model answers each position with a logit for every word of its vocabulary, and a loss keeps several copies of
them. So the model's own head runs on the hidden states of some positions at a time, and each time the gradient is taken
with the loss, as in Liger Kernel's fused linear cross-entropy (arXiv:2410.10989): nothing is computed twice.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import BaseModelOutput, ModelOutput

from ...job.cost import positions_at_once
from .memory import ran_out

if TYPE_CHECKING:
    from ..model.base_model import BaseModel
    from ..tasks import Columns

T = TypeVar("T")
Measure = Callable[[Tensor, Tensor], T]  # of logits in float32, (items, classes), and of targets, (items,)
Output = Callable[[Tensor], Any]  # makes what a backbone hands to the head, of hidden states
_CLOSE = 1e-2  # of the largest logit: 16-bit products of another shape are rounded differently


def total(model: Any, base: "BaseModel", batch: "Columns", loss: Measure[Tensor]) -> Tensor:
    """The sum of `loss` over all that is learned of a batch.

    Args:
        model: the base model with its adapter, as it trains: perhaps in wrappers for precision and processes.
        batch: see `Task.batch`.
        loss: a sum over items.
    """
    targets = batch["targets"]
    if not _in_parts(base, len(targets)):
        return loss(_whole(model, base, batch).float(), targets)
    states, output = _hidden_states(model, base, batch)

    def at(some: Tensor, start: int) -> Tensor:
        return loss(_head(base, output, some), targets[start : start + len(some)])

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]  # the head's may be among them
    summed: Tensor = _Summed.apply(at, _at_once(base), states, *trained)
    return summed


def values(model: Any, base: "BaseModel", batch: "Columns", measure: Measure[Tensor]) -> Tensor:
    """What `measure` makes of each item that is learned of a batch, (items,), with its gradient.

    For losses that are no sum over items: what the gradient of one item's value is multiplied by is known only when
    all values are. So the head answers a second time on the way back.

    Args:
        measure: makes a value for each item.
    """
    targets = batch["targets"]
    if not _in_parts(base, len(targets)):
        return measure(_whole(model, base, batch).float(), targets)
    states, output = _hidden_states(model, base, batch)

    def at(some: Tensor, answers: Tensor) -> Tensor:
        return measure(_head(base, output, some), answers)

    parts = zip(states.split(_at_once(base)), targets.split(_at_once(base)), strict=True)
    return torch.cat([checkpoint(at, some, answers, use_reentrant=False) for some, answers in parts])


def each(model: Any, base: "BaseModel", batch: "Columns", measure: Measure[T]) -> list[T]:
    """What `measure` makes of all that is learned of a batch, of some items at a time, without gradients."""
    targets = batch["targets"]
    if not _in_parts(base, len(targets)):
        return [measure(_whole(model, base, batch).float(), targets)]
    states, output = _hidden_states(model, base, batch)
    parts = zip(states.split(_at_once(base)), targets.split(_at_once(base)), strict=True)
    return [measure(_head(base, output, some), answers) for some, answers in parts]


@torch.inference_mode()
def find_backbone(model: Any, ids: list[int]) -> nn.Module | None:
    """The part of a language model of whose hidden states at some positions its logits there can be made; None: there
    is no such part, and all logits are made at once.

    Args:
        ids: a text to try it with. On the meta device only shapes are looked at.
    """
    parts = [model.base_model, model.get_decoder()]
    tried = _fits if model.device.type == "meta" else _agrees
    for part in [part for part in parts if part not in (model, None)]:
        try:
            if tried(model, part, ids):
                return part
        except Exception as error:  # models take their backbone's output apart in many ways
            if ran_out(error):
                raise
    return None


def _agrees(model: Any, backbone: nn.Module, ids: list[int]) -> bool:
    some = torch.arange(0, len(ids), 2, device=model.device)
    seen: list[tuple[Tensor, Output]] = []

    def look(states: Tensor, output: Output) -> Tensor:
        seen.append((states, output))
        return states

    with _passing(backbone, look):
        logits = model(input_ids=torch.tensor([ids], device=model.device)).logits[0]
    states, output = seen[0]
    ours = _answers(model, backbone, output, states[0, some])
    return bool((ours - logits[some]).abs().max() <= _CLOSE * logits.abs().max())


def _fits(model: Any, backbone: nn.Module, ids: list[int]) -> bool:
    head, called = model.get_output_embeddings(), []

    def output(states: Tensor) -> Any:
        called.append(True)
        return _Silent(last_hidden_state=states)

    states = torch.empty(len(ids), head.weight.shape[1], device="meta")
    return len(_answers(model, backbone, output, states)) == len(ids) and bool(called)


class _Silent(BaseModelOutput):  # type: ignore[misc]
    """The output of any backbone: whatever else a head asks for is not there."""

    def __getattr__(self, _: str) -> None:
        return None


class _Summed(torch.autograd.Function):
    """Σ of a loss over hidden states, some at a time; of each the gradient is taken before the next are looked at."""

    @staticmethod
    def forward(
        ctx: Any, loss: Callable[[Tensor, int], Tensor], at_once: int, states: Tensor, *trained: Tensor
    ) -> Tensor:
        summed, into = torch.zeros((), device=states.device), torch.empty_like(states)
        gradients: list[Tensor | None] = [None] * len(trained)
        for start in range(0, len(states), at_once):
            with torch.enable_grad():
                some = states[start : start + at_once].detach().requires_grad_()
                nats = loss(some, start)
            into[start : start + at_once], *found = torch.autograd.grad(nats, (some, *trained), allow_unused=True)
            gradients = [_added(*pair) for pair in zip(gradients, found, strict=True)]
            summed += nats.detach()
        ctx.save_for_backward(into, *gradients)
        return summed

    @staticmethod
    def backward(ctx: Any, *gradient: Tensor) -> Any:
        return None, None, *(None if saved is None else gradient[0] * saved for saved in ctx.saved_tensors)


def _added(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    return other if one is None else one if other is None else one + other


def _in_parts(base: "BaseModel", items: int) -> bool:
    return base.backbone is not None and items > _at_once(base)


def _at_once(base: "BaseModel") -> int:
    return positions_at_once(getattr(base.model.config.get_text_config(), "vocab_size", 0))


def _whole(model: Any, base: "BaseModel", batch: "Columns") -> Tensor:
    """(items, classes): of a head that is apart at what is learned alone, otherwise picked from all of them."""
    if base.backbone is None:
        return _picked(_forward(model, batch).logits, batch)
    with _passing(base.backbone, lambda states, _: _picked(states, batch)[None]):
        logits: Tensor = _forward(model, batch).logits[0]
    return logits


def _hidden_states(model: Any, base: "BaseModel", batch: "Columns") -> tuple[Tensor, Output]:
    """Of what is learned, (items, width), and what makes the head's input of some of them."""
    kept: list[tuple[Tensor, Output]] = []

    def keep(states: Tensor, output: Output) -> Tensor:
        kept.append((_picked(states, batch), output))
        return states[:1, :1]  # its logits are not looked at

    with _passing(base.backbone, keep):
        _forward(model, batch)
    return kept[0]


def _forward(model: Any, batch: "Columns") -> Any:
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])


def _picked(values: Tensor, batch: "Columns") -> Tensor:
    """Of what a model says at all positions, or of all texts, that where something is learned."""
    if values.ndim == 3:  # prompt tuning has virtual tokens before the text's
        values = values[:, -batch["input_ids"].shape[1] :].flatten(0, 1)
    return values.index_select(0, batch["places"])


def _head(base: "BaseModel", output: Output, states: Tensor) -> Tensor:
    with base.autocast():
        return _answers(base.model, base.backbone, output, states).float()


def _answers(model: Any, backbone: Any, output: Output, states: Tensor) -> Tensor:
    """(items, words): the model's own way from hidden states to logits, its backbone left out."""
    before = backbone.__dict__.get("forward")
    backbone.forward = lambda *_, **__: output(states[None])
    try:
        logits: Tensor = model(input_ids=torch.zeros(1, len(states), dtype=torch.long, device=states.device)).logits[0]
    finally:
        del backbone.forward
        if before is not None:
            backbone.forward = before
    return logits


@contextmanager
def _passing(backbone: nn.Module | None, chosen: Callable[[Tensor, Output], Tensor]) -> Iterator[None]:
    """While it lasts, the head gets what `chosen` makes of the backbone's hidden states."""
    assert backbone is not None

    def replace(_: nn.Module, __: Any, given: Any) -> Any:
        kind, names = type(given), list(given) if isinstance(given, ModelOutput) else []

        def output(states: Tensor) -> Any:
            return kind(**{names[0]: states}) if names else (states,)

        return output(chosen(given[0], output))

    hook = backbone.register_forward_hook(replace)
    try:
        yield
    finally:
        hook.remove()
