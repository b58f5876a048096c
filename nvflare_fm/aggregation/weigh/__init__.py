"""Weight factors: what each site's update counts. A weight is a product of factors, normalised and capped."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ...adapter import AdapterUpdate
from ...config import Rule
from ...errors import ConfigError
from ..asked import RuleRegistry, asked, named
from ..cohort import Cohort

FAINT = 1e-12
GUARD = "guard"  # the factor that guards make, in the record
Factor = Callable[..., list[float]]
registry: RuleRegistry[Factor] = RuleRegistry("weight factor", __name__)


@dataclass(frozen=True)
class Weights:
    """How much each site counts, and why."""

    shares: Mapping[str, float]  # site → share, sums to 1
    factors: Mapping[str, Mapping[str, float]]  # name of a factor → site → its value, before normalising


def weigh(
    entries: Sequence[Rule], cohort: Cohort, max_weight: float = 1.0, guarded: Mapping[str, float] = {}
) -> Weights:
    """Multiply the factors that a job asks for, and normalise the products to sum to 1.

    Args:
        entries: weight factors by name, or with their settings.
        cohort: the updates of the round.
        max_weight: the largest share of one site. A site's own limit may be lower.
        guarded: what guards leave of a site's weight, by site; who is not named keeps all of it. It lowers a limit
            below 1 as well, so that what other sites may not count does not go to those that guards hold down.

    Returns:
        The shares, and the value of each factor.
    Raises:
        ConfigError: a factor is negative or not finite, or all products are zero.
    """
    sites = [u.site for u in cohort.updates]
    weights, factors = [1.0] * len(sites), {}
    for entry in entries:
        values = asked(registry, entry)(cohort)
        _refuse_unless(all(0 <= v < float("inf") for v in values), [named(entry)], sites, values)
        factors[named(entry)] = dict(zip(sites, values, strict=True))
        weights = [w * v for w, v in zip(weights, values, strict=True)]
    left = [guarded.get(site, 1.0) for site in sites]
    if min(left, default=1.0) < 1:
        factors[GUARD] = dict(zip(sites, left, strict=True))
        weights = [w * g for w, g in zip(weights, left, strict=True)]
    total = sum(weights)
    _refuse_unless(1e-300 < total < float("inf"), entries, sites, weights)
    limits = [min(max_weight, u.report.max_weight) for u in cohort.updates]
    limits = [limit * g if limit < 1 else limit for limit, g in zip(limits, left, strict=True)]
    return Weights(dict(zip(sites, capped(weights, limits), strict=True)), factors)


def check(entries: Sequence[Rule], update: AdapterUpdate) -> None:
    """Refuses an update that one of the factors cannot weigh, before it can stop the others' round. No tensor is read:
    what a factor makes of values that `check_values` has admitted is sound.

    Raises:
        ConfigError: names the site and what it did not report, or reported wrongly.
    """
    for entry in entries:
        if registry.needs([entry]).reads:
            continue
        values = asked(registry, entry)(Cohort([update]))
        _refuse_unless(0 <= values[0] < float("inf"), [entry], [update.site], values)


def capped(weights: Sequence[float], limits: Sequence[float]) -> list[float]:
    """`weights` divided so that they sum to 1, each within its limit where the limits leave room for it; what a site
    may not count goes to the others in proportion. Where the limits sum to less than 1, shares in proportion to them.
    A weight that is nothing beside the largest counts nothing: what room the others leave could not be reckoned by it.
    """
    weights = [weight if weight > FAINT * max(weights) else 0.0 for weight in weights]
    room = [limit if weight > 0 else 0.0 for weight, limit in zip(weights, limits, strict=True)]
    if sum(room) <= 1:
        return [limit / sum(room) for limit in room]
    full: set[int] = set()
    while True:
        left = 1 - sum(limits[i] for i in full)
        free = sum(w for i, w in enumerate(weights) if i not in full)
        result = [limits[i] if i in full else w * left / free for i, w in enumerate(weights)]
        over = {i for i, r in enumerate(result) if i not in full and r > limits[i]}
        if not over:
            return result
        full |= over


def _refuse_unless(sound: bool, names: Sequence[object], sites: Sequence[str], values: Sequence[float]) -> None:
    if not sound:
        said = dict(zip(sites, values, strict=True))
        raise ConfigError(
            f"weights {list(names)} give {said}; they must be finite, not negative and not all zero",
            code="weights_unusable",
        )
