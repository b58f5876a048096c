"""Centered clipping (arXiv:2012.10333): a mean of changes that are each clipped around it."""

from typing import Annotated

import torch
from pydantic import Field

from ..cohort import Cohort
from ..mixing import Gram
from ..robust import Bad, Beta, Mixed, Near, needs, weighed
from . import Verdict, registry

STEPS, STEADY = 200, 1e-10


def fewest(f: int) -> int:
    """More than half must be honest."""
    return 2 * f + 1


@registry.register("centered_clip", needs(fewest))
def centered_clip(
    cohort: Cohort,
    *,
    f: Bad = None,
    mix: Mixed = "none",
    near: Near = 0.0,
    radius: Annotated[float, Field(gt=0, le=100, description="times the median distance from the centre")] = 1.0,
) -> dict[str, Verdict]:
    """v ← v + mean of (uₖ − v) · min(1, τ / ‖uₖ − v‖), until v rests. It starts from today's adapter, which no site of
    the round can move, and τ is `radius` times the median distance from v, so it needs no scale.

    The paper starts from the last round's mean, which the server would have to keep and read again.
    """
    return weighed(cohort, lambda gram, _: clipped(gram, radius), fewest, f, mix, near)


def clipped(gram: Gram, radius: float) -> Beta:
    """β of the clipped mean of points with these inner products."""
    squares, n = gram.diagonal(), len(gram)
    beta = torch.zeros(n, dtype=gram.dtype)
    for _ in range(STEPS):
        apart = (squares - 2 * gram @ beta + beta @ gram @ beta).clamp(min=0).sqrt()
        counts = (radius * apart.median() / apart.clamp(min=1e-150)).clamp(max=1.0)
        counts = torch.where(apart > 0, counts, 1.0)
        after = beta * (1 - counts.mean()) + counts / n
        moved, beta = float((after - beta).abs().max()), after
        if moved < STEADY:
            break
    return beta
