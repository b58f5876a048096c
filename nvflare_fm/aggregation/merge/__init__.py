"""Merge rules: the factors of every site and the global pair they started from become one pair, layer by layer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ...adapter import LoraPair
from ...registry import Registry

Merge = Callable[[LoraPair, Sequence[LoraPair], Sequence[float]], LoraPair]


@dataclass(frozen=True)
class MergeRule:
    """A rule and its promises. The promises choose the laws that test it, and refuse jobs it cannot serve.

    Args:
        merge: (global pair the round started from, trained pairs in site order, weights that sum to 1) → the
            next global pair, not yet shortened.
        exact: equals Σ wₖΔWₖ (with `rest`: of each site's whole adapter) before shortening.
        mixed_ranks: sites may train at different ranks.
        rest: a site starts from the whole global adapter, the directions above its rank frozen beside it;
            otherwise it starts from the first directions alone.
        canonical: the result is shortened to U Σ Vᵀ form; otherwise its factors are kept as they are.
    """

    merge: Merge
    exact: bool
    mixed_ranks: bool
    rest: bool
    canonical: bool


registry: Registry[MergeRule] = Registry("merge rule", __name__)


def rule(name: str, *, exact: bool, mixed_ranks: bool, rest: bool, canonical: bool) -> Callable[[Merge], Merge]:
    def register(merge: Merge) -> Merge:
        registry.register(name)(MergeRule(merge, exact, mixed_ranks, rest, canonical))
        return merge

    return register
