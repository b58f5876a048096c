"""A lower bound on ε from one training run: which canaries were trained on is guessed, and good guesses cost privacy.

After Steinke, Nasr and Jagielski, "Privacy auditing with one (1) training run" (arXiv:2305.08846, Theorem 5.2 and
appendix D). Each of m made-up rows is trained on if its coin shows heads. Whatever was trained under (ε, δ), guesses
about the coins are right no more often than by randomized response, but for a term with δ.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, log, log1p

import numpy as np
import torch

from .membership import CONFIDENCE

LEAST, MOST = 20, 5_000  # canaries
TRIES = (1, 2, 4)  # the guesses are about all canaries, the surest half of them and the surest quarter
_PRECISION = 1e-4


@dataclass(frozen=True)
class Bound:
    """What guesses about canaries show.

    Args:
        epsilon: no training under a smaller ε, at this δ, is told apart so well but in 5 of 100 audits.
        ceiling: the largest bound that so many canaries can show.
        guesses, right: those of the try with the largest bound; where scores are tied, none of them is right.
    """

    canaries: int
    included: int
    epsilon: float
    ceiling: float
    delta: float
    guesses: int
    right: int


def bound(scores: Sequence[float], included: Sequence[bool], delta: float, confidence: float = CONFIDENCE) -> Bound:
    """Find the largest ε that the canaries rule out.

    The surest guesses count most where a training left few traces, and all of them where it left many. So the bound is
    tried with fixed shares of the guesses, and each try may be wrong in a third of the cases that all of them may.

    Args:
        scores: of the canaries, in an order that does not depend on the coins; a higher one looks more like a member.
        included: whether each was trained on.
        delta: δ of the claim that is tested.
    """
    count, error = len(scores), (1 - confidence) / len(TRIES)
    order = np.argsort(np.asarray(scores, dtype=float), kind="stable")
    ranked, coins = np.asarray(scores, dtype=float)[order], np.asarray(included, dtype=bool)[order]
    found = []
    for share in TRIES:
        half = count // share // 2
        low, high = slice(half), slice(count - half, None)
        are_in, are_out = ranked[high] > ranked[half - 1], ranked[low] < ranked[count - half]  # else tied: no guess
        right = int((coins[high] & are_in).sum() + (~coins[low] & are_out).sum())
        found.append((lower_bound(count, 2 * half, right, delta, error), 2 * half, right))
    epsilon, guesses, right = max(found)
    return Bound(count, int(coins.sum()), epsilon, ceiling(count, delta, confidence), delta, guesses, right)


def ceiling(canaries: int, delta: float = 0.0, confidence: float = CONFIDENCE, tries: int = len(TRIES)) -> float:
    """Compute the largest bound that so many canaries can show: all of them are guessed, and all guesses are right."""
    guesses = canaries // 2 * 2
    return lower_bound(canaries, guesses, guesses, delta, (1 - confidence) / tries)


def lower_bound(canaries: int, guesses: int, right: int, delta: float, error: float) -> float:
    """Find the largest ε, to four digits, at which so many right guesses have a probability of less than `error`.

    Args:
        canaries: all of them.
        guesses: made, whatever came out; about the others nothing was said.
    """
    if p_value(canaries, guesses, right, 0.0, delta) >= error:
        return 0.0
    low, high = 0.0, 1.0
    while p_value(canaries, guesses, right, high, delta) < error:
        low, high = high, 2 * high
    while high - low > _PRECISION:
        middle = (low + high) / 2
        low, high = (middle, high) if p_value(canaries, guesses, right, middle, delta) < error else (low, middle)
    return low


def p_value(canaries: int, guesses: int, right: int, epsilon: float, delta: float) -> float:
    """Bound the probability of so many right guesses, or more, after a training under (ε, δ).

    P[Binomial(r, e^ε/(1+e^ε)) ≥ v], and 2mδ times the largest mean probability of a count just below v.
    """
    rest = exp(-epsilon) / (1 + exp(-epsilon))
    counts = torch.arange(guesses + 1, dtype=torch.float64)
    ways = torch.lgamma(torch.tensor(guesses + 1.0, dtype=torch.float64))
    ways = ways - torch.lgamma(counts + 1) - torch.lgamma(guesses - counts + 1)
    probability = (ways + counts * log1p(-rest) + (guesses - counts) * log(rest)).exp()
    beta = float(probability[right:].sum())
    below = probability[:right].flip(0)
    alpha = float((below.cumsum(0) / torch.arange(1, right + 1, dtype=torch.float64)).max()) if right else 0.0
    return min(1.0, beta + alpha * 2 * canaries * delta)
