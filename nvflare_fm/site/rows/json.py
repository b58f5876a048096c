"""One JSON text that holds all rows: a list of objects, an object of objects, or columns side by side.

    [{"text": …}, …]      {"data": [{"text": …}, …]}      {"17": {"text": …}, …}
    {"text": ["…", …], "label": ["…", …]}                 {"text": {"0": "…", …}, "label": {"0": "…", …}}

A row's end is found by brackets and quotes, then the row is parsed by itself: one that is no JSON costs that row. Where
its fault hides its end, reading goes on at the next line that begins as the row's own did.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from ..tasks import BadRow
from . import ROW_LIMIT, Format, Reading, Row, registry, small, text
from .jsonl import ENDINGS, is_lines, parse

_BLANK = re.compile(r"[\s,]*+")  # a comma too many or too few between two rows costs nobody anything
_OUTSIDE, _INSIDE = re.compile(r'["{}\[\]]'), re.compile(r'["\\\n]')
_SCALAR = re.compile(r'[^\s,"{}\[\]:]*+')
_NUMBERED = re.compile(r'"\d+"\s*:')
_OUTLINED = 1000  # members of an object that tell what it is
_COLUMNS_LIMIT = 2**28  # characters of columns side by side, which are held as a whole
_NEAR = 100  # characters within a value that tell what it holds


@dataclass
class _Extent:
    """Where a value ends, found piece by piece. A string ends with its line, as JSON has none that goes on."""

    depth: int = 0
    inside: bool = False
    escaped: bool = False
    scalar: bool = False

    def go_on(self, held: str, at: int) -> tuple[bool, int]:
        """Whether the value ends in `held`, read from `at` on, and where reading stopped."""
        if self.scalar or (not self.depth and not self.inside and held[at] not in '"{['):
            found = _SCALAR.match(held, at)
            end = max(found.end() if found else at, at if self.scalar else at + 1)
            self.scalar = True
            return end < len(held), end
        while at < len(held):
            if self.escaped:
                self.escaped, at = False, at + 1
                continue
            found = (_INSIDE if self.inside else _OUTSIDE).search(held, at)
            if found is None:
                break
            at = found.end()
            self.escaped = found[0] == "\\"
            self.depth += (found[0] in "{[") - (found[0] in "}]")
            self.inside = self.escaped or (found[0] == '"' and not self.inside)
            if not self.inside and self.depth <= 0:
                return True, at
        return False, len(held)


class _Scanner:
    """Goes through a JSON text, value by value, and holds little more than one of them."""

    def __init__(self, reading: Reading) -> None:
        self._pieces = text.pieces(reading.file, reading.encoding)
        self._held, self._at = "", 0
        self.line = 1
        self.indent: str | None = ""  # what stands in the next value's line before it, where that is blank

    def advance(self, count: int = 1) -> None:
        self.line += self._held.count("\n", self._at, self._at + count)
        self._at += count
        self.indent = None

    def peek(self) -> str:
        """The first character of the next value, or of what ends a list or an object; nothing at the end."""
        indent = self.indent
        while True:
            blank = _BLANK.match(self._held, self._at)
            gap = blank[0] if blank else ""
            self.advance(len(gap))
            if "\n" in gap or indent is not None:
                indent = (gap if "\n" in gap else f"{indent}{gap}").rpartition("\n")[2][-_NEAR:]
            if self._at < len(self._held):
                self.indent = indent
                return self._held[self._at]
            if not self._more():
                return ""

    def inside(self) -> str:
        """The first characters within the brackets that come next."""
        while len(self._held) - self._at < 2 * _NEAR and self._more():
            pass
        return self._held[self._at + 1 : self._at + 2 * _NEAR].lstrip()

    def next(self, length: int | None) -> str:
        return self._held[self._at : None if length is None else self._at + length]

    def length(self) -> int | None:
        """Of the next value, in characters; None where it is longer than a row may be, or does not end."""
        extent, length = _Extent(), 0
        while length <= ROW_LIMIT:
            over, end = extent.go_on(self._held, self._at + length)
            length = end - self._at
            if over:
                return length if length <= ROW_LIMIT else None
            if not self._more():
                break
        return None

    def skip(self) -> None:
        """Over the next value, however long."""
        extent, line = _Extent(), self.line
        while True:
            over, end = extent.go_on(self._held, self._at)
            self.advance(end - self._at)
            if over:
                return
            if not self._more():
                raise ValueError(f"what begins in line {line} does not end; is a quote or a bracket missing there?")

    def key(self) -> str:
        """Over the name of an object's next member and its colon."""
        line, length = self.line, self.length() if self.peek() == '"' else None
        name = self.next(length)
        self.advance(length or 0)
        if length is None or self.peek() != ":":
            raise ValueError(f"line {line} has no name and colon where an object's next member should be")
        self.advance()
        return str(json.loads(name))

    def _more(self) -> bool:
        piece = next(self._pieces, "")
        self._held, self._at = self._held[self._at :] + piece, 0
        return bool(piece)


def _rows(reading: Reading) -> Iterator[Row]:
    scanner = _Scanner(reading)
    match scanner.peek():
        case "[":
            yield from _list(scanner, reading.encoding)
            if scanner.peek():
                raise ValueError(f"line {scanner.line} goes on after the list of rows has ended")
        case "{":
            yield from _in_object(reading)
        case "":
            return
        case _:
            raise ValueError(f"line {scanner.line} begins with neither a list nor an object")


def _in_object(reading: Reading) -> Iterator[Row]:
    members, is_alone = _outline(_Scanner(reading))
    lists = [name for name, inside in members.items() if inside.startswith("[{")]
    scanner = _Scanner(reading)
    scanner.peek()
    if not is_alone:  # objects, one after another
        yield from _values(scanner, reading.encoding, end="")
    elif lists:
        wanted = reading.split if reading.split in lists else lists[0]
        if len(lists) > 1 and wanted != reading.split:
            raise ValueError(f"it has several lists of rows, {lists}, and none is called {reading.split!r}")
        scanner.advance()
        while scanner.key() != wanted:
            scanner.peek()
            scanner.skip()
        scanner.peek()
        yield from _list(scanner, reading.encoding)
    elif members and all(inside.startswith("{") and not _NUMBERED.match(inside[1:]) for inside in members.values()):
        scanner.advance()
        while scanner.peek() not in ("}", ""):
            scanner.key()
            yield from _value(scanner, reading.encoding)
        _closed(scanner, "}")
    elif members and all(inside.startswith(("[", "{")) for inside in members.values()):
        yield from _columns(reading)
    else:
        yield from _value(scanner, reading.encoding)


def _outline(scanner: _Scanner) -> tuple[dict[str, str], bool]:
    """An object's members, each with the characters it begins with; and whether nothing follows the object."""
    members: dict[str, str] = {}
    scanner.peek()
    scanner.advance()
    while scanner.peek() not in ("}", ""):
        if len(members) == _OUTLINED:
            return members, True
        name, first = scanner.key(), scanner.peek()
        if not first:
            break
        members[name] = first + (scanner.inside() if first in "[{" else "")
        scanner.skip()
    _closed(scanner, "}")
    return members, not scanner.peek()


def _closed(scanner: _Scanner, bracket: str) -> None:
    if scanner.peek() != bracket:
        raise ValueError(f"a {bracket!r} is missing at the end, in line {scanner.line}; is the file whole?")
    scanner.advance()


def _list(scanner: _Scanner, encoding: str) -> Iterator[Row]:
    scanner.advance()
    yield from _values(scanner, encoding, end="]")
    _closed(scanner, "]")


def _values(scanner: _Scanner, encoding: str, end: str) -> Iterator[Row]:
    bad_line = 0
    while (first := scanner.peek()) not in (end, ""):
        if scanner.line == bad_line and first != "{":
            scanner.skip()  # what is left of a row that its own fault has cut up
            continue
        for line, row in _value(scanner, encoding):
            bad_line = line if isinstance(row, BadRow) else 0
            yield line, row


def _value(scanner: _Scanner, encoding: str) -> Iterator[Row]:
    """The row that comes next; where it is no JSON, it and those in which it seems to end."""
    scanner.peek()
    line, length = scanner.line, scanner.length()
    too_long = BadRow(f"the row is longer than {ROW_LIMIT} characters")
    row = too_long if length is None else parse(scanner.next(length), encoding)
    parts = _parts(scanner.next(length), scanner.indent) if isinstance(row, BadRow) else []
    if len(parts) > 1:
        for part in parts[:-1]:  # the last may go on
            yield scanner.line, parse(part.rstrip(" \t\r\n,"), encoding)
            scanner.advance(len(part))
    elif length is None:
        scanner.skip()
        yield line, row
    else:
        scanner.advance(length)
        yield line, row


def _parts(value: str, indent: str | None) -> list[str]:
    """Cut where a line begins as the value itself does."""
    if indent is None or not value.startswith("{"):
        return [value]
    starts = [0, *(found.start() + 1 for found in re.finditer(rf"\n(?={re.escape(indent)}\{{)", value)), len(value)]
    return [value[start:end] for start, end in pairwise(starts)]


def _columns(reading: Reading) -> Iterator[Row]:
    whole = text.head(reading.file, reading.encoding, _COLUMNS_LIMIT + 1)
    if len(whole) > _COLUMNS_LIMIT:
        raise ValueError(f"columns side by side are read up to {_COLUMNS_LIMIT} characters; write rows instead")
    found: dict[str, Any] = json.loads(whole)
    columns = [list(values.values()) if isinstance(values, dict) else values for values in found.values()]
    for number, values in enumerate(zip(*columns, strict=True), start=1):
        record = dict(zip(found, values, strict=True))
        is_text = text.is_text(json.dumps(record, ensure_ascii=False))
        yield number, small(record) if is_text else BadRow(f"the row is not {reading.encoding.upper()}")


registry.register("json")(Format(ENDINGS, _rows, fits=lambda ending, head: not is_lines(ending, head)))
