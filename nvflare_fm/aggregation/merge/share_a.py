"""FedSA-LoRA (arXiv:2410.01463): sites share and average A; each keeps its own B, and so a model of its own."""

from collections.abc import Sequence

from ...adapter import LoraPair
from ...errors import WireError
from . import rule


@rule("share_a", exact=False, mixed_ranks=False, canonical=False, shares="A")
def share_a(start: LoraPair, pairs: Sequence[LoraPair], weights: Sequence[float]) -> LoraPair:
    """A travels without a B, so it is averaged like every tensor that is not half of a pair; no pair may arrive."""
    raise WireError("a site sent whole pairs where only A is shared; update nvflare_fm there", code="whole_pairs")
