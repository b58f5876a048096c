"""FedAvg (arXiv:1602.05629): in proportion to the training examples."""

from ..cohort import Cohort
from . import registry


@registry.register("examples")
def examples(cohort: Cohort) -> list[float]:
    """nₖ."""
    return [float(u.report.examples) for u in cohort.updates]
