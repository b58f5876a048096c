"""What encoding the global adapter for its way to the sites has lost of it is put back when their changes are merged.

The sites train from what they received, and their change is told from that; it is added to the adapter that the server
keeps. So the error of one round's encoding is gone in the next, and does not add up.
"""

from torch import Tensor

from ..adapter import LoraPair
from ..algebra.lora import stack


def restored(merged: LoraPair, whole: LoraPair, received: LoraPair, canonical: bool) -> LoraPair:
    """`merged` + (`whole` − `received`): the result of a round on one layer, as if its sites had changed `whole`.

    Args:
        merged: of what the sites made of `received`.
        whole: what the server kept.
        received: what the sites decoded.
        canonical: the rule works on products; otherwise each factor is a mean, and is corrected as one.
    """
    if canonical:
        return stack([merged, whole, received], [1.0, 1.0, -1.0])
    if whole.rank != merged.rank:
        return merged
    ours, theirs = whole.rescaled(merged.scale), received.rescaled(merged.scale)
    return LoraPair(merged.A + (ours.A - theirs.A), merged.B + (ours.B - theirs.B), merged.scale)


def restored_tensor(merged: Tensor, whole: Tensor, received: Tensor) -> Tensor:
    """The same of a tensor without factors."""
    return merged + (whole.float() - received.float())
