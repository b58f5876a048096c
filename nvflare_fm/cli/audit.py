"""`nvflare-fm audit` and `nvflare-fm site canaries`: what an adapter tells of a site's rows, measured at the site."""

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
import yaml
from rich.table import Table
from rich.text import Text

from ..errors import ConfigError
from ..untrusted import one_line, printable
from .export import versions
from .terminal import add_row, console, plain

if TYPE_CHECKING:
    from ..site.offer.site_config import SiteConfig

Kit = Annotated[Path, typer.Option("--kit", help="the site's startup kit: the folder that holds startup/ and local/")]


def audit(
    adapter: Annotated[Path, typer.Argument(help="folder of an adapter, such as RESULT/adapters/best")],
    data: Annotated[str, typer.Option(help="alias of a data set of the site; unset: that of the adapter's job")] = "",
    model: Annotated[str, typer.Option(help="alias of the base model; unset: that of the adapter's job")] = "",
    kit: Kit = Path("."),
    rows: Annotated[
        int, typer.Option(min=10, max=100_000, help="most rows to train on, and most rows held out, to measure")
    ] = 500,
    output: Annotated[Path, typer.Option("--output", "-o", help="report to write; must not exist yet")] = Path(
        "audit.html"
    ),
) -> None:
    """Measure what an adapter tells of the rows that it was trained on, and write a report.

    Run it at a site: it reads the site's rows, and the report holds none. It compares rows to train on with the
    validation rows; where nvflare-fm site canaries has planted canaries, it gives a lower bound on ε. Exit status: 1 if
    the canaries contradict the ε that the adapter's job asked for.
    """
    from ..files import write_text
    from ..site.audit import report
    from ..site.audit.measure import audit as measure

    if output.exists():
        raise ConfigError(f"{output} exists already and is not overwritten; choose another", code="output_exists")
    if not output.absolute().parent.is_dir():
        raise ConfigError(f"there is no folder for {output}; make it first", code="no_such_file")
    found = measure(site_of(kit), adapter, data, model, rows)
    known, today = versions(), datetime.now(UTC).date()
    screen = console()
    for part in report.parts(found, known, today):
        screen.print(plain(part.title, style="bold"))
        if part.finding:
            screen.print(plain(part.finding))
        table = Table(show_header=False, show_edge=False)
        for figure in part.figures:
            add_row(table, figure)
        if part.figures:
            screen.print(table)
    write_text(output, report.html(found, known, today))
    typer.echo(one_line(f"wrote {output}; it says what this audit cannot show, too"))
    raise typer.Exit(1 if found.contradicts else 0)


def canaries(
    data: Annotated[str, typer.Option(help="alias of a data set in fm_site.yaml")],
    task: Annotated[str, typer.Option(help="task of the jobs, such as causal_lm")],
    labels: Annotated[str, typer.Option(help="labels of the jobs, separated by commas")] = "",
    model: Annotated[str, typer.Option(help="alias of the base model, for its tokenizer")] = "base",
    max_length: Annotated[int, typer.Option(help="tokens at which the jobs cut a text")] = 512,
    unit: Annotated[
        str, typer.Option(help="the jobs' privacy.unit: row, or a column that says whose a row is")
    ] = "row",
    count: Annotated[int, typer.Option(help="canaries to make, 20 to 5000; about half are trained on")] = 100,
    kit: Kit = Path("."),
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="folder to write; unset: local/fm_canaries/ALIAS in the kit")
    ] = None,
) -> None:
    """Plant canaries in a data set: made-up rows that show, after training, how much an adapter leaks.

    The command writes the data set anew, with about half of the canaries among its training rows, and a secret record
    of which. It prints the lines for fm_site.yaml. After a job has trained on them, run nvflare-fm audit. The more
    canaries, the larger the ε that they can show: 100 show up to 3.2, and 1000 up to 5.5.
    """
    from ..config import RoundPlan
    from ..privacy.audit.one_run import ceiling
    from ..site.audit.canaries import FOLDER, TRAIN, VALIDATION, plant

    known = [label.strip() for label in labels.split(",") if label.strip()]
    asked = {"task": task, "labels": known, "model": model, "data": data, "max_length": max_length}
    plan, site = RoundPlan.read(asked | {"privacy": {"unit": unit}}, "nvflare-fm site canaries"), site_of(kit)
    site.data_set(data)  # of a wrong alias no folder is made
    made = plant(site, plan, count, output or kit / "local" / FOLDER / data)
    folder = made.folder.absolute()
    screen = console()
    screen.print(
        plain(
            f"{made.rows} rows to train on and about half of {made.canaries} canaries, {made.held_out} rows held out; "
            f"the canaries can show an ε of up to {ceiling(made.canaries, plan.privacy.delta):.1f}"
        )
    )
    screen.print("\nFor the site file, in place of the data set's lines, until the job has trained on them:\n")
    lines = {"data": {data: {"train": str(folder / TRAIN), "validation": str(folder / VALIDATION)}}}
    for line in yaml.safe_dump(lines, sort_keys=False, allow_unicode=True, width=10_000).splitlines():
        screen.print(Text(printable(line, longest=5000)), soft_wrap=True)


def site_of(kit: Path) -> "SiteConfig":
    """The site file of a startup kit.

    Raises:
        ConfigError: `no_site_file`; it cannot be read.
    """
    from ..site.offer.site_config import FILE_NAME, load_site

    file = kit / "local" / FILE_NAME
    if not file.is_file():
        raise ConfigError(
            f"there is no {file}; name the site's startup kit with --kit, or make the file with nvflare-fm site allow",
            code="no_site_file",
        )
    return load_site(file)
