"""RoLoRA (arXiv:2409.02346): the sites train B in one round and A in the next, so each mean is exact."""

from collections.abc import Sequence

from ...adapter import LoraPair
from . import rule
from .factor_mean import factor_mean


@rule("alternate", exact=False, mixed_ranks=False, canonical=False, factors=("B", "A"))
def alternate(start: LoraPair, pairs: Sequence[LoraPair], weights: Sequence[float]) -> LoraPair:
    """(Σ wₖBₖ)(Σ wₖAₖ), in which the factor that was frozen is the same at every site. B first: at B = 0, A has no
    gradient.
    """
    return factor_mean(start, pairs, weights)
