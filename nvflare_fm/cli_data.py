"""`nvflare-fm data`: whether a file can be trained on, before there is a kit or a job."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .cli_terminal import add_row, console, plain
from .errors import ConfigError
from .untrusted import printable

if TYPE_CHECKING:
    from .site.data_check import Column, Inspection

_LABELS, _BAD, _COLUMNS, _REMARKS = 100, 20, 40, 10  # shown one by one
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
    from .site.base_model import load_tokenizer
    from .site.data_check import block, inspect
    from .site.site_config import DataSource

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
    if found.letters:
        screen.print(plain(f"letters beyond ASCII, as they are read: {found.letters}"))
    _show_columns(screen, found)
    _show_labels(screen, found, known)
    _show_lengths(screen, found, max_length)
    fits = _show_rows(screen, found, source.max_bad_rows)
    screen.print(Text("\nFor the site file:\n"))
    for line in block(found, source).splitlines():
        screen.print(Text(printable(line, longest=5000)), soft_wrap=True)
    raise typer.Exit(0 if fits else 1)


def _column(text: str) -> tuple[str, str]:
    ours, equals, theirs = text.partition("=")
    if not (ours and equals and theirs):
        raise ConfigError(f"--column {text!r} names no column for another; write --column text=body", code="no_column")
    return ours, theirs


def _show_columns(screen: Console, found: "Inspection") -> None:
    from .site.columns import wanted

    table = Table("column", "read as", "holds", "different values", show_edge=False)
    for name, column in list(found.found.items())[:_COLUMNS]:
        add_row(table, (name, found.read_as.get(name, ""), _counted(column.kinds), _different(column)))
    screen.print(table)
    if len(found.found) > _COLUMNS:
        screen.print(plain(f"and {len(found.found) - _COLUMNS} more columns"))
    if found.is_proposed:
        said = "the task reads columns of other names; `read as` is a guess, which --column OURS=THEIRS mends"
        screen.print(plain(said))
    if found.found and not found.is_readable:
        said = f"the task reads {wanted(found.task)}; say which columns these are with --column OURS=THEIRS"
        screen.print(plain(said))


def _different(column: "Column") -> str:
    return "many" if column.is_varied or column.is_long else str(len(column.values))


def _show_labels(screen: Console, found: "Inspection", known: tuple[str, ...]) -> None:
    if not found.labels:
        return
    table = Table("label", "times", show_edge=False)
    for label, count in found.labels.most_common(_LABELS):
        add_row(table, (label if not known or _is_known(label, known) else f"{label} (not among --labels)", count))
    screen.print(table)
    if len(found.labels) > _LABELS:
        screen.print(plain(f"and {len(found.labels) - _LABELS} more labels"))


def _is_known(label: str, known: tuple[str, ...]) -> bool:
    from .site.tasks import BadRow
    from .site.tasks.labels import find

    try:
        find(label, known)
    except BadRow:
        return False
    return True


def _show_lengths(screen: Console, found: "Inspection", max_length: int) -> None:
    from .site.tasks import counted

    if not found.lengths:
        return
    shortest, median, most, longest = (_quantile(found.lengths, part) for part in (0, 0.5, 0.95, 1))
    said = f"length in {found.unit}: shortest {shortest}, half up to {median}, 95 % up to {most}, longest {longest}"
    screen.print(plain(said))
    if found.unit == "tokens":
        cut = str(found.cut) if found.cut.rows else "no row is cut"
        screen.print(plain(f"{cut} (max_length = {max_length} tokens)"))
    for remark, count in found.remarks.most_common(_REMARKS):
        screen.print(plain(f"{counted(count, 'row', 'rows')}: {remark}"))


def _quantile(lengths: Counter[int], part: float) -> int:
    return next(_reached(lengths, part * lengths.total()))


def _reached(lengths: Counter[int], count: float) -> Iterator[int]:
    so_far = 0
    for length in sorted(lengths):
        so_far += lengths[length]
        if so_far >= count:
            yield length


def _show_rows(screen: Console, found: "Inspection", limit: float) -> bool:
    bad = found.reasons.total()
    fits = found.good > 0 and bad <= limit * (found.good + bad)
    screen.print(Text("✓ " if fits else "✗ ", style="green" if fits else "red"), end="")
    screen.print(plain(f"{found.good} rows can be used, {bad} cannot"))
    for line, reason in found.bad[:_BAD]:
        screen.print(plain(f"  line {line}: {reason}"))
    if bad > _BAD:
        screen.print(plain(f"  in all: {_counted(found.reasons)}"))
    return fits


def _counted(counts: Counter[str]) -> str:
    return ", ".join(f"{count} × {what}" for what, count in counts.most_common())
