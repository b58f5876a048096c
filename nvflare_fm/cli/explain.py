"""`nvflare-fm explain`: which sites counted in a job, and why the others did not."""

import re
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from ..errors import ConfigError
from ..record import result
from ..untrusted import one_line


def explain(
    job: Annotated[str, typer.Argument(metavar="JOB", help="a result's folder, or the id of a job, with --kit")],
    kit: Annotated[
        Path | None,
        typer.Option(envvar="NVFLARE_STARTUP_KIT_DIR", help="your startup kit, to ask the server about a job's id"),
    ] = None,
) -> None:
    """Tells for each site in which rounds it counted, and why not in the others, in the site's own words.

    JOB is the folder that `nvflare job download` or `nvflare-fm simulate` made, or, with --kit, the id of a job that
    runs or has ended.
    """
    if Path(job).is_dir():
        found = result.read_result(Path(job))
        typer.echo("\n".join(result.explained(found)))
        return
    if not re.fullmatch(r"[0-9a-f]{8}-[0-9a-f-]{27}", job):
        raise ConfigError(f"{job!r} is neither a folder nor the id of a job", code="no_result")
    if kit is None:
        raise ConfigError("to ask the server about a job, say where your startup kit is: --kit", code="no_kit")
    from ..flare.lead import fetch

    with tempfile.TemporaryDirectory() as folder:
        told = fetch(job, kit, Path(folder))
        if isinstance(told, Path):
            typer.echo("\n".join(result.explained(result.read_result(told))))
        else:
            typer.echo("\n".join(one_line(f"{name}: {value}") for name, value in told.items()))
