"""One JSON text that holds all rows: a list of objects, an object of objects, or columns side by side.

    [{"text": …}, …]      {"data": [{"text": …}, …]}      {"17": {"text": …}, …}
    {"text": ["…", …], "label": ["…", …]}                 {"text": {"0": "…", …}, "label": {"0": "…", …}}

It is read as a whole: where it is no JSON, no row of it can be used.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ...tasks import BadRow
from . import Format, Reading, Row, registry, small, text
from .jsonl import ENDINGS, is_lines

_BLANKS = re.compile(r"\s*+")
_LIMIT = 2**28  # characters; rows take several times that in memory


def _rows(reading: Reading) -> Iterator[Row]:
    whole = text.first_characters(reading.file, reading.encoding, _LIMIT + 1)
    if len(whole) > _LIMIT:
        raise ValueError(f"a JSON text is read up to {_LIMIT} characters; write an object a line, or Parquet")
    values, wrong = list(_values(whole)), not text.is_text(whole)
    records = _records(values[0], reading.split) if len(values) == 1 else values
    for number, record in enumerate(records, start=1):
        if not isinstance(record, Mapping):
            yield number, BadRow("the row is not a JSON object", code="row_not_object")
        elif wrong and not text.is_text(json.dumps(record, ensure_ascii=False)):
            yield number, BadRow(f"the row is not {reading.encoding.upper()}", code="wrong_encoding")
        else:
            yield number, small(record)


def _values(whole: str) -> Iterator[Any]:
    """The value, or the values that stand one after another.

    Raises:
        ValueError: names the line, and repeats nothing of it.
    """
    decoder, at = json.JSONDecoder(), _after_blanks(whole, 0)
    try:
        while at < len(whole):
            value, end = decoder.raw_decode(whole, at)
            at = _after_blanks(whole, end)
            yield value
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _after_blanks(whole: str, at: int) -> int:
    found = _BLANKS.match(whole, at)
    return found.end() if found else at


def _records(value: Any, split: str) -> Iterable[Any]:
    if not isinstance(value, dict):
        return value if isinstance(value, list) else [value]
    lists = [name for name, inside in value.items() if isinstance(inside, list) and _all(dict, inside)]
    if lists:
        if len(lists) > 1 and split not in lists:
            raise ValueError(f"it has several lists of rows, {len(lists)} in all, and none is called {split!r}")
        return list(value[split if split in lists else lists[0]])
    if _all(dict, value.values()) and not all(name.isdecimal() for inside in value.values() for name in inside):
        return value.values()
    if _all(list | dict, value.values()):
        columns = [inside.values() if isinstance(inside, dict) else inside for inside in value.values()]
        return [dict(zip(value, record, strict=True)) for record in zip(*columns, strict=True)]
    return [value]


def _all(kind: Any, values: Iterable[Any]) -> bool:
    """Whether there are any, and of this kind alone."""
    found = list(values)
    return bool(found) and all(isinstance(each, kind) for each in found)


registry.register("json")(Format(ENDINGS, _rows, fits=lambda ending, head: not is_lines(ending, head)))
