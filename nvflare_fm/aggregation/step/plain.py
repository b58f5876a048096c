"""FedAvg (arXiv:1602.05629) with a server learning rate."""

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from ..asked import Needs
from ..cohort import Cohort
from . import Step, registry


@registry.register("plain", lambda learning_rate: Needs(canonical=learning_rate != 1))
def plain(
    cohort: Cohort,
    weights: Sequence[float],
    *,
    learning_rate: Annotated[float, Field(gt=0, le=100, description="η: step length, times the mean change.")] = 1.0,
) -> Step:
    """x + η·d."""
    return Step(gain=lambda _: learning_rate)
