"""A round whose merge fails for a reason that no check foresaw: most of it is merged, or the last adapter stays."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from ..adapter import AdapterUpdate
from ..errors import WireError
from ..record.reason import Reason
from .combine import Combined

RoundMerge = Callable[[Sequence[AdapterUpdate]], Combined]


def without_the_largest(merge: RoundMerge, updates: Sequence[AdapterUpdate], why: str) -> Combined:
    """Merges all but the sites with the largest values: first without one, then two, four, … while most remain.

    Args:
        why: the whole round cannot be merged.

    Raises:
        WireError: no such part of the round can be merged either.
    """
    largest = sorted(updates, key=lambda update: (-_largest(update), update.site))
    left_out = 1
    while left_out <= (len(updates) - 1) // 2:
        try:
            merged = merge(largest[left_out:])
        except Exception:  # whatever it is, the next part is smaller
            left_out *= 2
            continue
        with_it = Reason("rejected", f"the round cannot be merged with it: {why}", "merge_failed")
        reasons: Mapping[str, Reason] = {update.site: with_it for update in largest[:left_out]}
        return replace(merged, refused={**merged.refused, **reasons})
    raise WireError(f"the round cannot be merged, nor most of it: {why}", code="merge_failed")


def _largest(update: AdapterUpdate) -> float:
    if update.adapter.sealed:
        return 0.0  # nobody here can tell
    found = [float(tensor.abs().max()) for tensor in update.adapter.tensors().values() if tensor.numel()]
    return max((value if math.isfinite(value) else math.inf for value in found), default=0.0)
