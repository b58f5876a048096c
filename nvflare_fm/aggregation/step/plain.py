"""FedAvg (arXiv:1602.05629) with a server learning rate."""

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from ..cohort import Cohort
from . import Step, registry


@registry.register("plain")
def plain(
    cohort: Cohort,
    weights: Sequence[float],
    *,
    learning_rate: Annotated[float, Field(gt=0, le=100, description="η")] = 1.0,
) -> Step:
    """x + η·d."""
    return Step(gain=lambda _: learning_rate)
