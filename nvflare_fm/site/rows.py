"""Rows of a file with their line numbers: JSONL, CSV, Parquet or a saved `datasets` folder."""

import csv
import gzip
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from ..errors import DataError
from .tasks import BadRow

Row = tuple[int, Mapping[str, Any] | BadRow]  # line (or row, counted from 1, where the format has no lines)


def rows(file: Path, format: str, split: str) -> Iterator[Row]:
    """Every row in the file's order; a line that cannot be read stands there as the reason.

    Args:
        format: as in `DataSource`.
        split: of a saved `DatasetDict`, the split to read.

    Raises:
        DataError: there is no such file, or nothing of it can be read.
    """
    kind = _kind(file) if format == "auto" else format
    try:
        yield from _READERS[kind](file, split)
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"the {split} file cannot be read as {kind}; check its path, format and encoding (UTF-8)",
                        f"{file}: {error}") from None  # fmt: skip


def _kind(file: Path) -> str:
    ending = "".join(file.suffixes[-2:]).lower().removesuffix(".gz").rpartition(".")[2]
    kinds = {"jsonl": "jsonl", "ndjson": "jsonl", "json": "jsonl", "csv": "csv", "parquet": "parquet"}
    if file.is_dir():
        return "datasets"
    if ending not in kinds:
        raise DataError("a data file's ending says nothing known; set its format in the site file", str(file))
    return kinds[ending]


def _open(file: Path) -> TextIO:
    opener: Callable[..., Any] = gzip.open if file.suffix == ".gz" else open
    opened: TextIO = opener(file, "rt", encoding="utf-8-sig", newline="")
    return opened


def _jsonl(file: Path, split: str) -> Iterator[Row]:
    with _open(file) as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield number, _parse(line)


def _parse(line: str) -> Mapping[str, Any] | BadRow:
    try:
        values = json.loads(line)
    except ValueError:
        return BadRow("the line is not JSON")
    return values if isinstance(values, dict) else BadRow("the line is not a JSON object")


def _csv(file: Path, split: str) -> Iterator[Row]:
    with _open(file) as lines:
        reader = csv.DictReader(lines, strict=True)
        end = 1  # a quoted field may run over several lines: a record starts after the last one's end
        for record in reader:
            complete = None not in record and None not in record.values()
            yield end + 1, record if complete else BadRow("the line has more or fewer fields than the header")
            end = reader.line_num


def _parquet(file: Path, split: str) -> Iterator[Row]:
    from pyarrow.parquet import ParquetFile

    with ParquetFile(file) as table:
        records = (record for batch in table.iter_batches(1024) for record in batch.to_pylist())
        yield from enumerate(records, start=1)


def _datasets(file: Path, split: str) -> Iterator[Row]:
    from datasets import DatasetDict, load_from_disk

    saved = load_from_disk(str(file))
    if isinstance(saved, DatasetDict):
        if split not in saved:
            raise ValueError(f"no split {split!r} among {sorted(saved)}")
        saved = saved[split]
    yield from enumerate(saved, start=1)


_READERS: dict[str, Callable[[Path, str], Iterator[Row]]] = {
    "jsonl": _jsonl, "csv": _csv, "parquet": _parquet, "datasets": _datasets,
}  # fmt: skip
