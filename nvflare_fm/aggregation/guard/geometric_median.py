"""RFA (arXiv:1912.13445): the geometric median of the changes, by the smoothed Weiszfeld algorithm."""

import torch

from ..cohort import Cohort
from ..mixing import Gram
from ..robust import Bad, Beta, Mixed, Near, needs, weighed
from . import Verdict, registry

SMOOTH = 1e-6  # of the median length: nearer than that counts as that near
STEPS, STEADY = 200, 1e-10


def fewest(f: int) -> int:
    """More than half must be honest."""
    return 2 * f + 1


@registry.register("geometric_median", needs(fewest))
def geometric_median(cohort: Cohort, *, f: Bad = None, mix: Mixed = "none", near: Near = 0.0) -> dict[str, Verdict]:
    """The point with the least sum of distances to the sites' changes: βₖ in proportion to one over the distance of
    site k from it. Less than half of the sites cannot move it farther than the others' changes lie apart.
    """
    return weighed(cohort, weiszfeld, fewest, f, mix, near)


def weiszfeld(gram: Gram, f: int) -> Beta:
    """β of the geometric median of points with these inner products, in units of the points' usual length."""
    squares = gram.diagonal()
    floor = SMOOTH * max(float(squares.median()), 1e-300) ** 0.5
    beta = torch.full((len(gram),), 1 / len(gram), dtype=gram.dtype)
    for _ in range(STEPS):
        apart = (squares - 2 * gram @ beta + beta @ gram @ beta).clamp(min=0).sqrt().clamp(min=floor)
        after = apart.reciprocal() / apart.reciprocal().sum()
        moved, beta = float((after - beta).abs().max()), after
        if moved < STEADY:
            break
    return beta
