"""A global adapter that only the sites can read, at rest on the server: the ciphertexts, and what is known of them.

`sealed.json` is the meta of the message in which the adapter travels, and is read as that is.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .. import at_rest
from ..errors import FmError, ModelError
from ..export import folder as export
from ..export.folder import Saved, read_adapter
from ..export.step_file import check_header
from ..files import read_object
from ..transforms.packed import Sealed
from . import wire

WEIGHTS, KNOWN = "ciphertexts.safetensors", "sealed.json"


def is_sealed(folder: Path) -> bool:
    """Whether an adapter's folder holds one that is encrypted."""
    return (at_rest.standing(folder) / KNOWN).is_file()


def write_sealed(folder: Path, params: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Write an encrypted adapter with its checksums, in place of what `folder` holds.

    Args:
        params: of the message in which it travels.
        meta: of the same.

    Raises:
        ModelError: the disk is full, or the folder may not be written to; what was there still is.
    """
    try:
        with at_rest.replacing(folder) as beside:
            save_file({name: tensor.contiguous() for name, tensor in params.items()}, beside / WEIGHTS)
            (beside / KNOWN).write_text(json.dumps({wire.KEY: meta[wire.KEY]}, indent=2) + "\n", encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"adapter {folder.name!r} cannot be saved; the one before it is still there; make room on the disk",
            f"{folder}: {error}",
            code="adapter_not_saved",
        ) from None


def read_sealed(folder: Path) -> Saved:
    """Read an encrypted adapter after verifying its checksums; its ciphertexts are mapped from the file.

    Raises:
        ModelError: a file is missing, malformed or not as it was written.
    """
    folder, name = at_rest.standing(folder), folder.name
    try:
        if at_rest.condition(folder, (WEIGHTS, KNOWN)) != "whole":
            raise ValueError("its files are not those that were written")
        saved = wire.read_saved(sealed_tensors(folder), read_object(folder / KNOWN), "the file")
        if saved is None or not isinstance(saved.adapter, Sealed):
            raise ValueError("it is not encrypted")
    except (OSError, ValueError, SafetensorError, FmError) as error:
        raise ModelError(
            f"encrypted adapter {name!r} cannot be read; take another copy, or that of an earlier round",
            f"{folder}: {error}",
            code="adapter_unreadable",
        ) from None
    return saved


def read_any(folder: Path) -> Saved:
    """Read an adapter's folder, encrypted or not.

    Raises:
        ModelError: it cannot be read, or does not say what it belongs to.
    """
    return read_sealed(folder) if is_sealed(folder) else read_adapter(folder)


def files_of(folder: Path) -> list[str]:
    """List the files of an adapter's folder, encrypted or not: all of them must go with a copy of it."""
    return [WEIGHTS, KNOWN, at_rest.SUMS] if is_sealed(folder) else export.files_of(folder)


def sealed_tensors(folder: Path) -> dict[str, Tensor]:
    """Map the ciphertexts of a saved adapter from its file.

    Raises:
        OSError, ValueError, SafetensorError: they cannot be read.
    """
    check_header(folder / WEIGHTS)
    return load_file(folder / WEIGHTS)
