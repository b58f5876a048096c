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
data = typer.Typer(no_args_is_help=True, help="Check whether a file of rows can be trained on.")


@data.callback()
def main() -> None:
    """Check whether a file of rows can be trained on."""


@data.command()
def check(
    file: Annotated[Path, typer.Argument(help="file of rows, or folder of a Hugging Face data set")],
    task: Annotated[str, typer.Option(help="task that is to read the file, such as causal_lm")],
    model: Annotated[
        Path | None, typer.Option(help="folder of the base model, for its tokenizer; unset: count characters")
    ] = None,
    labels: Annotated[str, typer.Option(help="labels of the job, separated by commas; unset: those in the file")] = "",
    max_length: Annotated[int, typer.Option(help="tokens at which a text is cut; needs --model")] = 512,
    column: Annotated[
        list[str],
        typer.Option(
            metavar="OURS=THEIRS", help="the task's name = the file's name, such as text=body; may be repeated"
        ),
    ] = [],  # noqa: B006
    format: Annotated[str, typer.Option(help="format of the file, as in fm_site.yaml; auto: guess it")] = "auto",
    encoding: Annotated[str, typer.Option(help="encoding, as in fm_site.yaml; auto: guess it")] = "auto",
    delimiter: Annotated[str, typer.Option(help="delimiter, as in fm_site.yaml; auto: guess it")] = "auto",
) -> None:
    """Check whether a job can train on FILE.

    The command prints the format, columns, labels and lengths, the rows that cannot be used and why, and the lines for
    fm_site.yaml. It needs no startup kit. It shows values of labels, so run it only where you may see the data. Exit
    status: 0 if a job can use the file, 1 if it cannot.
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
