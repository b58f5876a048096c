"""How well losses tell the rows that an adapter was trained on from rows that were held out.

A row's score is its loss without the adapter minus its loss with it: the base model is a reference that has not seen
the row, so hard rows are not taken for strange ones (Watson et al., arXiv:2111.08440). An attack that says "member"
above a threshold has a receiver operating characteristic; its area (AUC) is ½ where the scores tell nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import NormalDist

import numpy as np

LEAST = 10  # rows on either side: with fewer, an AUC of ½ could as well be 0.75
CONFIDENCE = 0.95
FALSE_ALARMS = (0.001, 0.01, 0.1)  # rates at which an attack is looked at (Carlini et al., arXiv:2112.03570)
Curve = tuple[tuple[float, float], ...]  # share of held-out rows taken for members → share of members found


@dataclass(frozen=True)
class Membership:
    """How well scores tell members from held-out rows.

    Args:
        low, high: the interval of `auc`, in 95 of 100 audits.
        found: rate of false alarms → share of members found at it, for rates that so many held-out rows can show.
        by_chance: how far from ½ an AUC of scores that tell nothing is, in 95 of 100 audits at most.
    """

    members: int
    held_out: int
    auc: float
    low: float
    high: float
    found: Mapping[float, float]
    by_chance: float


def membership(members: Sequence[float], held_out: Sequence[float]) -> Membership:
    """Measure how well scores tell members from held-out rows.

    Args:
        members, held_out: scores, at least two on either side; a higher one looks more like a member.
    """
    ours, others = np.asarray(members, dtype=float), np.asarray(held_out, dtype=float)
    low, high = interval(ours, others)
    return Membership(
        len(ours),
        len(others),
        auc(ours, others),
        low,
        high,
        {rate: found_at(ours, others, rate) for rate in FALSE_ALARMS if rate * len(others) >= 1},
        by_chance(len(ours), len(others)),
    )


def auc(members: Sequence[float] | np.ndarray, held_out: Sequence[float] | np.ndarray) -> float:
    """Compute the share of pairs in which the member has the higher score; a tie counts half (Mann and Whitney)."""
    return float(_placements(np.asarray(members), np.asarray(held_out)).mean())


def interval(
    members: Sequence[float] | np.ndarray, held_out: Sequence[float] | np.ndarray, confidence: float = CONFIDENCE
) -> tuple[float, float]:
    """Compute an interval of the AUC: the wider of two at either end.

    DeLong's (Biometrics 44, 1988) holds for scores of any distribution, if rows are many; its width is 0 where the
    scores separate all rows. Newcombe's method 5 (Statistics in Medicine 25, 2006) is right for few rows and at the
    ends, where its assumption on the distribution matters least. Both take rows for independent.
    """
    ours, others = np.asarray(members), np.asarray(held_out)
    z, found = NormalDist().inv_cdf((1 + confidence) / 2), auc(ours, others)
    spread = z * sqrt(
        _placements(ours, others).var(ddof=1) / len(ours) + _placements(others, ours).var(ddof=1) / len(others)
    )
    below = _newcombe(found, len(ours), len(others), z)
    above = 1 - _newcombe(1 - found, len(ours), len(others), z)
    return max(0.0, min(below, found - spread)), min(1.0, max(above, found + spread))


def by_chance(members: int, held_out: int, confidence: float = CONFIDENCE) -> float:
    """Compute how far from ½ the AUC of scores that tell nothing lies at most, with this confidence."""
    return NormalDist().inv_cdf((1 + confidence) / 2) * sqrt((members + held_out + 1) / (12 * members * held_out))


def found_at(members: Sequence[float] | np.ndarray, held_out: Sequence[float] | np.ndarray, rate: float) -> float:
    """Compute the share of members that score above all but a share `rate` of the held-out rows."""
    falling = np.sort(np.asarray(held_out))[::-1]
    allowed = int(rate * len(falling) + 1e-9)
    return float((np.asarray(members) > falling[allowed]).mean()) if allowed < len(falling) else 1.0


def curve(members: Sequence[float], held_out: Sequence[float]) -> Curve:
    """Compute the receiver operating characteristic, from (0, 0) to (1, 1): a point for each threshold."""
    ours, others = np.sort(np.asarray(members)), np.sort(np.asarray(held_out))
    thresholds = np.unique(np.concatenate([ours, others]))[::-1]
    alarms = 1 - np.searchsorted(others, thresholds, "left") / len(others)
    found = 1 - np.searchsorted(ours, thresholds, "left") / len(ours)
    return ((0.0, 0.0), *zip(alarms.tolist(), found.tolist(), strict=True))


def _placements(ours: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Of each of `ours`, the share of `others` that it exceeds."""
    ranked = np.sort(others)
    return (np.searchsorted(ranked, ours, "left") + np.searchsorted(ranked, ours, "right")) / (2 * len(ranked))


def _newcombe(found: float, members: int, held_out: int, z: float) -> float:
    """The least AUC that is no more than z of its own standard deviations below the one found."""
    half = (members + held_out) / 2 - 1

    def is_near(area: float) -> bool:
        shape = 1 + half * (1 - area) / (2 - area) + half * area / (1 + area)
        return found - area <= z * sqrt(area * (1 - area) * shape / (members * held_out))

    low, high = 0.0, found
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if is_near(middle) else (middle, high)
    return low
