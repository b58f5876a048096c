"""What a command prints: text as it stands, never parsed as markup, and an error in one line.

Messages hold paths, settings and what sites send: none of it may style, move or clear the reader's terminal.
"""

import io
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

from ..errors import FmError
from ..untrusted import one_line

SITE_EXTRA = 'pip install "nvflare_fm[site]"'


def console(**options: Any) -> Console:
    """A console that prints texts as they are: no markup, no emoji names, no guessed colours."""
    return Console(markup=False, emoji=False, highlight=False, **options)


def plain(text: object, style: str = "") -> Text:
    """`text` for a console, on one line: as it stands, with what is not printable spelt out."""
    return Text(one_line(text), style=style)


def add_row(table: Table, cells: Iterable[object], style: str | None = None) -> None:
    """Add a row of texts to a table, each as it stands."""
    table.add_row(*(plain(cell) for cell in cells), style=style)


@contextmanager
def errors_shown() -> Iterator[None]:
    """Ends the program with one line on what a user can put right, and with exit status 1; no traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a file name need not be text in the terminal's encoding
            stream.reconfigure(errors="backslashreplace")
    try:
        yield
    except FmError as error:
        sys.exit(f"nvflare-fm: {one_line(error)}")
    except ModuleNotFoundError as error:
        sys.exit(f"nvflare-fm: this command needs the Python package {error.name!r}: {SITE_EXTRA}")
    except OSError as error:
        sys.exit(f"nvflare-fm: {one_line(_of_the_system(error))}")


class Commands(TyperGroup):
    """A group of commands that ends as `errors_shown` says."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        with errors_shown():
            return super().main(*args, **kwargs)


def _of_the_system(error: OSError) -> str:
    """What the operating system refused, and where: `notes: Permission denied`."""
    where = [str(name) for name in (error.filename, error.filename2) if name is not None]
    return f"{' → '.join(where)}: {error.strerror}" if where and error.strerror else str(error)
