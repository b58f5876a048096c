"""The coordinate-wise median (arXiv:1803.01498)."""

from collections.abc import Sequence

from torch import Tensor

from ...adapter import LoraPair
from . import rule
from .trimmed_mean import by_coordinate, of_frozen

HALF = 1e-9  # how near to half of the weight is half of it


def medians(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Halfway between the values at which half of the weight is reached from below and from above."""

    def middle(values: Tensor, ends: Tensor, begins: Tensor) -> Tensor:
        low = (ends < 0.5 - HALF).sum(0, keepdim=True)
        high = (begins <= 0.5 + HALF).sum(0, keepdim=True) - 1
        return ((values.gather(0, low) + values.gather(0, high)) / 2)[0]

    return by_coordinate(middle, tensors, weights)


@rule("median", exact=False, mixed_ranks=False, canonical=False, factors=("B",), tensor=medians)
def median(start: LoraPair, pairs: Sequence[LoraPair], weights: Sequence[float]) -> LoraPair:
    """(median of Bₖ) A, entry by entry, with the frozen A whatever a site sends, and every tensor without factors
    likewise. Sites with less than half of the weight cannot move a number out of the range of the others'.
    """
    return of_frozen(start, pairs, weights, medians)
