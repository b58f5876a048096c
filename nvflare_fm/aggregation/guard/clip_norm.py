"""Norm clipping (arXiv:1911.07963): no site moves the federation much farther than its sites usually do."""

from collections.abc import Sequence
from statistics import median
from typing import Annotated

from pydantic import Field

from ..asked import Needs
from ..cohort import Cohort
from . import Verdict, registry

FEWEST = 3  # sites: of two, neither can say which is far off


@registry.register("clip_norm", Needs(reads=("moved",)))
def clip_norm(
    cohort: Cohort,
    *,
    most: Annotated[float, Field(ge=1, description="times the median change; a longer one is scaled down to it")] = 4.0,
    refuse: Annotated[
        float, Field(ge=1, description="times the median: leaves a site out where a rule cannot scale changes")
    ] = 10.0,
) -> dict[str, Verdict]:
    """A change longer than `most` times the median over the sites is scaled down to it. Of products ΔW and of dense
    tensors, each over all layers and on its own scale, the worse decides, so that neither hides the other.

    Where the merge rule averages what the sites hold, a change cannot be scaled: a site is left out whose change, or
    one of whose factors, is longer than `refuse` times the median. Sites that changed nothing have no say in the
    median, and where fewer than three changed something nobody is judged.
    """
    moved = cohort.moved
    sizes = {"products": [m.products for m in moved], "dense tensors": [m.dense for m in moved]}
    whole = cohort.rest == "none"
    if whole:
        sizes |= {"factors A": [m.a for m in moved], "factors B": [m.b for m in moved]}
    limit = refuse if whole else most
    verdicts: dict[str, Verdict] = {}
    for place, update in enumerate(cohort.updates):
        ratios = {of: _ratio(place, found) for of, found in sizes.items()}
        of = max(ratios, key=lambda name: ratios[name])
        if ratios[of] > limit:
            left = 0.0 if whole else most / ratios[of]
            far = f"its {of} {'are' if whole else 'changed'} {ratios[of]:.3g} times the median of the sites'"
            done = "is left out" if whole else f"is scaled to {most:g} times"
            verdicts[update.site] = Verdict(left, f"{far}; {done}")
    return verdicts


def _ratio(place: int, found: Sequence[float]) -> float:
    """How many times the usual length a site's is; 0 where too few sites have one."""
    some = [length for length in found if length > 0]
    return found[place] / median(some) if len(some) >= FEWEST else 0.0
