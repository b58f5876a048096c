"""Sums, lengths and distances of what sites changed: products as pairs of stacked factors, never dense."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from ...adapter import Adapter, LoraPair
from ...aggregation.cohort import Cohort
from ...algebra.lora import stack
from . import Updates


def added(changes: Sequence[Adapter], weights: Sequence[float]) -> Adapter:
    """Σ wₖDₖ, exactly: a pair of stacked factors of each layer."""
    first = changes[0]
    lora = {n: stack([c.lora[n] for c in changes], weights) for n in first.lora}
    dense = {
        n: sum((w * c.dense[n] for c, w in zip(changes, weights, strict=True)), torch.zeros(())) for n in first.dense
    }
    return Adapter(lora, dense)


def mean(changes: Sequence[Adapter]) -> Adapter:
    """The mean change."""
    return added(changes, [1 / len(changes)] * len(changes))


def times(change: Adapter, products: float, dense: float) -> Adapter:
    """A change with its two parts made longer, or shorter."""
    lora = {n: LoraPair(p.A, products * p.B, p.scale) for n, p in change.lora.items()}
    return Adapter(lora, {n: dense * t for n, t in change.dense.items()})


def gram(changes: Sequence[Adapter], like: Updates) -> tuple[Float[Tensor, "k k"], Float[Tensor, "k k"]]:
    """⟨Dᵢ, Dⱼ⟩ of the products, and of the tensors without factors.

    Args:
        like: any update.
    """
    cohort = Cohort([replace(like[0], adapter=change) for change in changes], needs=("products", "dense"))
    return cohort.products, cohort.dense


def std(changes: Sequence[Adapter]) -> Adapter:
    """The standard deviation of each entry over the sites. Of products it has full rank: a factor is the identity."""
    lora = {}
    for layer, pair in changes[0].lora.items():
        entries = torch.stack([change.lora[layer].delta() for change in changes]).std(dim=0, correction=0)
        fan_out, fan_in = pair.shape
        lora[layer] = (
            LoraPair(entries, torch.eye(fan_out)) if fan_out <= fan_in else LoraPair(torch.eye(fan_in), entries)
        )
    dense = {n: torch.stack([c.dense[n] for c in changes]).std(dim=0, correction=0) for n in changes[0].dense}
    return Adapter(lora, dense)
