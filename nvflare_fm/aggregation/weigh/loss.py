"""q-FFL (arXiv:1905.10497): more for a site on which the global adapter does badly, so that results even out."""

import math
from typing import Annotated

from pydantic import Field

from ...errors import ConfigError
from ..asked import Needs
from ..cohort import Cohort
from . import registry


@registry.register("loss", Needs(loss=True))
def loss(
    cohort: Cohort,
    *,
    q: Annotated[float, Field(ge=0, le=100, description="Fairness; 0: every site counts the same.")] = 1.0,
) -> list[float]:
    """Fₖ^q, with Fₖ the loss of the adapter that site k received, on its validation data. The same for all where it is
    0 everywhere.

    Raises:
        ConfigError: a site did not measure it.
    """
    factors = []
    for update in cohort.updates:
        value = update.report.before.get("loss", math.nan)
        if not math.isfinite(value):
            raise ConfigError(
                f"{update.site} reports no loss of the adapter it received; set evaluation.before, or weigh without: "
                "a site with few validation rows tells none",
                code="no_loss",
            )
        factors.append(max(value, 0.0) ** q)
    return factors if any(factors) else [1.0] * len(factors)
