"""raFLoRA (arXiv:2602.13486): each partition of the rank is averaged over the sites that reach it, then cut by SVD."""

from collections.abc import Sequence

import torch

from ...adapter import LoraPair
from ...algebra.lora import stack
from . import rule


@rule("rank_partition", exact=False, mixed_ranks=True, canonical=True)
def rank_partition(start: LoraPair, pairs: Sequence[LoraPair], weights: Sequence[float]) -> LoraPair:
    """Σⱼ Σ_{k: rₖ ≥ j} (wₖ / Σ_{l: rₗ ≥ j} wₗ) sₖ Bₖ[:, j] Aₖ[j]; a direction no site reaches stays as it was."""
    reach = torch.zeros(max(start.rank, *(p.rank for p in pairs)), dtype=torch.float64)
    for pair, weight in zip(pairs, weights, strict=True):
        reach[: pair.rank] += weight
    share = torch.where(reach > 0, 1 / reach, 0.0)
    parts = [LoraPair(p.A, p.B * share[: p.rank].to(p.B), p.scale) for p in pairs]
    kept = LoraPair(start.A, start.B * (reach[: start.rank] == 0).to(start.B), start.scale)
    return stack([kept, *parts], [1.0, *weights])
