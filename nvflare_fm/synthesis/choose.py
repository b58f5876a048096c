"""Which candidates are kept, by their noisy votes. All that is done here costs no further ε."""

import math
from collections.abc import Iterable, Sequence
from statistics import NormalDist
from typing import SupportsFloat


def choose(votes: Iterable[SupportsFloat], labels: Sequence[str | None], per_label: int, threshold: float) -> list[int]:
    """Choose the candidates with the most votes, of each label so many.

    Args:
        votes: of each candidate, over all sites, with noise; one that is not finite is no vote.
        labels: of the candidates.
        per_label: how many of a label are chosen at most.
        threshold: votes that a candidate must exceed; see `threshold`.
    Returns:
        Places of the chosen, most votes first; of equal votes, the first place first.
    """
    counted = [float(count) for count in votes]
    enough = [place for place, count in enumerate(counted) if threshold < count < math.inf]
    left = dict.fromkeys(labels, per_label)
    chosen = []
    for place in sorted(enough, key=lambda place: (-counted[place], place)):
        if left[labels[place]] > 0:
            left[labels[place]] -= 1
            chosen.append(place)
    return chosen


def threshold(sigma: float, chance: float) -> float:
    """Compute how many votes noise alone exceeds with this chance.

    Args:
        sigma: standard deviation of the noise on one candidate's votes, over all sites: of sites that each add their
            own noise, the square root of the sum of their squares.
        chance: with which a candidate that nobody voted for may pass; between 0 and 1.
    """
    return max(0.0, -sigma * NormalDist().inv_cdf(chance))
