"""Words with their labels, a word a line and a blank line after each sentence: CoNLL-2003, BIO files, CoNLL-U.

A row is a sentence: `tokens` and `labels`, and every column by its place (`column_1` …) or, in CoNLL-U, by its name, so
that a site's `columns` can choose another. Columns are divided by tabs, where there are any, else by blanks.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from ...tasks import BadRow
from . import ROW_LIMIT, Format, Reading, Row, registry
from .text import is_text, lines

_OWN = ("conll", "conllu", "conllup", "bio", "iob", "iob2", "bioes", "bilou")  # endings that no other format has
_TAG = re.compile(r"O|[BIESLUMW](?:[-_].+)?")
_MOST, _TRIED = 0.9, 1000  # the part of a column's values that are tags; lines that tell which column holds them
_START_OF_DOCUMENT = "-DOCSTART-"
_UNIVERSAL = ("id", "form", "lemma", "upos", "xpos", "feats", "head", "deprel", "deps", "misc")
_NAMED = re.compile(r"#\s*global\.columns\s*=\s*(.+)")  # CoNLL-U Plus


@dataclass(frozen=True)
class _Layout:
    names: tuple[str, ...]
    token: int
    label: int
    tabs: bool
    tagged: bool = False  # whether labels are O, B-PER and the like

    def cells(self, line: str) -> list[str]:
        return [cell.strip() for cell in line.rstrip("\r\n").split("\t")] if self.tabs else line.split()

    def __str__(self) -> str:
        return f"tokens are its {self.names[self.token]}, labels its {self.names[self.label]}"


def _layout(start: Sequence[str]) -> _Layout | None:
    """What the columns are, by a file's first lines; nothing where these have no columns."""
    named = next((found[1].lower().split() for line in start if (found := _NAMED.match(line))), None)
    written = [line for line in start if line.strip() and not line.startswith((_START_OF_DOCUMENT, "#"))]
    tabs = sum("\t" in line.strip() for line in written) * 2 > len(written)
    rows = [_Layout((), 0, 0, tabs).cells(line) for line in written]
    width = Counter(map(len, rows)).most_common(1)[0][0] if rows else 0
    if width < 2:
        return None
    columns = list(zip(*(row for row in rows if len(row) == width), strict=True))
    numbered = all(re.match(r"\d+", value) for value in columns[0])
    if numbered and (named is not None or width == len(_UNIVERSAL)):
        names = tuple(named or _UNIVERSAL)[:width]
    else:
        names = tuple(f"column_{place}" for place in range(1, width + 1))
    tags = [place for place, column in enumerate(columns) if _are_tags(column)]
    token = names.index("form") if "form" in names else int(numbered and width > 2)
    after = [place for place in tags if place > token]
    if after:
        label = after[0] if numbered else after[-1]  # after numbers the first is the outer one (GermEval)
    elif tags:
        token, label = width - 1, tags[0]
    else:
        label = names.index("upos") if "upos" in names else width - 1
    return _Layout(names, token, label, tabs, bool(tags)) if len(names) == width and token != label else None


def _are_tags(column: Sequence[str]) -> bool:
    return sum(_TAG.fullmatch(value) is not None for value in column) >= _MOST * len(column)


def is_conll(head: str) -> bool:
    """Whether a text is one, as its labels and a blank line after a sentence tell."""
    start = head.split("\n", _TRIED)[:_TRIED]
    layout = _layout(start)
    if layout is None or not any(not line.strip() for line in start[:-1]):
        return False
    labels = [cells[layout.label] for line in start if len(cells := layout.cells(line)) == len(layout.names)]
    return _are_tags(labels) and "O" in labels


def _settle(reading: Reading, head: str) -> Reading:
    layout = _of(reading)
    return replace(reading, delimiter="", remark=str(layout) if layout else "")


def _of(reading: Reading) -> _Layout | None:
    return _layout(list(islice(lines(reading.file, reading.encoding), _TRIED)))


def _rows(reading: Reading) -> Iterator[Row]:
    layout = _of(reading)
    if layout is None:
        if any(line.strip() for line in lines(reading.file, reading.encoding)):
            raise ValueError("its lines have no two columns, divided by tabs or blanks")
        return
    sentence = _Sentence(layout, reading.encoding)
    for number, line in enumerate(lines(reading.file, reading.encoding), start=1):
        if line.strip():
            sentence.add(number, line)
        elif sentence.line:
            yield sentence.line, sentence.row()
            sentence = _Sentence(layout, reading.encoding)
    if sentence.line:
        yield sentence.line, sentence.row()


class _Sentence:
    """The lines up to the next blank one."""

    def __init__(self, layout: _Layout, encoding: str) -> None:
        self._layout, self._encoding = layout, encoding
        self.line = 0  # where it begins
        self._words: list[list[str]] = []
        self._size = 0
        self._bad: BadRow | None = None

    def add(self, number: int, line: str) -> None:
        cells, layout = self._layout.cells(line), self._layout
        fits = len(cells) == len(layout.names) and all(cells[place] for place in (layout.token, layout.label))
        is_remark = line.startswith("#") and not (fits and (_TAG.fullmatch(cells[layout.label]) or not layout.tagged))
        if is_remark or line.startswith(_START_OF_DOCUMENT):
            return
        self.line, self._size = self.line or number, self._size + len(line)
        if self._size > ROW_LIMIT:
            self._words = []
            self._bad = BadRow(
                f"the sentence is longer than {ROW_LIMIT} characters; a blank line ends one", code="row_too_long"
            )
        elif not is_text(line):
            self._bad = self._bad or BadRow(f"line {number} is not {self._encoding.upper()}", code="wrong_encoding")
        elif not fits:
            self._bad = self._bad or BadRow(
                f"line {number} has not the columns that the other lines have", code="field_count"
            )
        elif not self._bad and (layout.names[0] != "id" or cells[0].isdecimal()):  # neither 3-4 nor 3.1
            self._words.append(cells)

    def row(self) -> Mapping[str, Any] | BadRow:
        if self._bad:
            return self._bad
        columns = dict(zip(self._layout.names, map(list, zip(*self._words, strict=True)), strict=False))
        named = {"tokens": self._layout.token, "labels": self._layout.label}
        return columns | {name: columns.get(self._layout.names[place], []) for name, place in named.items()}


def _fits(ending: str, head: str) -> bool:
    return ending in _OWN or is_conll(head)


registry.register("conll")(Format((*_OWN, "tsv", "tab", "txt", "csv"), _rows, fits=_fits, settle=_settle))
