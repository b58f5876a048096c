"""FedAvgM (arXiv:1909.06335): past changes go on counting, each round less."""

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from ..asked import Needs
from ..cohort import Cohort
from . import Step, registry


@registry.register("momentum", Needs(canonical=True))
def momentum(
    cohort: Cohort,
    weights: Sequence[float],
    *,
    learning_rate: Annotated[float, Field(gt=0, le=100, description="η: step length, times the mean change.")] = 1.0,
    beta: Annotated[float, Field(ge=0, lt=1, description="Share of past changes that is kept.")] = 0.5,
) -> Step:
    """m ← β·m + d;  x + η·m."""
    return Step(gain=lambda _: learning_rate, keep=beta)
