"""What the rules of a job need of a round, all together."""

from ..config import Aggregation
from . import guard, step, weigh
from .asked import Needs


def needed(aggregation: Aggregation) -> Needs:
    """What the weight factors, guards and server step need that a job names.

    Raises:
        ConfigError: an unknown name or setting, or a value out of range.
    """
    steps = [] if aggregation.step is None else [aggregation.step]
    guards = aggregation.guard or ()
    return weigh.registry.needs(aggregation.weigh) | guard.registry.needs(guards) | step.registry.needs(steps)
