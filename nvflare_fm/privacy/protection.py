"""What a site's trainer states about an update that it made under differential privacy."""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter

from .events import Event

Mechanism = Literal["dp_sgd", "votes"]  # of training, and of one vote for each record
_Text = Annotated[str, Field(strict=True, min_length=1, max_length=256)]


@dataclass(frozen=True)
class Protection:
    """How an update is protected, and what it cost. It stays at the site: a sampling rate tells how many rows it has.

    A record is protected as the accountant counts it: neighbouring data sets differ by one record, there or not.
    """

    mechanism: Mechanism
    data: _Text  # alias of the data set whose records are protected
    unit: _Text  # what a record is: "row", or the column that says whose row it is
    delta: Annotated[float, Field(strict=True, gt=0, lt=1)]
    events: Annotated[tuple[Event, ...], Field(min_length=1, max_length=1000)]  # of this round


PROTECTION = TypeAdapter(Protection)  # reads it from a message
