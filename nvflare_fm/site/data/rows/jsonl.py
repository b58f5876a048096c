"""JSON Lines: an object a line (jsonlines.org)."""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from ...tasks import BadRow
from . import ROW_LIMIT, Format, Reading, Row, registry
from .text import is_text, lines

ENDINGS = ("jsonl", "ndjson", "json")
_SECOND_OBJECT = re.compile(r"\s*+[^\r\n]++[\r\n]\s*+\{")  # a line of any kind, and one that begins with an object
_ONE_VALUE = re.compile(r"\s*+(?:\[\s*+\{|\{[ \t]*+[\r\n])")  # a list of objects, or an object that goes on below


def is_lines(ending: str, head: str) -> bool:
    """Whether a file of JSON holds a value a line, rather than one value."""
    return bool(_SECOND_OBJECT.match(head) and not head.lstrip().startswith("[")) or (
        ending != "json" and not _ONE_VALUE.match(head)
    )


def _rows(reading: Reading) -> Iterator[Row]:
    for number, line in enumerate(lines(reading.file, reading.encoding), start=1):
        if line.strip():
            yield number, parse(line, reading.encoding)


def parse(text: str, encoding: str) -> Mapping[str, Any] | BadRow:
    """The row that a JSON object is."""
    if len(text) > ROW_LIMIT:
        return BadRow(f"the line is longer than {ROW_LIMIT} characters", code="row_too_long")
    if not is_text(text):
        return BadRow(f"the line is not {encoding.upper()}", code="wrong_encoding")
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return BadRow("the line is not JSON", code="row_not_json")
    return values if isinstance(values, dict) else BadRow("the line is not a JSON object", code="row_not_object")


registry.register("jsonl")(Format(ENDINGS, _rows, fits=is_lines))
