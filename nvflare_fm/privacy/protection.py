"""What a site's trainer states about an update that it made under differential privacy. It never leaves the site: the
share of rows in a step tells how many there are.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from ..untrusted import Word
from .events import Event

Delta = Annotated[float, Field(strict=True, gt=0, le=0.5, allow_inf_nan=False)]
Unit = Annotated[str, Field(strict=True, min_length=1, max_length=256)]


@dataclass(frozen=True)
class Protection:
    """How one round's update was protected."""

    mechanism: Literal["dp_sgd"]
    data: Word  # alias of the data set
    unit: Unit  # row, or the column that says whose row it is
    delta: Delta
    events: Annotated[tuple[Event, ...], Field(min_length=1, max_length=1000)]  # of this round
