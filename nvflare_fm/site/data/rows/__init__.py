"""Rows of a site's file with their line numbers, whatever its format. One file a format: a new one is a new file.

A file may hold anything. Time and memory stay within its size and the bounds below; a fault in one row costs that row
alone, and a fault of the file is an error. What the site does not say of a file is guessed from its name and its
beginning, and the guess is told. Lines are read by the standard library: pyarrow's and datasets' readers of JSON and
CSV give nothing of a file that has one bad row.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ....errors import DataError
from ....files import MIB, open_file
from ....registry import Registry
from ...offer.site_config import AUTO, DataSource
from ...tasks import BadRow

Row = tuple[int, Mapping[str, Any] | BadRow]  # line (or row, counted from 1, where the format has no lines)
ROW_LIMIT = MIB  # characters of a row: hundreds of times what a model reads
ROWS_LIMIT = 10_000_000
HEAD = 2 * ROW_LIMIT + 2  # characters that tell one format from another: two rows


@dataclass(frozen=True)
class Reading:
    """How a file is read, settled before its first row: what the site says, and what is guessed.

    Args:
        encoding, delimiter: empty where the format has none.
        guessed: names of what the site left open.
        remark: what else is good to know, such as which sheet of a workbook is read.
    """

    file: Path
    split: str
    format: str
    encoding: str = ""
    delimiter: str = ""
    guessed: tuple[str, ...] = ()
    remark: str = ""

    @property
    def is_notable(self) -> bool:
        """Whether a guess is worth a look: anything but UTF-8, commas and the only sheet."""
        return bool(self.remark or (self.guessed and (self.encoding != "utf-8" or self.delimiter not in ("", ","))))

    def __str__(self) -> str:
        named = {"encoding": self.encoding, "delimiter": self.delimiter and repr(self.delimiter)}
        parts = [self.format, *(f"{name} {value}" for name, value in named.items() if value)]
        guessed = [name for name in self.guessed if getattr(self, name)]
        told = f" (guessed: {', '.join(guessed)})" if guessed else ""
        return ", ".join(parts) + told + (f"; {self.remark}" if self.remark else "")


def _any(ending: str, head: str) -> bool:
    return True


def _settled(reading: Reading, head: str) -> Reading:
    return reading


@dataclass(frozen=True)
class Format:
    """What a format must say.

    Args:
        endings: of names of files that may be of this format.
        rows: reads them.
        is_text: it has an encoding, and may be packed with gzip.
        fits: whether a file with this ending and these first characters is one; where formats share an ending.
        settle: fills in what is still open, from the first characters (none unless `is_text`).
    """

    endings: tuple[str, ...]
    rows: Callable[[Reading], Iterator[Row]]
    is_text: bool = True
    fits: Callable[[str, str], bool] = _any
    settle: Callable[[Reading, str], Reading] = _settled


registry: Registry[Format] = Registry("data format", __name__)


def how_to_read(file: Path, source: DataSource, split: str) -> Reading:
    """Settle how a file is read: as `source` says, and where it leaves that open, as the file looks.

    Args:
        split: the name of the part to read, where a file or folder has several.
    Raises:
        DataError: there is no such file, nothing tells its format, or its text is in no encoding that can be guessed.
    """
    ending = "" if file.is_dir() else ending_of(file)
    with _reading(file, split, source.format if source.format != AUTO else ending or "datasets"):
        given = Reading(file, split, source.format, source.encoding, source.delimiter)
        candidates = [name for name in registry if ending in registry[name].endings] if ending else ["datasets"]
        if source.format != AUTO:
            candidates = [source.format]
        if not candidates:
            raise DataError(
                "a data file's ending says nothing known; save it in another format, or set format in the site file",
                f"{file}; known endings: {' '.join(sorted({e for name in registry for e in registry[name].endings}))}",
                code="data_format_unknown",
            )
        if not registry[candidates[0]].is_text:
            reading = replace(given, format=candidates[0], encoding="", delimiter="")
            return registry[reading.format].settle(reading, "")
        return _of_text(given, ending, candidates)


def _of_text(given: Reading, ending: str, candidates: list[str]) -> Reading:
    from . import text

    guessed = tuple(name for name in ("encoding", "delimiter") if getattr(given, name) == AUTO)
    if given.encoding == AUTO:
        given = replace(given, encoding=text.guess_encoding(given.file))
    head = text.first_characters(given.file, given.encoding, HEAD)
    if given.format == AUTO:
        found = [name for name in candidates if registry[name].fits(ending, head)]
        if not found:
            raise DataError(
                "a data file's ending and content fit no known format; set format in the site file",
                str(given.file),
                code="data_format_unknown",
            )
        given = replace(given, format=found[0])
    reading = registry[given.format].settle(replace(given, guessed=guessed), head)
    return replace(reading, delimiter="") if reading.delimiter == AUTO else reading


def rows(reading: Reading) -> Iterator[Row]:
    """Read every row in the file's order; where one cannot be read, the reason stands in its place.

    Raises:
        DataError: nothing of the file can be read, or not all of it.
    """
    with _reading(reading.file, reading.split, reading.format):
        for count, row in enumerate(registry[reading.format].rows(reading)):
            if count == ROWS_LIMIT:
                raise ValueError(f"more than {ROWS_LIMIT} rows")
            yield row


@contextmanager
def _reading(file: Path, split: str, format: str) -> Iterator[None]:
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # each format's reader raises its own kinds
        raise DataError(
            f"the {split} file cannot be read as {format}; check its path, and its format, encoding and delimiter in "
            "the site file; the site's log has the reason",
            f"{file}: {type(error).__name__}: {error}",
            code="data_unreadable",
        ) from None


def ending_of(file: Path) -> str:
    """What a file's name says of its format: `csv` of `a.csv` and of `a.csv.gz`."""
    return file.name.lower().removesuffix(".gz").rpartition(".")[2]


def check_regular(folder: Path) -> None:
    """Refuse a folder in which something is no regular file.

    Raises:
        OSError, ValueError: something in the folder is neither a regular file nor a folder.
    """
    for part in folder.rglob("*"):
        if not part.is_dir():
            open_file(part).close()


def small(record: Mapping[str, Any]) -> Mapping[str, Any] | BadRow:
    """`record`, unless it is longer than a row may be."""
    if _size(record, 0) > ROW_LIMIT:
        return BadRow(f"the row is longer than {ROW_LIMIT} characters", code="row_too_long")
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
