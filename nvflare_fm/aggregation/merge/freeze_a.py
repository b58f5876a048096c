"""FFA-LoRA (arXiv:2403.12313): every site keeps the same random A and trains B alone, so the mean of B is exact."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ...adapter import LoraPair
from . import rule
from .factor_mean import factor_mean


@rule("freeze_a", exact=False, mixed_ranks=False, canonical=False, factors=("B",), linear_sum=True)
def freeze_a(start: LoraPair, pairs: Sequence[LoraPair], weights: Sequence[float]) -> LoraPair:
    """(Σ wₖBₖ) A, with the frozen A whatever a site sends: the global adapter's, in the first round the seed's, which
    most sites hold: entry by entry the middle of what they sent.
    """
    frozen = frozen_a(start, pairs)
    return factor_mean(start, [LoraPair(frozen, p.B, p.scale) for p in pairs], weights)


def frozen_a(start: LoraPair, pairs: Sequence[LoraPair]) -> Tensor:
    """The A that no site trains, whatever a site sends."""
    return start.A if start.rank else torch.stack([p.A for p in pairs]).median(dim=0).values
