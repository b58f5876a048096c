"""What costs privacy: releases of sums under Gaussian noise, each record in them by chance."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field, TypeAdapter

MOST_STEPS = 10**9


@dataclass(frozen=True)
class Event:
    """Gaussian noise on a sum of clipped contributions, released `steps` times (arXiv:1607.00133).

    Every record is in each sum with probability `sample_rate`, independently: Poisson sampling. Neighbouring data sets
    differ by one record that is there or not.
    """

    noise_multiplier: Annotated[float, Field(strict=True, gt=0, le=1e6, allow_inf_nan=False)]  # σ / clipping norm
    sample_rate: Annotated[float, Field(strict=True, gt=0, le=1, allow_inf_nan=False)]  # 1: every record, every time
    steps: Annotated[int, Field(strict=True, ge=1, le=MOST_STEPS)] = 1


EVENTS = TypeAdapter(Annotated[tuple[Event, ...], Field(max_length=1000)])  # reads them from a file or a message


def together(events: Iterable[Event]) -> tuple[Event, ...]:
    """Count equal mechanisms as one event of more steps, in the order in which they first occur."""
    steps: dict[tuple[float, float], int] = {}
    for event in events:
        key = event.noise_multiplier, event.sample_rate
        steps[key] = steps.get(key, 0) + event.steps
    return tuple(Event(*key, count) for key, count in steps.items())
