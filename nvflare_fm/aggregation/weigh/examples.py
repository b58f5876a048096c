"""FedAvg (arXiv:1602.05629): in proportion to the training examples."""

from ...errors import ConfigError
from ..asked import Needs
from ..cohort import Cohort
from . import registry


@registry.register("examples", Needs(counts=("examples",)))
def examples(cohort: Cohort) -> list[float]:
    """nₖ.

    Raises:
        ConfigError: a site did not say how many it has.
    """
    return example_counts(cohort)


def example_counts(cohort: Cohort) -> list[float]:
    """The training examples of each site.

    Raises:
        ConfigError: a site did not say how many it has.
    """
    for update in cohort.updates:
        if update.report.examples is None:
            raise ConfigError(
                f"{update.site} does not tell how many examples it has; weigh uniform, or ask its admin to list "
                "examples under privacy.counts",
                code="no_count",
            )
    return [float(update.report.examples or 0) for update in cohort.updates]
