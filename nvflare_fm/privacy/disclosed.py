"""What a site tells the server of its protection."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field, TypeAdapter, ValidationError

from ..errors import WireError
from .protection import Mechanism, Protection

Delta = Annotated[float, Field(strict=True, gt=0, lt=1, allow_inf_nan=False)]
Unit = Annotated[str, Field(strict=True, min_length=1, max_length=256)]
_STEPS = (1.0, 2.0, 5.0)


@dataclass(frozen=True)
class Disclosed:
    """The part of a `Protection` that leaves the site."""

    mechanism: Mechanism
    unit: Unit
    delta: Delta
    epsilon: Annotated[float, Field(strict=True, gt=0, le=1e9, allow_inf_nan=False)]  # at most; of the whole job

    @classmethod
    def of(cls, protection: Protection, epsilon: float, asked: float | None) -> "Disclosed":
        """Make the public part.

        Args:
            epsilon: what all rounds of the job cost at this site, those to come included.
            asked: the plan's `privacy.epsilon`.
        """
        return cls(protection.mechanism, protection.unit, protection.delta, told(epsilon, asked))


_DISCLOSED = TypeAdapter(Disclosed)


def told(epsilon: float, asked: float | None) -> float:
    """Bound ε by what tells little or nothing of the site: the exact one follows from its number of rows.

    Args:
        asked: what the plan asks for at most.

    Returns:
        `asked`, where that is a bound, and else ε rounded up to 1, 2 or 5 times a power of ten.
    """
    if asked is not None and epsilon <= asked:
        return asked
    power = 10.0 ** math.floor(math.log10(max(epsilon, 1e-3)))
    return next((step for step in _STEPS if step * power >= epsilon), 10.0) * power


def read_disclosed(value: object, site: str) -> Disclosed:
    """Read what a site tells of its protection.

    Raises:
        WireError: it is something else, or tells more. What it tells is not repeated.
    """
    try:
        if not isinstance(value, Mapping) or value.keys() != Disclosed.__dataclass_fields__.keys():
            raise ValueError
        return _DISCLOSED.validate_python(dict(value))
    except (ValidationError, ValueError):
        raise WireError(
            f"{site} sent another record of its protection than a server may see; run nvflare-fm site allow there and "
            "restart the site",
            code="protection_not_public",
        ) from None
