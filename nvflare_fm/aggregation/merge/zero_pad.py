"""HetLoRA (arXiv:2401.06432): factors are padded with zeros to the largest rank, then averaged."""

from collections.abc import Sequence

import torch

from ...adapter import LoraPair
from . import rule
from .factor_mean import factor_mean


@rule("zero_pad", exact=False, mixed_ranks=True, canonical=False)
def zero_pad(start: LoraPair, pairs: Sequence[LoraPair], weights: Sequence[float]) -> LoraPair:
    """`factor_mean` of padded factors; a site starts from the first rₖ rows and columns."""
    rank = max(start.rank, *(p.rank for p in pairs))
    return factor_mean(start, [pad(p, rank) for p in pairs], weights)


def pad(pair: LoraPair, rank: int) -> LoraPair:
    """The same ΔW at `rank`, the new rows and columns zero."""
    missing = rank - pair.rank
    pad_ = torch.nn.functional.pad
    return LoraPair(pad_(pair.A, (0, 0, 0, missing)), pad_(pair.B, (0, missing)), pair.scale)
