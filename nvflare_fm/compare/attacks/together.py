"""Attacks of those who know what the others send: as much harm as stays within what honest sites do."""

import math
from collections.abc import Sequence
from statistics import NormalDist, median
from typing import Annotated

import torch
from pydantic import Field

from ...adapter import Adapter, AdapterUpdate
from . import Known, on_updates
from .changes import added, gram, mean, std, times


def _all_send(known: Known, change: Adapter) -> list[AdapterUpdate]:
    return [known.sent(change, update) for update in known.own]


def z_max(sites: int, attackers: int) -> float:
    """How many standard deviations a change may lie off so that a majority of the sites lies farther off (A Little Is
    Enough, algorithm 3); 0 where attackers are too few.
    """
    supporters = sites // 2 + 1 - attackers
    share = (sites - attackers - supporters) / (sites - attackers)
    return max(0.0, NormalDist().inv_cdf(share)) if 0 < share < 1 else 0.0 if share <= 0 else math.inf


@on_updates.register("alie")
def alie(
    known: Known,
    *,
    z: Annotated[float, Field(ge=0, le=100, description="standard deviations; 0: the paper's z, often 0 here")] = 1.5,
) -> list[AdapterUpdate]:
    """μ − z σ, entry by entry, of the honest changes (A Little Is Enough, arXiv:1902.06156). For few sites the paper's
    z is 0; the default is that of its authors' code.
    """
    sites = len(known.own) + len(known.honest)
    off = z or z_max(sites, len(known.own))
    changes = known.honest_changes
    return _all_send(known, added([mean(changes), std(changes)], [1.0, -off]))


@on_updates.register("ipm")
def ipm(
    known: Known,
    *,
    epsilon: Annotated[float, Field(ge=0, le=1e6, description="0: enough that the mean of all turns round")] = 0.0,
) -> list[AdapterUpdate]:
    """−ε μ: the inner product of what is aggregated and the honest mean μ is to be negative (inner product
    manipulation, arXiv:1903.03936). Of the plain mean of n sites with m attackers it is for ε > (n − m) / m; the
    default is 1.1 times that. A small ε, such as 0.5, is what rules that look at distances let through.
    """
    far = epsilon or 1.1 * len(known.honest) / len(known.own)
    return _all_send(known, times(mean(known.honest_changes), -far, -far))


@on_updates.register("min_max")
def min_max(known: Known) -> list[AdapterUpdate]:
    """μ − γ μ/‖μ‖ with the largest γ at which no honest change lies farther from it than two of them from each other
    (Min-Max with the inverse unit vector, Shejwalkar and Houmansadr, NDSS 2021). γ is solved for, not searched.
    """
    changes = known.honest_changes
    inner = sum(gram(changes, known.honest), torch.zeros((), dtype=torch.float64))
    gamma = farthest(inner)
    length = float(inner.mean().clamp(min=0).sqrt())
    return _all_send(known, times(mean(changes), *[1 - gamma / length if length else 1.0] * 2))


def farthest(inner: torch.Tensor) -> float:
    """γ of Min-Max, of the honest changes' inner products: ‖(μ − Dᵢ) − γ u‖² ≤ max ‖Dᵢ − Dⱼ‖² for all i, u = μ/‖μ‖."""
    size, with_mean = inner.diag(), inner.mean(dim=1)
    squared = float(inner.mean())
    if squared <= 0:
        return 0.0
    most = float((size[:, None] + size - 2 * inner).max())
    along = (squared - with_mean) / math.sqrt(squared)  # ⟨μ − Dᵢ, u⟩
    apart = size - 2 * with_mean + squared  # ‖μ − Dᵢ‖²
    return max(0.0, float((along + (along.square() + most - apart).clamp(min=0).sqrt()).min()))


@on_updates.register("under_clip")
def under_clip(
    known: Known,
    *,
    most: Annotated[float, Field(ge=1, le=1e6, description="what clip_norm lets through, in medians")] = 4.0,
    share: Annotated[float, Field(gt=0, le=1, description="of that")] = 0.99,
) -> list[AdapterUpdate]:
    """−μ, as long as clip_norm leaves unclipped: it knows the rule (the adaptive attack on norm bounds of
    arXiv:1911.07963). Products and head are each as long as they may be.
    """
    products, dense = gram([mean(known.honest_changes), *known.honest_changes], known.honest)
    far = [
        -_times(part.diag().clamp(min=0).sqrt().tolist(), len(known.own), most * share) for part in (products, dense)
    ]
    return _all_send(known, times(mean(known.honest_changes), *far))


def _times(lengths: Sequence[float], attackers: int, most: float) -> float:
    """How many times μ, whose length comes first, is `most` times the median, if the attackers are the longest."""
    own, *honest = lengths
    usual = median([*(length for length in honest if length > 0), *[math.inf] * attackers])
    return most * usual / own if own > 0 and math.isfinite(usual) else 1.0
