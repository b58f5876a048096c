"""FedAvgM (arXiv:1909.06335): past changes go on counting, each round less."""

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from ..cohort import Cohort
from . import Step, registry


@registry.register("momentum")
def momentum(
    cohort: Cohort,
    weights: Sequence[float],
    *,
    learning_rate: Annotated[float, Field(gt=0, le=100, description="η")] = 1.0,
    beta: Annotated[float, Field(ge=0, lt=1, description="what is kept of the past")] = 0.5,
) -> Step:
    """m ← β·m + d;  x + η·m."""
    return Step(gain=lambda _: learning_rate, keep=beta)
