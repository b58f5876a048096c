"""Guards: how much of a site's update counts where it lies far from the others'. One file a guard."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ...config import Rule
from ..asked import RuleRegistry, asked
from ..cohort import Cohort


@dataclass(frozen=True)
class Verdict:
    """What a guard says of a site."""

    multiplier: float  # of what the site changed; 0: its update does not count at all
    reason: str


Guard = Callable[..., Mapping[str, Verdict]]
registry: RuleRegistry[Guard] = RuleRegistry("guard", __name__)


def judge(entries: Sequence[Rule], cohort: Cohort) -> dict[str, Verdict]:
    """What the guards asked for say of a round's updates, together.

    Args:
        entries: guards by name, or with their settings; each looks at the updates as they came.

    Returns:
        A verdict for each site that one of them would not count in full: the product of the multipliers.

    Raises:
        ConfigError: an unknown guard or setting.
    """
    found: dict[str, Verdict] = {}
    for entry in entries:
        for site, said in asked(registry, entry)(cohort).items():
            before = found.get(site)
            found[site] = (
                Verdict(before.multiplier * said.multiplier, f"{before.reason}; {said.reason}") if before else said
            )
    return found
