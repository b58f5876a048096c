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
    job: Annotated[str, typer.Argument(metavar="JOB", help="folder of a result, or, with --kit, the id of a job")],
    kit: Annotated[
        Path | None,
        typer.Option(
            envvar="NVFLARE_STARTUP_KIT_DIR", help="your startup kit; needed to ask the server about the id of a job"
        ),
    ] = None,
) -> None:
    """Show which sites counted in a job, and why others did not.

    The command lists for each site the rounds in which it counted, and gives the site's own reason for the others. JOB
    is a folder that `nvflare job download` or `nvflare-fm simulate` has made, or, with --kit, the id of a job that runs
    or has ended.
    """
    if Path(job).is_dir():
        found = result.read_result(Path(job))
        typer.echo("\n".join(result.explanation(found)))
        return
    if not re.fullmatch(r"[0-9a-f]{8}-[0-9a-f-]{27}", job):
        raise ConfigError(f"{job!r} is neither a folder nor the id of a job", code="no_such_result")
    if kit is None:
        raise ConfigError("to ask the server about a job, say where your startup kit is: --kit", code="no_kit")
    from ..flare.lead import fetch

    with tempfile.TemporaryDirectory() as folder:
        told = fetch(job, kit, Path(folder))
        if isinstance(told, Path):
            typer.echo("\n".join(result.explanation(result.read_result(told))))
        else:
            typer.echo("\n".join(one_line(f"{name}: {value}") for name, value in told.items()))
