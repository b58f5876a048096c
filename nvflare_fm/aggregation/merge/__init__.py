"""Merge rules: the factors of every site and the global pair they started from become one pair, layer by layer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from ...adapter import LoraPair
from ...config import Factors, Rest, Rule
from ...registry import Registry
from ..asked import found, with_settings

Merge = Callable[[LoraPair, Sequence[LoraPair], Sequence[float]], LoraPair]
Tensors = Callable[[Sequence[Tensor], Sequence[float]], Tensor]


def mean(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Σ wₖtₖ, of which one is in memory at a time."""
    return sum((w * t for t, w in zip(tensors, weights, strict=True)), torch.zeros(()))


@dataclass(frozen=True)
class MergeRule:
    """A rule and its promises. The promises choose the laws that test it, and refuse jobs it cannot serve.

    Args:
        merge: (global pair the round started from, trained pairs in site order, weights that sum to 1) → the
            next global pair, not yet shortened. Its settings are keyword arguments.
        exact: equals Σ wₖΔWₖ (with `rest`: of each site's whole adapter) before shortening.
        mixed_ranks: sites may train at different ranks.
        canonical: the result is shortened to U Σ Vᵀ form; otherwise its factors are kept as they are.
        rest: the part of the global adapter that a site holds frozen beside what it trains: none, the directions above
            the site's rank (tail), or all of it (the site trains a fresh pair).
        factors: the factors that the sites train, round after round in turn.
        shares: the factors that a site sends; the other stays there, and each site has an adapter of its own.
        linear_sum: B is averaged beside an A that stays at the seed's values, so that the server can add what it cannot
            read.
        tensor: (one tensor without factors, such as a classifier's head, of each site, weights) → the next global one.
    """

    merge: Merge
    exact: bool
    mixed_ranks: bool
    canonical: bool
    rest: Rest = "none"
    factors: tuple[Factors, ...] = ("AB",)
    shares: Factors = "AB"
    linear_sum: bool = False
    tensor: Tensors = mean

    def encrypted(self) -> "MergeRule":
        """The rule where the server adds unread: A is nested by rank, so B of any site has the columns of all.

        What a site does not train it sends as it received it, so the sum is the global adapter plus what changed.
        """
        return replace(self, exact=True, mixed_ranks=True, rest="tail")

    @property
    def delta(self) -> bool:
        """Whether the result is the global adapter plus what the sites changed, so that changes can be scaled."""
        return self.rest != "none"

    @property
    def sums(self) -> bool:
        """Whether the result is a weighted sum of what sites send, so that what lies far from it can be told by ΔW."""
        return self.exact or self.linear_sum


registry: Registry[MergeRule] = Registry("merge rule", __name__)


def choose(entry: Rule) -> MergeRule:
    """Find the merge rule that a job asks for, and fill in its settings.

    Raises:
        ConfigError: an unknown rule or setting, or a value out of range.
    """
    rule = found(registry, entry)
    merge = with_settings(rule.merge, entry, registry.kind)
    return replace(rule, merge=merge, tensor=mean if rule.tensor is mean else partial(rule.tensor, **merge.keywords))


def rule(
    name: str,
    *,
    exact: bool,
    mixed_ranks: bool,
    canonical: bool,
    rest: Rest = "none",
    factors: tuple[Factors, ...] = ("AB",),
    shares: Factors = "AB",
    linear_sum: bool = False,
    tensor: Tensors = mean,
) -> Callable[[Merge], Merge]:
    """Register the decorated function as the merge rule `name`, with its promises.

    The function takes the global pair that the round started from, the sites' trained pairs, and weights that sum to
    1, and returns the next global pair, not yet shortened. Its keyword arguments are its settings.

    Args:
        name: how jobs name the rule.
        exact: see `MergeRule`.
        mixed_ranks: see `MergeRule`.
        canonical: see `MergeRule`.
        rest: see `MergeRule`.
        factors: see `MergeRule`.
        shares: see `MergeRule`.
        linear_sum: see `MergeRule`.
        tensor: see `MergeRule`.
    """

    def register(merge: Merge) -> Merge:
        registry.register(name)(
            MergeRule(merge, exact, mixed_ranks, canonical, rest, factors, shares, linear_sum, tensor)
        )
        return merge

    return register
