"""`nvflare-fm data`: whether a file can be trained on, before there is a kit or a job."""

from collections import Counter
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from ..errors import ConfigError
from ..untrusted import printable
from .terminal import add_row, console, plain

if TYPE_CHECKING:
    from ..site.data.check import Column, Inspection

_LABELS, _BAD, _COLUMNS, _REMARKS = 100, 20, 40, 10  # shown one by one
Shown = Iterator[Table | Text]
data = typer.Typer(no_args_is_help=True, help="What a file of rows is, and what a task makes of it.")


@data.callback()
def main() -> None:
    """What a file of rows is, and what a task makes of it."""


@data.command()
def check(
    file: Annotated[Path, typer.Argument(help="rows: a file, or a folder of Hugging Face datasets")],
    task: Annotated[str, typer.Option(help="what a job would train: see welcome.tasks in the settings")],
    model: Annotated[
        Path | None, typer.Option(help="folder of the base model, whose tokenizer is used; its weights are not read")
    ] = None,
    labels: Annotated[str, typer.Option(help="the plan's classes, separated by commas; unset: those in the file")] = "",
    max_length: Annotated[int, typer.Option(help="tokens; longer texts are cut. Needs --model")] = 512,
    column: Annotated[
        list[str], typer.Option(metavar="OURS=THEIRS", help="as columns in the site file: text=body; may be repeated")
    ] = [],  # noqa: B006
    format: Annotated[str, typer.Option(help="as in the site file; auto: as the file looks")] = "auto",
    encoding: Annotated[str, typer.Option(help="as in the site file; auto: guessed")] = "auto",
    delimiter: Annotated[str, typer.Option(help="as in the site file; auto: guessed")] = "auto",
) -> None:
    """Tells what FILE is, which rows cannot be used and why, and what to write under data in the site file.

    No kit is needed. Values of labels are shown: it is for your own eyes. Exit status 0: a job can use the file, 1: it
    cannot.
    """
    from ..site.data.check import block, inspect
    from ..site.model.base_model import load_tokenizer
    from ..site.offer.site_config import DataSource

    if not file.exists():
        raise ConfigError(f"there is no file {file}", code="no_such_file")
    if model and not model.is_dir():
        raise ConfigError(f"there is no folder {model}; --model names the base model's", code="no_such_file")
    given = {"train": str(file), "format": format, "encoding": encoding, "delimiter": delimiter}
    source = DataSource.read(given | {"columns": dict(map(_column, column))}, "nvflare-fm data check")
    known = tuple(label.strip() for label in labels.split(",") if label.strip())
    found = inspect(source, task, known, load_tokenizer(model) if model else None, max_length)
    screen = console()
    screen.print(plain(f"{file}: {found.reading}"))
    parts = (_letters(found), _columns(found), _labels(found, known), _lengths(found, max_length), _rows(found))
    for shown in chain.from_iterable(parts):
        screen.print(shown)
    screen.print("\nFor the site file:\n")
    for line in block(found, source).splitlines():
        screen.print(Text(printable(line, longest=5000)), soft_wrap=True)
    fits = found.good > 0 and found.reasons.total() <= source.max_bad_rows * (found.good + found.reasons.total())
    raise typer.Exit(0 if fits else 1)


def _column(text: str) -> tuple[str, str]:
    ours, equals, theirs = text.partition("=")
    if not (ours and equals and theirs):
        raise ConfigError(f"--column {text!r} names no column for another; write --column text=body", code="no_column")
    return ours, theirs


def _letters(found: "Inspection") -> Shown:
    if found.letters:
        yield plain(f"letters beyond ASCII, as they are read: {found.letters}")


def _columns(found: "Inspection") -> Shown:
    from ..site.data.columns import wanted
    from ..site.tasks import registry as tasks

    table = Table("column", "read as", "holds", "different values", show_edge=False)
    for name, column in list(found.found.items())[:_COLUMNS]:
        add_row(table, (name, found.read_as.get(name, ""), _counted(column.kinds), _different(column)))
    yield table
    if len(found.found) > _COLUMNS:
        yield plain(f"and {len(found.found) - _COLUMNS} more columns")
    if found.is_proposed:
        said = "the task reads columns of other names; `read as` is a guess, which --column OURS=THEIRS mends"
        yield plain(said)
    if found.found and not found.is_readable:
        read = wanted(tasks[found.task].columns)
        said = f"the task reads {read}; say which columns these are with --column OURS=THEIRS"
        yield plain(said)


def _different(column: "Column") -> str:
    return "many" if column.is_varied or column.is_long else str(len(column.values))


def _labels(found: "Inspection", known: tuple[str, ...]) -> Shown:
    if not found.labels:
        return
    table = Table("label", "times", show_edge=False)
    for label, count in found.labels.most_common(_LABELS):
        add_row(table, (label if not known or _is_known(label, known) else f"{label} (not among --labels)", count))
    yield table
    if len(found.labels) > _LABELS:
        yield plain(f"and {len(found.labels) - _LABELS} more labels")


def _is_known(label: str, known: tuple[str, ...]) -> bool:
    from ..site.tasks import BadRow
    from ..site.tasks.labels import find

    try:
        find(label, known)
    except BadRow:
        return False
    return True


def _lengths(found: "Inspection", max_length: int) -> Shown:
    from ..site.tasks import counted

    if not found.lengths:
        return
    shortest, median, most, longest = (_quantile(found.lengths, part) for part in (0, 0.5, 0.95, 1))
    said = f"length in {found.unit}: shortest {shortest}, half up to {median}, 95 % up to {most}, longest {longest}"
    yield plain(said)
    if found.unit == "tokens":
        cut = str(found.cut) if found.cut.rows else "no row is cut"
        yield plain(f"{cut} (max_length = {max_length} tokens)")
    for remark, count in found.remarks.most_common(_REMARKS):
        yield plain(f"{counted(count, 'row', 'rows')}: {remark}")


def _quantile(lengths: Counter[int], part: float) -> int:
    return next(_reached(lengths, part * lengths.total()))


def _reached(lengths: Counter[int], count: float) -> Iterator[int]:
    so_far = 0
    for length in sorted(lengths):
        so_far += lengths[length]
        if so_far >= count:
            yield length


def _rows(found: "Inspection") -> Shown:
    yield plain(f"{found.good} rows can be used, {found.reasons.total()} cannot", style="red" if found.bad else "green")
    for line, reason in found.bad[:_BAD]:
        yield plain(f"line {line}: {reason}")
    if found.reasons.total() > _BAD:
        yield plain(f"in all: {_counted(found.reasons)}")


def _counted(counts: Counter[str]) -> str:
    return ", ".join(f"{count} × {what}" for what, count in counts.most_common())
