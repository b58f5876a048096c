"""FedIT (arXiv:2305.05644): the factors are averaged, each on its own."""

from collections.abc import Sequence

from ...adapter import LoraPair
from . import rule


@rule("factor_mean", exact=False, mixed_ranks=False, canonical=False)
def factor_mean(start: LoraPair, pairs: Sequence[LoraPair], weights: Sequence[float]) -> LoraPair:
    """(Σ wₖBₖ)(Σ wₖAₖ): off from the mean product by −Σ wₖ(Bₖ − B̄)(Aₖ − Ā)."""
    scale = pairs[0].scale
    aligned = [p.rescaled(scale) for p in pairs]
    return LoraPair(
        A=sum(w * p.A for p, w in zip(aligned, weights, strict=True)),  # type: ignore[arg-type]
        B=sum(w * p.B for p, w in zip(aligned, weights, strict=True)),  # type: ignore[arg-type]
        scale=scale,
    )
