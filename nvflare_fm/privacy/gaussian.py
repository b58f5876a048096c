"""What Gaussian noise costs where nothing is sampled, exactly, in closed form (arXiv:1805.06530, arXiv:1905.02383).

`rounds` releases with noise σ tell as much as one with noise σ/√rounds, so they compose without loss. Nothing but torch
is needed: a server counts by this file, and loads no accountant.
"""

import math

import torch

_HALVINGS = 200  # of an interval: more than float64 has digits


def epsilon(noise_multiplier: float, rounds: int, delta: float) -> float:
    """Compute the ε that `rounds` releases cost whoever is in all of them, to the last digits, from above.

    Args:
        noise_multiplier: σ, the noise in multiples of the farthest that one contribution moves the sum.
    """
    mu = math.sqrt(rounds) / noise_multiplier
    least, most = 0.0, mu**2 / 2 + mu * math.sqrt(-2 * math.log(delta))  # the bound of zCDP, arXiv:1605.02065
    for _ in range(_HALVINGS):
        middle = (least + most) / 2
        if _log_delta(middle, mu) > math.log(delta):
            least = middle
        else:
            most = middle
    return most


def noise_multiplier(target: float, rounds: int, delta: float) -> float:
    """Compute the least σ at which `rounds` releases cost an ε of at most `target`."""
    most = 1.0
    while _log_delta(target, most) < math.log(delta):
        most *= 2
    least = 0.0
    for _ in range(_HALVINGS):
        middle = (least + most) / 2
        if middle > 0 and _log_delta(target, middle) > math.log(delta):
            most = middle
        else:
            least = middle
    return math.sqrt(rounds) / least


def _log_delta(epsilon: float, mu: float) -> float:
    """log δ(ε) = log(Φ(μ/2 − ε/μ) − e^ε Φ(−μ/2 − ε/μ)): theorem 8 of arXiv:1805.06530."""
    first, second = _log_cdf(mu / 2 - epsilon / mu), epsilon + _log_cdf(-mu / 2 - epsilon / mu)
    return first + math.log1p(-math.exp(second - first)) if second < first else -math.inf


def _log_cdf(x: float) -> float:
    return float(torch.special.log_ndtr(torch.tensor(x, dtype=torch.float64)))
