"""Weight factors: what each site's update counts, from what the sites reported. A weight is a product of factors."""

from collections.abc import Callable, Sequence

from ...adapter import AdapterUpdate
from ...errors import ConfigError
from ...registry import Registry

Factor = Callable[[Sequence[AdapterUpdate]], list[float]]
registry: Registry[Factor] = Registry("weight factor", __name__)


def weigh(names: Sequence[str], updates: Sequence[AdapterUpdate]) -> list[float]:
    """The product of the named factors for each update, normalised to sum to 1.

    Raises:
        ConfigError: a factor is negative or not finite, or all products are zero.
    """
    weights = [1.0] * len(updates)
    for name in names:
        factors = registry[name](updates)
        _refuse_unless(all(0 <= f < float("inf") for f in factors), [name], updates, factors)
        weights = [w * f for w, f in zip(weights, factors, strict=True)]
    total = sum(weights)
    _refuse_unless(0 < total < float("inf"), names, updates, weights)
    return [w / total for w in weights]


def _refuse_unless(sound: bool, names: Sequence[str], updates: Sequence[AdapterUpdate], values: list[float]) -> None:
    if not sound:
        said = {u.site: v for u, v in zip(updates, values, strict=True)}
        raise ConfigError(f"weights {list(names)} give {said}; they must be finite, not negative and not all zero")
