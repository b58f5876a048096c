"""`nvflare-fm site budget`: what a site's data have cost in privacy so far, and whether the account is whole."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from ..errors import ConfigError, PolicyError
from .terminal import add_row, console, plain

if TYPE_CHECKING:
    from ..privacy.budget import Entry
    from ..site.offer.site_config import Privacy


def budget(
    kit: Annotated[
        Path, typer.Option("--kit", help="the site's startup kit: the folder that holds startup/ and local/")
    ] = Path("."),
    noted: Annotated[
        str, typer.Option(help="seal that this command printed earlier: check that it is still in the account")
    ] = "",
) -> None:
    """Show what each data set of a site has cost in privacy, over all jobs.

    The command verifies the account, local/fm_privacy.jsonl, first. It prints ε of each data set, of the max_epsilon
    that the site file sets, and the share of each job. At the end it prints the seal of the last line. Note the seal
    elsewhere: with --noted it shows later that no line before it is gone. Exit status: 0 if the account is whole, 1 if
    it is not.
    """
    from ..privacy.budget import Budget, cost
    from ..site.offer.site_config import FILE_NAME, load_site

    site_file = kit / "local" / FILE_NAME
    if not site_file.exists():
        raise ConfigError(f"there is no {site_file}; name the site's startup kit with --kit", code="no_kit")
    privacy, screen = load_site(site_file).privacy, console()
    book = Budget.beside(site_file, FILE_NAME).verify()
    if noted and noted not in book.seals:
        raise PolicyError(
            "the seal that you noted is not in the account: an older copy of both files was put back, or the seal is "
            "another site's",
            code="seal_not_found",
        )
    for data, unit in sorted({(entry.data, entry.unit) for entry in book.entries}):
        counted = book.of(data, unit)
        screen.print(plain(_spent(data, unit, cost(counted, privacy.delta), privacy)))
        table = Table("job", "submitter", "organisation", "first", "last", "rounds", "ε", show_edge=False)
        for job in dict.fromkeys(entry.job for entry in counted):
            _add(table, [entry for entry in counted if entry.job == job], cost, privacy.delta)
        screen.print(table)
    torn = "; a half-written line at its end, for which nothing left, does not count" if book.torn else ""
    screen.print(plain(f"the account is whole: {len(book.entries)} lines{torn}", style="green"))
    if book.entries:
        screen.print(plain(f"seal: {book.seal}"))


def _spent(data: str, unit: str, epsilon: float, privacy: "Privacy") -> str:
    most = "no limit is set" if privacy.max_epsilon is None else f"of {privacy.max_epsilon:g}"
    return f"{data}, unit {unit}: ε {epsilon:.4g} {most}, at δ {privacy.delta:g}"


def _add(table: Table, entries: "list[Entry]", cost: Callable[..., float], delta: float) -> None:
    first = entries[0]
    rounds = len({entry.round for entry in entries})
    said = (first.job, first.submitter, first.org, first.at[:16], entries[-1].at[:16], rounds)
    add_row(table, (*said, f"{cost(entries, delta):.4g}"))
