"""FedDisco (arXiv:2305.19229): less for a site whose labels are far from evenly spread. Goes with `examples`."""

from typing import Annotated

from pydantic import Field

from ...errors import ConfigError
from ..asked import Needs
from ..cohort import Cohort
from . import registry
from .examples import example_counts


@registry.register("skew", Needs(counts=("examples",), labels=("skew",)))
def skew(
    cohort: Cohort,
    *,
    a: Annotated[float, Field(ge=0, le=1000, description="How much the distance from even labels counts.")] = 0.5,
    b: Annotated[float, Field(ge=0, le=1000, description="What every site is given back.")] = 0.1,
) -> list[float]:
    """ReLU(pₖ − a·dₖ + b) / pₖ, with pₖ site k's share of all examples and dₖ the ℓ₂ distance of its label
    distribution to the uniform one: the only thing about its labels that leaves the site.

    Raises:
        ConfigError: a site did not say its distance, or how many examples it has.
    """
    counts = example_counts(cohort)
    factors = []
    for update, count in zip(cohort.updates, counts, strict=True):
        if update.report.label_skew is None:
            raise ConfigError(
                f"{update.site} did not say how its labels are spread; weigh by examples alone", code="no_label_skew"
            )
        share = count / sum(counts)
        factors.append(max(share - a * update.report.label_skew + b, 0.0) / share if share else 0.0)
    return factors
