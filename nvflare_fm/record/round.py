"""One round as the server writes it down: a line of `rounds.jsonl` each, typed and bounded, and read back so.

Rounds are counted by what an adapter has behind it: line r starts from the adapter after r rounds and holds its
metrics. Where the job measures at the end, one line more holds those of the finished adapter. Beside it lies
`spectra.jsonl`, with a line for each round that was merged: the singular values are larger than all the rest.
"""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..errors import DataError, ModelError
from ..files import open_file
from ..untrusted import Amount, Count, Number, one_line
from .noised import Noised
from .reason import Verdict, Words, Written
from .site_report import Contribution

FILE_NAME, SPECTRA = "rounds.jsonl", "spectra.jsonl"
LONGEST_LINE = 64 * 2**20  # bytes; earlier versions wrote the singular values of every layer into it
Name = Annotated[str, Field(strict=True, max_length=1000)]  # of a site, layer, metric or weight factor
Values = Mapping[Name, Number]
L = TypeVar("L", bound="_Line")


class _Line(BaseModel):
    """What a later version adds to a line is left alone."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    round: Annotated[int, Field(strict=True, ge=0, le=10**6)]


class Round(_Line):
    """One round: who was asked, who counted how much, and why the others did not."""

    total_rounds: Annotated[int, Field(strict=True, ge=1, le=10**6)]
    asked: tuple[Name, ...] = ()
    bytes_down: Count = 0  # of the task's tensors, to each site
    answered: tuple[Name, ...] = ()  # sites whose update was accepted, in the order they came
    out: Mapping[Name, Written] = {}  # site → why it does not count in this round
    late: tuple[Name, ...] = ()  # sites that answered an earlier round during this one
    sites: Mapping[Name, Contribution] = {}
    metrics: Values = {}  # of the adapter this round started from, their means
    medians: Values = {}  # of the same: what chooses the best and is monitored
    after: Values = {}  # of the sites' own adapters, after training
    factors: Mapping[Name, Values] = {}  # weight factor → site → its value
    guarded: Mapping[Name, Verdict] = {}  # sites of which a part counts, and why
    held: Mapping[Name, Words] = {}  # site → what it reported that counts as another number
    noised: Noised | None = None  # the noise on the mean change, where each site's whole part is protected
    chosen: Count | None = None  # candidates that the sites' votes chose; None: nobody voted
    error: Words = ""  # why nothing was merged and the adapter stayed as it was
    step_size: Number | None = None  # η of the server step
    energy_lost: Values = {}  # layer → share of ‖ΔW‖² cut off by shortening
    effective_rank: Values = {}  # layer → directions that carry its energy
    how: Annotated[Mapping[Name, Any], Field(max_length=100)] = {}  # the job's `config.Aggregation`
    seconds: Amount = 0.0
    ended: Words = ""  # date and time, UTC

    @property
    def measured(self) -> Mapping[str, float]:
        """The sites' metrics of the adapter that the round starts from, as the monitor shows them: their medians."""
        return self.medians or self.metrics

    @property
    def scaled(self) -> Mapping[str, Verdict]:
        """Sites of which only a part counts."""
        return {site: verdict for site, verdict in self.guarded.items() if not verdict.left_out}

    @property
    def trained(self) -> bool:
        """Whether a site trained in this round. If none did, the round only measured, or no answer was usable."""
        return any(site.weight is not None for site in self.sites.values())

    @property
    def loss(self) -> float | None:
        """The mean of the sites' training losses."""
        losses = [site.loss for site in self.sites.values() if math.isfinite(site.loss)]
        return sum(losses) / len(losses) if losses else None


class Spectra(_Line):
    """The singular values of what a round merged."""

    layers: Mapping[Name, tuple[Number, ...]] = {}  # of ΔW, falling


def written(line: _Line) -> str:
    """Write a line as JSON, without numbers that are not finite."""
    return json.dumps(_finite(line.model_dump(mode="json")), allow_nan=False)


def append(file: Path, line: _Line) -> None:
    """Add a line to a file of the job.

    Raises:
        ModelError: the disk is full, or the folder may not be written to; the adapters are where they were.
    """
    text = written(line)
    try:
        with file.open("a") as opened:
            opened.write(text + "\n")
    except OSError as error:
        raise ModelError(
            f"{file.name} cannot be written: {error.strerror}; make room for it and go on with nvflare-fm resume",
            str(error),
            code="rounds_not_written",
        ) from None


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items() if not _is_lost(v)}
    return [_finite(v) for v in value if not _is_lost(v)] if isinstance(value, list) else value


def _is_lost(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def read_line(line: str | bytes) -> Round:
    """Read one line of `rounds.jsonl`, of this version or an earlier one.

    Raises:
        DataError: no server of nvflare_fm has written this line.
    """
    return _read(line, Round, FILE_NAME)


def read_rounds(file: Path) -> list[Round]:
    """Read a whole `rounds.jsonl`. A last line that is half written is left out.

    Raises:
        DataError: it cannot be read, or a line is not as the server writes it.
    """
    return _read_all(file, Round)


def read_spectra(file: Path) -> list[Spectra]:
    """Read a whole `spectra.jsonl`. A last line that is half written is left out.

    Raises:
        DataError: it cannot be read, or a line is not as the server writes it.
    """
    return _read_all(file, Spectra)


def _read(line: str | bytes, kind: type[L], name: str) -> L:
    try:
        return kind.model_validate(json.loads(line))
    except (ValueError, ValidationError, RecursionError) as error:
        raise DataError(
            f"a line of {name} is not as the server writes it; download the result again",
            one_line(error)[:200],
            code="rounds_unreadable",
        ) from None


def _read_all(file: Path, kind: type[L]) -> list[L]:
    try:
        return [_read(line, kind, file.name) for line in _lines(file)]
    except (OSError, ValueError) as error:
        raise DataError(f"{file.name} cannot be read", f"{file}: {error}", code="rounds_unreadable") from None


def _lines(file: Path) -> Iterator[bytes]:
    with open_file(file) as opened:
        while (line := opened.readline(LONGEST_LINE)).endswith(b"\n"):
            yield line
        if len(line) == LONGEST_LINE:
            raise ValueError(f"a line is longer than {LONGEST_LINE} bytes")


def in_words(line: Round) -> list[str]:
    """Describe a round in one line for a terminal, and in one more each site that does not count, or not in full."""
    measured = ", ".join(f"{name} {value:.4g}" for name, value in sorted(line.measured.items()))
    parts = [f"after {line.round} of {line.total_rounds} rounds: {measured or 'not measured'}"]
    if line.chosen is not None:
        parts = [f"{len(line.sites)} of {len(line.asked)} sites voted, {line.chosen} candidates are chosen"]
    elif not (line.trained or line.measured):
        parts.append("no site gave a usable answer")
    if line.error:
        parts.append(f"nothing was merged: {line.error}")
    if line.trained:
        loss = "" if line.loss is None else f", training loss {line.loss:.4g}"
        parts.append(f"then {len(line.sites)} of {len(line.asked)} sites trained{loss}, {line.seconds:.0f} s")
    if line.noised:
        parts.append(str(line.noised))
    sites = [f"{site}: {why}" for site, why in sorted(line.out.items())]
    sites += [f"{site}: {verdict}" for site, verdict in sorted(line.scaled.items())]
    return [one_line("; ".join(parts)), *(f"  {one_line(site)}" for site in sites)]
