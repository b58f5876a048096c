"""What the sites measured of one adapter, as one number for each metric."""

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate

from .weigh import capped

BELOW_HALF = 0.49  # the most that a site weighs in a median
Measured = Mapping[str, Mapping[str, float]]  # site → metric → value


def mean(metrics: Measured, weights: Mapping[str, float]) -> dict[str, float]:
    """Each metric's weighted mean over the sites that have a weight and a finite value of it."""
    return {name: _mean(pairs) for name, pairs in _weighed(metrics, weights).items()}


def medians(metrics: Measured, weights: Mapping[str, float]) -> dict[str, float]:
    """Each metric's weighted median over the sites that have a weight and a finite value of it; of two sites the mean.

    No site weighs half or more, so one of three or more cannot move it out of the range of the others' values.
    """
    return {
        name: _median(pairs) if len(pairs) > 2 else _mean(pairs) for name, pairs in _weighed(metrics, weights).items()
    }


def _mean(pairs: Sequence[tuple[float, float]]) -> float:
    return sum(weight * value for weight, value in pairs) / sum(weight for weight, _ in pairs)


def _median(pairs: Sequence[tuple[float, float]]) -> float:
    """Halfway between the values at which half of the weight is reached from below and from above."""
    shares = capped([weight for weight, _ in pairs], [BELOW_HALF] * len(pairs))
    ordered = sorted(zip((value for _, value in pairs), shares, strict=True))
    return (_reached(ordered) + _reached(ordered[::-1])) / 2


def _reached(ordered: Sequence[tuple[float, float]]) -> float:
    behind = accumulate(share for _, share in ordered)
    return next(value for (value, _), share in zip(ordered, behind, strict=True) if share >= 0.5 - 1e-9)


def _weighed(metrics: Measured, weights: Mapping[str, float]) -> dict[str, list[tuple[float, float]]]:
    """Metric → (weight, value) of each site that has both, in the order of their names."""
    found: dict[str, list[tuple[float, float]]] = {}
    for name in sorted({name for site in metrics for name in metrics[site]}):
        values = [(weights.get(site, 0.0), metrics[site].get(name, math.nan)) for site in sorted(metrics)]
        if pairs := [(weight, value) for weight, value in values if weight > 0 and math.isfinite(value)]:
            found[name] = pairs
    return found
