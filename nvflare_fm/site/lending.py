"""Giving a model back as it was lent: PEFT, bitsandbytes and a Trainer change modules in place."""

from collections.abc import Callable, Iterator
from typing import Any

from torch import nn


def remembered(model: nn.Module) -> Callable[[], None]:
    """What puts a model's modules back as they are now: layers wrapped, hooks, flags, weights that were replaced and
    what belongs to quantized ones. Values that are changed where they lie are not seen.
    """
    things = [thing for module in model.modules() for thing in _parts(module)]
    kept = [(thing, dict(vars(thing))) for thing in things]
    inside = [(inner, dict(inner)) for _, values in kept for inner in values.values() if isinstance(inner, dict)]
    data = [(parameter, parameter.data) for parameter in model.parameters()]

    def put_back() -> None:
        for thing, values in kept:
            vars(thing).clear()
            vars(thing).update(values)
        for inner, values in inside:  # the same dict: handles of hooks refer to it
            inner.clear()
            inner.update(values)
        for parameter, numbers in data:
            parameter.data = numbers

    return put_back


def _parts(module: nn.Module) -> Iterator[Any]:
    """A module, and what of a quantized layer keeps scales beside its numbers."""
    yield module
    for parameter in module.parameters(recurse=False):
        yield parameter
        if (scales := getattr(parameter, "quant_state", None)) is not None:  # 4 bits
            yield scales
    if hasattr(state := getattr(module, "state", None), "SCB"):  # 8 bits
        yield state
