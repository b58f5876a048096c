"""The coordinate-wise trimmed mean (arXiv:1803.01498): the largest and smallest values of each number are left out."""

from collections.abc import Callable, Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from ...adapter import LoraPair
from ..cohort import ENTRIES
from . import Tensors, rule
from .freeze_a import frozen_a

OfSorted = Callable[[Tensor, Tensor, Tensor], Tensor]
Trim = Annotated[float, Field(ge=0, lt=0.5, description="share of the weight that is left out at either end")]


def trimmed(tensors: Sequence[Tensor], weights: Sequence[float], *, trim: float = 0.25) -> Tensor:
    """The mean of what remains of each number when `trim` of the weight is left out at either end. With equal weights
    it is the paper's: of n values, those beyond trim · n from either end do not count.
    """

    def between(values: Tensor, ends: Tensor, begins: Tensor) -> Tensor:
        kept = (ends.clamp(max=1 - trim) - begins.clamp(min=trim)).clamp(min=0)
        return (values * kept).sum(0) / (1 - 2 * trim)

    return by_coordinate(between, tensors, weights)


@rule("trimmed_mean", exact=False, mixed_ranks=False, canonical=False, factors=("B",), tensor=trimmed)
def trimmed_mean(
    start: LoraPair, pairs: Sequence[LoraPair], weights: Sequence[float], *, trim: Trim = 0.25
) -> LoraPair:
    """(trimmed mean of Bₖ) A, with the frozen A whatever a site sends: only beside one A do the same entries of two
    sites' B mean the same. Every tensor without factors likewise.
    """
    return of_frozen(start, pairs, weights, lambda tensors, shares: trimmed(tensors, shares, trim=trim))


def of_frozen(start: LoraPair, pairs: Sequence[LoraPair], weights: Sequence[float], of: Tensors) -> LoraPair:
    """The pair whose B is made of the sites' by `of`, at one scale, beside the A that nobody trains."""
    held = list(pairs)
    scale = held[0].scale
    return LoraPair(frozen_a(start, held), of([p.rescaled(scale).B for p in held], weights), scale)


def by_coordinate(of: OfSorted, tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Hand the values of each coordinate to `of`, sorted, each as long as its weight on a line from 0 to 1: values,
    where each ends and where it begins. Sites without weight are not on it.
    """
    said = [(tensor, weight) for tensor, weight in zip(tensors, weights, strict=True) if weight > 0]
    every = torch.stack([tensor.flatten() for tensor, _ in said])
    shares = torch.tensor([weight for _, weight in said], dtype=torch.float64)
    shares = shares / shares.sum()
    parts = []
    for some in torch.split(every, max(1, ENTRIES // len(said)), dim=1):
        values, order = some.sort(dim=0)
        ends = shares[order].cumsum(0)
        parts.append(of(values, ends, ends - shares[order]).to(every))
    return torch.cat(parts).reshape(said[0][0].shape) if parts else said[0][0]
