"""The delta form: what the sites changed is added to the adapter they all started from."""

from collections.abc import Sequence

import torch

from ...adapter import LoraPair
from ...algebra.lora import Joined, stack
from . import rule


@rule("exact", exact=True, mixed_ranks=True, canonical=True, rest="tail")
def exact(start: LoraPair, pairs: Sequence[LoraPair], weights: Sequence[float]) -> LoraPair:
    """G + Σ wₖ(ΔWₖ − ΔW⁰ₖ), where ΔW⁰ₖ is the part of G that site k trained: its first rₖ directions.

    A direction that a low-rank site never held cannot be shrunk by it. The frozen directions beside the trained
    ones make every site start from exactly G, so this is also Σ wₖ(the whole adapter of site k).
    """
    kept = torch.ones(start.rank, dtype=torch.float64)
    for pair, weight in zip(pairs, weights, strict=True):
        kept[: pair.rank] -= weight
    left = LoraPair(start.A, start.B * kept.to(start.B), start.scale)
    return stack(Joined([left], pairs), [1.0, *weights])
