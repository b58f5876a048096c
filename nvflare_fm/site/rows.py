"""Rows of a file with their line numbers: JSONL, CSV, Parquet or a saved `datasets` folder.

A file may hold anything. Time and memory stay within its size and the bounds below; a fault in one row costs that row
alone, and a fault of the file is an error.
"""

import csv
import gzip
import io
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..files import MIB, open_file
from .tasks import BadRow

Row = tuple[int, Mapping[str, Any] | BadRow]  # line (or row, counted from 1, where the format has no lines)
ROW_LIMIT = MIB  # characters of a row: hundreds of times what a model reads
ROWS_LIMIT = 10_000_000
_EXPANDS, _ALWAYS = 200, 64 * MIB  # a compressed file holds at most so many times its size, or so much
_BATCH = 64  # rows of a Parquet file in memory at once


def rows(file: Path, format: str, split: str) -> Iterator[Row]:
    """Read every row in the file's order; where one cannot be read, the reason stands in its place.

    Args:
        format: as in `DataSource`.
        split: of a saved `DatasetDict`, the split to read.
    Raises:
        DataError: there is no such file, or nothing of it can be read, or not all of it.
    """
    kind = _kind(file) if format == "auto" else format
    try:
        for count, row in enumerate(_READERS[kind](file, split)):
            if count == ROWS_LIMIT:
                raise ValueError(f"more than {ROWS_LIMIT} rows")
            yield row
    except Exception as error:  # each format's reader raises its own kinds
        raise DataError(
            f"the {split} file cannot be read as {kind}; check its path, format and encoding (UTF-8)",
            f"{file}: {type(error).__name__}: {error}",
            code="data_unreadable",
        ) from None


def _kind(file: Path) -> str:
    ending = "".join(file.suffixes[-2:]).lower().removesuffix(".gz").rpartition(".")[2]
    kinds = {"jsonl": "jsonl", "ndjson": "jsonl", "json": "jsonl", "csv": "csv", "parquet": "parquet"}
    if file.is_dir():
        return "datasets"
    if ending not in kinds:
        raise DataError(
            "a data file's ending says nothing known; set its format in the site file",
            str(file),
            code="data_format_unknown",
        )
    return kinds[ending]


def _lines(file: Path) -> Iterator[str]:
    """The lines of a text. One that is longer than a row may be is cut; bytes that are not UTF-8 are surrogates."""
    with open_file(file) as raw:
        packed = file.suffix == ".gz"
        limit = max(_ALWAYS, _EXPANDS * file.stat().st_size) if packed else None
        content = gzip.GzipFile(fileobj=raw) if packed else raw
        text = io.TextIOWrapper(content, encoding="utf-8-sig", errors="surrogateescape", newline="")
        read = 0
        while line := text.readline(ROW_LIMIT + 1):
            yield line
            read += len(line)
            while len(line) > ROW_LIMIT and line[-1] not in "\r\n":
                line = text.readline(ROW_LIMIT + 1)
                read += len(line)
            if limit and read > limit:
                raise ValueError(f"unpacked, it is more than {limit} characters long")


def _is_text(value: str) -> bool:
    """Whether no byte of it was anything but UTF-8."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _jsonl(file: Path, split: str) -> Iterator[Row]:
    for number, line in enumerate(_lines(file), start=1):
        if line.strip():
            yield number, _parse(line)


def _parse(line: str) -> Mapping[str, Any] | BadRow:
    if len(line) > ROW_LIMIT:
        return BadRow(f"the line is longer than {ROW_LIMIT} characters")
    if not _is_text(line):
        return BadRow("the line is not UTF-8")
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return BadRow("the line is not JSON")
    return values if isinstance(values, dict) else BadRow("the line is not a JSON object")


def _csv(file: Path, split: str) -> Iterator[Row]:
    csv.field_size_limit(ROW_LIMIT)  # a quote that nobody closes would take in the whole file
    reader = csv.DictReader(map(_short, _lines(file)), strict=True)
    if not all(map(_is_text, reader.fieldnames or ())):
        raise ValueError("its header is not UTF-8")
    end = reader.line_num  # a quoted field may run over several lines: a record starts after the last one's end
    for record in reader:
        yield end + 1, _checked(record)
        end = reader.line_num


def _short(line: str) -> str:
    if len(line) > ROW_LIMIT:  # it cannot be left out: whether a quote is open is not known after it
        raise ValueError(f"a line is longer than {ROW_LIMIT} characters")
    return line


def _checked(record: dict[str, Any]) -> Mapping[str, Any] | BadRow:
    if None in record or None in record.values():
        return BadRow("the line has more or fewer fields than the header")
    return record if all(map(_is_text, record.values())) else BadRow("the line is not UTF-8")


def _parquet(file: Path, split: str) -> Iterator[Row]:
    from pyarrow.parquet import ParquetFile

    with open_file(file) as opened, ParquetFile(opened) as table:
        records = (record for batch in table.iter_batches(_BATCH) for record in batch.to_pylist())
        yield from enumerate(map(_small, records), start=1)


def _datasets(file: Path, split: str) -> Iterator[Row]:
    from datasets import DatasetDict, load_from_disk

    for part in file.rglob("*"):
        if not part.is_dir():
            open_file(part).close()
    saved = load_from_disk(str(file))
    if isinstance(saved, DatasetDict):
        if split not in saved:
            raise ValueError(f"no split {split!r} among {sorted(saved)}")
        saved = saved[split]
    saved.data.validate(full=True)  # it is mapped: an offset that points elsewhere would end the process
    yield from enumerate(map(_small, saved), start=1)


def _small(record: Mapping[str, Any]) -> Mapping[str, Any] | BadRow:
    if _size(record, 0) > ROW_LIMIT:
        return BadRow(f"the row is longer than {ROW_LIMIT} characters")
    return record


def _size(value: Any, so_far: int) -> int:
    """The characters of all texts in `value`, each value counting as one more; not counted much beyond the limit."""
    so_far += 1 + (len(value) if isinstance(value, str | bytes) else 0)
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    for part in parts:
        if so_far > ROW_LIMIT:
            break
        so_far = _size(part, so_far)
    return so_far


_READERS: dict[str, Callable[[Path, str], Iterator[Row]]] = {
    "jsonl": _jsonl, "csv": _csv, "parquet": _parquet, "datasets": _datasets,
}  # fmt: skip
