"""FedAsync (arXiv:1903.03934): less for a change that was made to an older adapter."""

from typing import Annotated

from pydantic import Field

from ..asked import Needs
from ..cohort import Cohort
from . import registry


@registry.register("staleness", Needs(lateness=True))
def staleness(
    cohort: Cohort,
    *,
    a: Annotated[float, Field(ge=0, le=100, description="Discount of late changes; 0: none.")] = 0.5,
) -> list[float]:
    """(1 + τₖ)^−a, with τₖ the rounds since the adapter that site k trained from was sent."""
    return [float((1 + u.staleness) ** -a) for u in cohort.updates]
