"""FedAvg (arXiv:1602.05629): in proportion to the training examples."""

from collections.abc import Sequence

from ...adapter import AdapterUpdate
from . import registry


@registry.register("examples")
def examples(updates: Sequence[AdapterUpdate]) -> list[float]:
    """nₖ."""
    return [float(u.report.examples) for u in updates]
