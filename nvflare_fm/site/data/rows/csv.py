"""Tables in a text: a header, then a record a line, or several where a field in quotes runs on (RFC 4180).

Delimiters are `,` `;` tab and `|`, or what the site names; Excel's `sep=;` counts. A quote that does not belong where
it stands costs the line it is in: reading goes on at the next line, and no further record is taken for its text.
"""

import csv
import re
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain, islice
from typing import Any

from ...offer.site_config import AUTO
from ...tasks import BadRow
from . import ROW_LIMIT, Format, Reading, Row, registry
from .conll import is_conll
from .text import is_text, lines

DELIMITERS = (",", ";", "\t", "|")
_LINES = 10_000  # of a record: more are a quote that nobody closes
_TRIED, _MOST = 50, 0.9  # lines that tell the delimiter; the part of lines that is nearly all
_SWALLOWED = 5  # lines in quotes that all look like records are records
_END = re.compile(r"\r\n|\r|\n")
_SEP = re.compile(r"sep=(.)[\r\n]*\Z")  # as Excel reads it

CsvRecord = tuple[int, list[str] | BadRow]


class _TooLongError(Exception):
    """A record goes over more characters or lines than it may."""


class _Lines:
    """Numbered lines, of which a record takes as many as it needs. Those it should have left can be given back."""

    def __init__(self, numbered: Iterator[tuple[int, str]]) -> None:
        self._numbered, self._back = numbered, deque[tuple[int, str]]()
        self.begin()

    def begin(self) -> None:
        self.taken: list[tuple[int, str]] = []
        self._size = 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        self.taken.append(self._back.popleft() if self._back else next(self._numbered))
        self._size += len(self.taken[-1][1])
        if self._size > ROW_LIMIT or len(self.taken) > _LINES:
            raise _TooLongError
        return self.taken[-1][1]

    def give_back(self, used: int) -> None:
        self._back.extendleft(reversed(self.taken[used:]))


def _records(numbered: Iterator[tuple[int, str]], delimiter: str) -> Iterator[CsvRecord]:
    """The records that are not blank, each with the line it starts in; the first one's width is that of all."""
    csv.field_size_limit(ROW_LIMIT)
    source, width, blanks = _Lines(numbered), 0, False
    while True:
        try:
            record = _record(source, delimiter, width, skipinitialspace=blanks)
            if isinstance(record, BadRow) and any('\\"' in text for _, text in source.taken):  # as MySQL writes a quote
                source.give_back(0)
                record = _record(source, delimiter, width, skipinitialspace=blanks, escapechar="\\")
        except StopIteration:
            return
        line = source.taken[0][0]
        if isinstance(record, BadRow):
            source.give_back(1)
            yield line, record
        elif any(field.strip() for field in record):
            if not width:  # a header with a blank behind each delimiter
                width, blanks = len(record), all(name.startswith(" ") for name in record[1:])
            yield line, record


def _record(source: _Lines, delimiter: str, width: int, **options: Any) -> list[str] | BadRow:
    source.begin()
    try:
        record = next(csv.reader(source, delimiter=delimiter, strict=True, **options))
    except csv.Error:
        return BadRow("a quote in the line does not belong there, or nothing closes it", code="stray_quote")
    except _TooLongError:
        return BadRow(f"the record is longer than {ROW_LIMIT} characters or {_LINES} lines", code="row_too_long")
    if width > 1 and _are_records([line for _, line in source.taken[1:-1]], delimiter, width):
        return BadRow("a quote in the line takes in the records below", code="open_quote")
    return record


def _are_records(lines: Sequence[str], delimiter: str, width: int) -> bool:
    """Whether lines that one field takes in look like records themselves."""
    if len(lines) < _SWALLOWED:
        return False
    widths = [len(record) for line in lines for record in csv.reader([line], delimiter=delimiter)]
    return widths.count(width) >= _MOST * len(lines)


def _likelihood(start: Sequence[str], delimiter: str) -> tuple[bool, float, int]:
    """How well lines are divided: whether the header is, then how many records are as wide as it is, then how wide."""
    records = [record for _, record in _records(enumerate(start), delimiter)]
    if not records or isinstance(records[0], BadRow):
        return False, 0.0, 0
    width = len(records[0])
    alike = sum(not isinstance(record, BadRow) and len(record) == width for record in records)
    return width > 1, alike / len(records), width


def _start(head: str) -> list[str]:
    return [f"{line}\n" for line in _END.split(head, _TRIED) if line.strip()][:_TRIED]


def _settle(reading: Reading, head: str) -> Reading:
    start = _start(head)
    if reading.delimiter != AUTO or not start:
        return reading
    if named := _SEP.match(start[0]):
        return replace(reading, delimiter=named[1])
    return replace(reading, delimiter=max(DELIMITERS, key=lambda delimiter: _likelihood(start, delimiter)))


def _fits(ending: str, head: str) -> bool:
    if is_conll(head):
        return False
    likelihoods = [_likelihood(_start(head), delimiter) for delimiter in DELIMITERS]
    return ending != "txt" or any(divided and alike >= _MOST for divided, alike, _ in likelihoods)


def _rows(reading: Reading) -> Iterator[Row]:
    numbered = enumerate(lines(reading.file, reading.encoding), start=1)
    first = [entry for entry in islice(numbered, 1) if not _SEP.match(entry[1])]
    records = _records(chain(first, numbered), reading.delimiter or ",")
    line, header = next(records, (0, []))
    if isinstance(header, BadRow):
        raise ValueError(f"its header, in line {line}: {header}")
    names = [name.strip() for name in header]
    if not all(map(is_text, names)):
        raise ValueError(f"its header is not {reading.encoding.upper()}")
    for line, record in records:
        yield line, record if isinstance(record, BadRow) else _row(names, record, reading.encoding)


def _row(names: Sequence[str], record: list[str], encoding: str) -> dict[str, str] | BadRow:
    if len(record) != len(names):
        return BadRow("the line has more or fewer fields than the header", code="field_count")
    if not all(map(is_text, record)):
        return BadRow(f"the line is not {encoding.upper()}", code="wrong_encoding")
    return dict(zip(names, record, strict=True))


registry.register("csv")(Format(("csv", "tsv", "tab", "txt"), _rows, fits=_fits, settle=_settle))
