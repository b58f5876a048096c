"""What a job's `rounds.jsonl` says, read back: a line a round, written by the server (`flare/ledger.py`).

Rounds are counted by what an adapter has behind it: line r starts from the adapter after r rounds and holds its
metrics. Where the job measures at the end, one line more holds those of the finished adapter.
"""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .errors import DataError
from .files import open_file
from .untrusted import one_line

FILE_NAME = "rounds.jsonl"
LONGEST_LINE = 64 * 2**20  # singular values of every layer are in it


class Round(BaseModel):
    """One line. What a later version adds to it is left alone."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    round: int = Field(ge=0)
    total_rounds: int = Field(ge=1)
    asked: tuple[str, ...] = ()
    bytes_down: int = 0  # to each site
    out: Mapping[str, str] = {}
    late: tuple[str, ...] = ()
    sites: Mapping[str, Mapping[str, Any]] = {}
    metrics: Mapping[str, float] = {}
    medians: Mapping[str, float] = {}
    error: str = ""  # why nothing was merged
    energy_lost: Mapping[str, float] = {}
    how: Mapping[str, Any] = {}  # the job's merge rule, weights and server step
    seconds: float = 0.0
    ended: str = ""  # date and time, UTC

    @property
    def measured(self) -> Mapping[str, float]:
        """What the sites measured of the adapter the round starts from, as the monitor shows it: their median."""
        return self.medians or self.metrics

    @property
    def trained(self) -> bool:
        """Whether sites trained in it; otherwise it only measures, or nobody gave a usable answer."""
        return any("weight" in said for said in self.sites.values())

    @property
    def loss(self) -> float | None:
        """The mean of the losses that its sites trained at."""
        losses = [said["loss"] for said in self.sites.values() if isinstance(said.get("loss"), float)]
        return sum(losses) / len(losses) if losses else None


def read_line(line: str | bytes) -> Round:
    """Read one line of `rounds.jsonl`.

    Raises:
        DataError: it is none that a server of nvflare_fm has written.
    """
    try:
        return Round.model_validate(json.loads(line))
    except (ValueError, ValidationError, RecursionError) as error:
        raise DataError(
            f"a line of {FILE_NAME} is not as the server writes it; download the result again",
            one_line(error)[:200],
            code="rounds_unreadable",
        ) from None


def read_rounds(file: Path) -> list[Round]:
    """Read a whole `rounds.jsonl`; a last line that is half written is left out.

    Raises:
        DataError: it cannot be read, or a line is not as the server writes it.
    """
    try:
        return [read_line(line) for line in _lines(file)]
    except (OSError, ValueError) as error:
        raise DataError(f"{FILE_NAME} cannot be read", f"{file}: {error}", code="rounds_unreadable") from None


def _lines(file: Path) -> Iterator[bytes]:
    with open_file(file) as opened:
        while (line := opened.readline(LONGEST_LINE)).endswith(b"\n"):
            yield line
        if len(line) == LONGEST_LINE:
            raise ValueError(f"a line is longer than {LONGEST_LINE} bytes")


def told(line: Round) -> list[str]:
    """One line on a round for a person's terminal, and one more for each site that does not count."""
    measured = ", ".join(f"{name} {value:.4g}" for name, value in sorted(line.measured.items()))
    parts = [f"after {line.round} of {line.total_rounds} rounds: {measured or 'not measured'}"]
    if not (line.trained or line.measured):
        parts.append("no site gave a usable answer")
    if line.error:
        parts.append(f"nothing was merged: {line.error}")
    if line.trained:
        loss = "" if line.loss is None or not math.isfinite(line.loss) else f", training loss {line.loss:.4g}"
        parts.append(f"then {len(line.sites)} of {len(line.asked)} sites trained{loss}, {line.seconds:.0f} s")
    return [one_line("; ".join(parts)), *(f"  {one_line(f'{site}: {why}')}" for site, why in sorted(line.out.items()))]
