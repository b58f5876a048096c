"""What guards share that weigh sites by where their changes lie: one Gram matrix, mixing, f, and words for a person.

Such a guard says how much of its weight each site keeps. Then weights are divided by their sum, so that all together
weigh as much as ever: the result is a weighted mean of the changes, Σ βₖDₖ with β ≥ 0 and Σ βₖ = 1.
"""

from collections.abc import Callable, Mapping
from functools import partial
from math import inf
from typing import Annotated

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from ..config import SITES
from ..errors import ConfigError, WireError
from ..record.reason import Verdict
from .asked import Needs
from .cohort import Cohort
from .mixing import MIXES, Gram, Mix, count

Beta = Float[Tensor, " n"]
Weighing = Callable[[Gram, int], Beta]
Fewest = Callable[[int], int]  # f → the least number of updates (or of their means) that a guard can compare
Bad = Annotated[
    int | None,
    Field(ge=0, le=SITES, description="sites of a round that may be hostile; unset: one in four"),
]
Mixed = Annotated[Mix, Field(description="what goes before: none, nnm (nearest-neighbour mixing) or bucketing")]
Near = Annotated[
    float,
    Field(
        ge=0, le=100, description="times the median distance from the others' mean: who is nearer keeps all its weight"
    ),
]
ALONE = 4  # updates, below which a guard whose f is unset judges nobody: a quarter of three is none
FAINT = 1e-2  # of the largest weight: who keeps less is left out
NAMED = 0.5  # of the median weight: who keeps less is told of
ROUNDING = 1e-9  # of a weight, or of a squared length
NOWHERE = 1e-12  # of the longest change: the scale of a part that most sites left as it was


def needs(fewest: Fewest) -> Callable[..., Needs]:
    """What such a guard needs, by its settings."""
    return partial(_needs, fewest)


def _needs(fewest: Fewest, f: int | None = None, mix: Mix = "none", **_: object) -> Needs:
    least = 1 if f is None else max(2 * f + 1, count(mix, fewest(f)))
    return Needs(reads=("products", "dense"), sums=True, fewest=least)


def weighed(
    cohort: Cohort, weigh: Weighing, fewest: Fewest, f: int | None, mix: Mix, near: float
) -> dict[str, Verdict]:
    """Weigh the sites by `weigh`, after mixing.

    Args:
        cohort: the updates of the round.
        weigh: inner products of n points and f → β of the points; it does not have to sum to 1.
        fewest: f → the least n.
        f: sites that may be hostile; None: a quarter of those that answered, or fewer where `fewest` asks for more
            than there are. Where that finds none, nobody is judged.
        mix: what goes before.
        near: a site that lies no farther than so many times the median distance from the weighted mean of the others,
            in products and in dense tensors alike, keeps its whole weight; 0: none does, as in the papers.

    Returns:
        A verdict for each site that does not keep its whole weight.

    Raises:
        ConfigError: too few updates for f.
        WireError: updates whose values are not finite.
    """
    sites = [update.site for update in cohort.updates]
    n, least = len(sites), needs(fewest)
    if f is None:
        bearable = (each for each in range((n - 1) // 4, -1, -1) if least(each, mix).fewest <= n)
        f = next(bearable, None) if n >= ALONE else None
        if f is None:
            return {}
    if n < least(f, mix).fewest:
        raise ConfigError(
            f"a guard for f = {f} hostile sites needs {least(f, mix).fewest} updates in a round, and {n} are usable; "
            "lower f or leave it out, or set min_responses to that number",
            code="too_few_for_guard",
        )
    gram = on_own_scales(cohort)
    if not gram.isfinite().all():
        raise WireError("updates hold values that are not finite, so that none can be compared", code="not_comparable")
    means = MIXES[mix](gram, f)
    beta = weigh(means @ gram @ means.T, f) @ means
    kept = beta / beta.max()
    kept = torch.where(kept < FAINT, 0.0, kept)
    lies = {name: _distances(part, kept / kept.sum()) for name, part in _parts(cohort).items()}
    spared = torch.stack([*lies.values()]).amax(0) <= near
    kept = torch.where(spared | (kept > 1 - ROUNDING), 1.0, kept)
    usual = kept.median()
    return {
        site: Verdict(1.0, _why(lies, place) if kept[place] <= NAMED * usual else "", float(kept[place]))
        for place, site in enumerate(sites)
        if kept[place] < 1
    }


def on_own_scales(cohort: Cohort) -> Gram:
    """The inner products of all that the sites changed, products ΔW and dense tensors each in units of their median
    squared length, so that neither part hides the other.

    Where most sites left a part as it was, a change of it lies farther off than anything else.
    """
    parts = _parts(cohort).values()
    return sum((part / _scale(part.diagonal()) for part in parts), torch.zeros_like(cohort.products))


def _parts(cohort: Cohort) -> dict[str, Gram]:
    return {"products": cohort.products, "dense tensors": cohort.dense}


def _scale(squares: Tensor) -> float:
    usual, longest = float(squares.median()), float(squares.max())
    return max(usual, NOWHERE * longest) or 1.0


def _distances(gram: Gram, beta: Beta) -> Beta:
    """Of each site from the weighted mean of the others, in units of the median; infinite for who is off where most are
    not. From the mean of all, who has a share in it would lie nearer than who has none.
    """
    squares, centre = gram.diagonal(), beta @ gram @ beta
    off = squares - 2 * gram @ beta + centre
    off = torch.where(off > ROUNDING * (squares + centre), off, 0.0).sqrt() / (1 - beta).clamp(min=ROUNDING)
    return torch.where(off > 0, off / off.median(), 0.0)


def _why(lies: Mapping[str, Beta], place: int) -> str:
    of = max(lies, key=lambda name: float(lies[name][place]))
    times = float(lies[of][place])
    if times == inf:
        return f"its {of} lie apart, where those of most sites are the same"
    return f"its {of} lie {times:.3g} times as far from what the sites agree on as the usual site's"
