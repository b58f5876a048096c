"""FlexLoRA (arXiv:2402.11505): the weighted mean of the products, cut back to rank by SVD."""

from collections.abc import Sequence

from ...adapter import LoraPair
from ...algebra.lora import stack
from . import rule


@rule("svd", exact=True, mixed_ranks=True, canonical=True)
def svd(start: LoraPair, pairs: Sequence[LoraPair], weights: Sequence[float]) -> LoraPair:
    """Σ wₖ sₖBₖAₖ. Sites start from the first rₖ directions alone, so directions above the smallest rank fade."""
    return stack(pairs, weights)
