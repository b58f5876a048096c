"""`nvflare-fm simulate`: any job on one machine, before it goes to real sites."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from ..errors import ConfigError
from ..untrusted import one_line


def simulate(
    job: Annotated[Path, typer.Argument(help="folder of the job")],
    data: Annotated[list[str], typer.Option(metavar="SITE=FILE", help="rows of a site; repeat it for each site")],
    model: Annotated[Path, typer.Option(help="folder of the base model, the same for every site")],
    validation: Annotated[
        list[str], typer.Option(metavar="SITE=FILE", help="validation rows of a site; unset: a tenth of its rows")
    ] = [],  # noqa: B006
    output: Annotated[
        Path, typer.Option("--output", "-o", help="folder in which the result gets a folder of the job's name")
    ] = Path("runs"),
) -> None:
    """Run a job on this machine.

    Example: `nvflare-fm simulate my_job --data north=a.jsonl --data south=b.jsonl --model models/base`

    NVFlare's simulator starts a server and the sites, each as a process. Whatever aliases the job uses for model and
    data, it gets the model and files named here. If the job names its sites, each needs a file.
    """
    from ..flare.jobs.simulate_job import prepare_simulation
    from ..job.synthetic import FILE
    from ..record.result import measurements, read_result
    from ..record.round import in_words

    rows, held_out = _by_site("--data", data), _by_site("--validation", validation)
    asked, run = prepare_simulation(job, model, rows, held_out, output / job.resolve().name)
    started = time.monotonic()
    typer.echo(one_line(f"{asked.name}: {len(rows)} sites ({', '.join(rows)}); they start within a minute"))
    for line in run.run():
        typer.echo("\n".join(in_words(line)))
    found = read_result(run.results)
    typer.echo("".join(f"{line}\n" for line in measurements(found)), nl=False)
    adapters = [("adapter", place) for place in found.adapters.values()]
    adapters += [("personal", place) for place in run.personal.values()]
    chosen = [("chosen", place) for place in [run.results / FILE] if place.exists()]
    for name, place in (*adapters, *chosen, ("results", run.results), ("log", run.log)):
        typer.echo(one_line(f"{name:<8} {place}"))
    typer.echo(f"took     {time.monotonic() - started:.0f} s")


def _by_site(option: str, given: Sequence[str]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for text in given:
        site, _, file = text.partition("=")
        if not (site and file):
            raise ConfigError(
                f"{option} {text!r} names no file for a site; write {option} north=north.jsonl", code="no_file"
            )
        if site in found:
            raise ConfigError(f"{option} names two files for site {site!r}; one is enough", code="two_files")
        found[site] = Path(file)
    return found
