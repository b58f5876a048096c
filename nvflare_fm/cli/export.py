"""`nvflare-fm export`: an adapter to hand on or to serve, with a card that says where it comes from."""

import json
import shutil
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .. import __version__
from ..errors import ConfigError
from ..untrusted import one_line

if TYPE_CHECKING:
    from ..adapter import Adapter

_SHOWN = ("nvflare", "torch", "transformers", "peft")


def export(
    adapter: Annotated[Path, typer.Argument(help="folder of an adapter, such as RESULT/adapters/best")],
    output: Annotated[Path, typer.Option("--output", "-o", help="folder to write; must not exist yet")],
    base: Annotated[
        str, typer.Option(help="folder of the base model, or its name on the Hugging Face hub; --merge needs a folder")
    ] = "",
    merge: Annotated[bool, typer.Option("--merge", help="write a whole model in 16 bits, ready to serve")] = False,
) -> None:
    """Write an adapter for PEFT, or merged into its base model.

    The command also writes a model card. If ADAPTER is inside the result of its job, the card shows rounds, number of
    sites, merge rule and metrics of that job.
    """
    from ..at_rest import replacing
    from ..export import card
    from ..export.folder import CONFIG, PROVENANCE, WEIGHTS, read_adapter
    from ..export.peft_config import adapter_config
    from ..flare.sealed import is_sealed
    from ..record.round import FILE_NAME, read_rounds

    if output.exists():
        raise ConfigError(f"{output} exists already and is not overwritten; choose another", code="output_exists")
    if is_sealed(adapter):
        raise ConfigError(
            f"{adapter} is encrypted; a site makes a folder of it that can be exported: nvflare-fm decrypt",
            code="sealed",
        )
    here = bool(base) and Path(base).is_dir()
    if merge and not here:
        raise ConfigError("--merge needs the base model's folder: --base FOLDER", code="no_base")
    saved = read_adapter(adapter)
    config = adapter_config(saved.adapter, saved.manifest, saved.plan)
    rounds = adapter.absolute().parent.parent / FILE_NAME
    told = card.Card(
        name=output.name,
        saved=saved,
        made=card.made(read_rounds(rounds) if rounds.is_file() else [], saved.round),
        base=base,
        base_checked=here,
        merged=merge,
        one_rank=not (config.get("rank_pattern") or config.get("alpha_pattern")),
        versions=versions(),
        exported=datetime.now(UTC).date(),
    )
    with replacing(output) as folder:
        if merge:
            from ..site.model.merged import merge as write_merged

            write_merged(adapter, Path(base), saved.adapter, saved.manifest, folder)
        else:
            if here:
                from ..site.model.merged import check_base

                check_base(Path(base), saved.manifest)
            shutil.copyfile(adapter / WEIGHTS, folder / WEIGHTS)
            named = {**config, **_layers(saved.adapter), "base_model_name_or_path": base or None}
            (folder / CONFIG).write_text(json.dumps(named, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        shutil.copyfile(adapter / PROVENANCE, folder / PROVENANCE)
    (output / card.FILE_NAME).write_text(card.render(told), encoding="utf-8")
    typer.echo(one_line(f"wrote {output}; its {card.FILE_NAME} says how to load it and where it comes from"))
    if base and not here:
        typer.echo(one_line(f"there is no folder {base}: its weights were not compared with the adapter's base model"))


def decrypt(
    adapter: Annotated[Path, typer.Argument(help="folder of an encrypted adapter, such as RESULT/adapters/best")],
    output: Annotated[Path, typer.Option("--output", "-o", help="folder to write; must not exist yet")],
    kit: Annotated[Path, typer.Option("--kit", help="the site's startup kit, which holds the key")] = Path("."),
) -> None:
    """Write an adapter that only the sites can read as a PEFT folder, at a site.

    The server of a job that encrypts what sites send keeps its adapters encrypted. Each site writes the last one it
    received by itself, into global_adapter in the job's folder.
    """
    from ..export.folder import write_adapter
    from ..flare.encryption import site_keys
    from ..flare.sealed import read_sealed
    from ..site.model.sealed import unsealed

    if output.exists():
        raise ConfigError(f"{output} exists already and is not overwritten; choose another", code="output_exists")
    saved, keys = read_sealed(adapter), site_keys(kit / "startup")
    if saved.plan is None:
        raise ConfigError(
            "the encrypted adapter does not say how it was trained; take another copy", code="adapter_without_plan"
        )
    write_adapter(output, replace(saved, adapter=unsealed(saved.adapter, keys, saved.plan)))
    typer.echo(one_line(f"wrote {output}, as PEFT loads it; do not give it to the server's operator"))


def _layers(adapter: "Adapter") -> dict[str, list[str]]:
    """Each layer by its full name: PEFT then stops on a class that names them otherwise, where it would only warn."""
    names = [layer.removeprefix("base_model.model.") for layer in sorted(adapter.lora)]
    return {"target_modules": names} if names else {}


def versions() -> dict[str, str]:
    """The packages on which an adapter depends, with their versions here."""
    found = {"nvflare_fm": __version__}
    for name in _SHOWN:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found
