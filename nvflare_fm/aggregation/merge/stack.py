"""FLoRA (arXiv:2409.05976), without folding into the base: sites train fresh pairs beside the whole global adapter."""

from collections.abc import Sequence

from ...adapter import LoraPair
from ...algebra import lora
from . import rule


@rule("stack", exact=True, mixed_ranks=True, canonical=True, rest="all")
def stack(start: LoraPair, pairs: Sequence[LoraPair], weights: Sequence[float]) -> LoraPair:
    """G + Σ wₖΔWₖ, where ΔWₖ starts each round at zero. The rank would grow by Σ rₖ a round; shortening bounds it."""
    return lora.stack(lora.Joined([start], pairs), [1.0, *weights])
