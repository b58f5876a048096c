"""What others say of themselves: types that bound it, and texts made safe to print.

Messages are held to them where they are read, in flare/wire.py; what is read there can be logged, stored and shown.
"""

import math
import reprlib
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field

LONGEST = 500  # characters of a text
_LONGEST_LINE = 20_000  # of one that is shown whole
MOST_METRICS, LARGEST_METRIC = 64, 1e9


def printable(text: object, longest: int = LONGEST) -> str:
    """`text` on one line, cut, with everything escaped that does not print as itself.

    Args:
        text: what came, a string as a rule; of anything else its abbreviated `repr`.
        longest: characters of `text` that are kept.

    Returns:
        A text without control characters, terminal codes, line breaks or marks that change the direction of writing.
    """
    whole = text if isinstance(text, str) else reprlib.repr(text)
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in whole[:longest])
    return shown if len(whole) <= longest else f"{shown}…"


def one_line(text: object) -> str:
    """`text` for a terminal: as `printable`, whole, with every run of blanks and line breaks made one blank."""
    return printable(" ".join(str(text).split()), longest=_LONGEST_LINE)


def _few(values: Any) -> Any:
    """Before each of them is looked at: pydantic counts last."""
    if isinstance(values, Mapping) and len(values) > MOST_METRICS:
        raise ValueError(f"{len(values)} metrics are more than the {MOST_METRICS} allowed")
    return values


Word = Annotated[str, Field(strict=True, max_length=200, pattern=r"^[A-Za-z0-9_.:+-]+$")]
Digest = Annotated[str, Field(strict=True, max_length=64, pattern=r"^[0-9a-f]*$")]
Text = Annotated[str, Field(strict=True), AfterValidator(printable)]
Count = Annotated[int, Field(strict=True, ge=0, le=10**12)]
Amount = Annotated[float, Field(strict=True, ge=0, le=1e12)]
Number = Annotated[float, Field(strict=True)]  # not a number, and infinite, among them
Share = Annotated[float, Field(strict=True, ge=0, le=1)]
MetricName = Annotated[str, Field(strict=True, max_length=64, pattern=r"^[A-Za-z0-9_./-]+$")]
Metrics = Annotated[Mapping[MetricName, Number], BeforeValidator(_few)]


def usable(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics that can be averaged and compared: finite, and not so large that a sum of them overflows."""
    return {name: value for name, value in metrics.items() if math.isfinite(value) and abs(value) <= LARGEST_METRIC}
