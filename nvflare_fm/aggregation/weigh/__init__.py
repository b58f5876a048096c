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
        weights = [w * f for w, f in zip(weights, registry[name](updates), strict=True)]
    total = sum(weights)
    if not 0 < total < float("inf") or min(weights) < 0:
        said = {u.site: w for u, w in zip(updates, weights, strict=True)}
        raise ConfigError(f"weights {list(names)} give {said}; they must be finite, not negative and not all zero")
    return [w / total for w in weights]
