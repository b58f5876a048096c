"""What events cost: ε at a given δ, by the accountants of Opacus, and the noise that a given ε needs."""

import math
import warnings
from collections.abc import Iterable
from functools import lru_cache
from typing import Literal

from ..errors import ConfigError
from .events import Event, together

Accountant = Literal["rdp", "prv"]
_PRV_EPSILON, _PRV_STEPS, _PRV_KINDS = 30.0, 10**5, 16  # beyond these its grids take gigabytes or minutes
_LEAST_NOISE, _MOST_NOISE, _PRECISION = 0.2, 1e4, 1e-3


def epsilon(events: Iterable[Event], delta: float, accountant: Accountant | None = None) -> float:
    """Compute the ε that events cost together: an upper bound.

    Args:
        accountant: `rdp` (Rényi, arXiv:1908.10530) or `prv` (numerical composition, arXiv:2106.02848; the bound of
            `rdp` where its grid would be too large). None: the smaller of the two, for both are bounds.
    """
    history = tuple((e.noise_multiplier, e.sample_rate, e.steps) for e in together(events))
    if not history:
        return 0.0
    bound = _bound("rdp", history, delta)
    too_large = sum(steps for _, _, steps in history) > _PRV_STEPS or len(history) > _PRV_KINDS
    if accountant == "rdp" or bound > _PRV_EPSILON or too_large:
        return bound
    tighter = _bound("prv", history, delta)
    return tighter if accountant == "prv" else min(bound, tighter)


def within(events: Iterable[Event], delta: float, most: float) -> bool:
    """Whether events cost an ε of no more than `most`. The quick accountant is asked first."""
    found = tuple(events)
    return epsilon(found, delta, "rdp") <= most or epsilon(found, delta) <= most


@lru_cache(maxsize=4096)
def _bound(name: Accountant, history: tuple[tuple[float, float, int], ...], delta: float) -> float:
    from opacus.accountants import create_accountant  # which takes a second to load, and most jobs cost nothing

    accountant = create_accountant(name)
    accountant.history = list(history)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that other orders might give less: what it returns is a bound all the same
        return float(accountant.get_epsilon(delta))


def noise_multiplier(target: float, delta: float, sample_rate: float, steps: int) -> float:
    """Find the least noise, to one in a thousand, at which `steps` sums cost an ε of at most `target`.

    Raises:
        ConfigError: no noise up to 10,000 times the clipping norm is enough.
    """

    def excess(noise: float) -> float:
        """log(ε / target), which falls as noise grows, nearly along a line in log(noise)."""
        return math.log(max(epsilon([Event(noise, sample_rate, steps)], delta), 1e-300) / target)

    least, most = 0.5, 1.0  # each look takes up to seconds, so there are to be few
    above, below = math.inf, excess(most)
    while below > 0:
        if most == _MOST_NOISE:
            raise ConfigError(
                "privacy.epsilon is so small, or the steps are so many, that no noise is enough; raise epsilon or "
                "delta, or ask for fewer steps",
                code="epsilon_out_of_reach",
            )
        least, above, most = most, below, min(4 * most, _MOST_NOISE)
        below = excess(most)
    while math.isinf(above):
        above = excess(least)
        if above <= 0:
            least, most, above, below = max(least / 2, _LEAST_NOISE), least, math.inf, above
            if most == _LEAST_NOISE:
                return most
    side = 1.0  # the line misses the root on the same side again and again: so aim a little beyond it
    while most / least > 1 + _PRECISION:
        share = above / (above - below) if math.isfinite(above - below) else 0.5
        aim = least * (most / least) ** share * (1 + 0.6 * side * _PRECISION)
        noise = min(max(aim, least * (1 + 0.4 * _PRECISION)), most / (1 + 0.4 * _PRECISION))
        found = excess(noise)
        if found > 0:
            least, above, side = noise, found, 1.0
        else:
            most, below, side = noise, found, -1.0
    return most
