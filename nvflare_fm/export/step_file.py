"""What a server's step remembers, as a safetensors file: the mean change so far, and second moments."""

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file

from ..adapter import from_tensors
from ..aggregation.step import Memory
from ..config import Rule
from ..files import MIB, open_file

_CHANGE, _SQUARE = "change.", "square."
_HEADER_LIMIT = 16 * MIB  # 100,000 tensors need 10 MiB


def write_memory(file: Path, step: Rule | None, memory: Memory) -> None:
    """Write what `step` remembers.

    Args:
        step: as the job asked for it; what one step remembers is of no use to another.
    Raises:
        OSError, SafetensorError: the disk is full.
    """
    tensors = {_CHANGE + name: tensor for name, tensor in memory.change.tensors().items()}
    tensors |= {_SQUARE + name: tensor for name, tensor in memory.square.items()}
    said = {"step": json.dumps(step), "scales": json.dumps(memory.change.scales())}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata=said)


def read_memory(file: Path) -> tuple[Rule | None, Memory]:
    """Read what a step remembered, and which.

    Raises:
        OSError, ValueError, SafetensorError, WireError: it is not as `write_memory` writes it.
    """
    check_header(file)
    with safe_open(file, framework="pt") as opened:
        said: dict[str, str] = opened.metadata() or {}
        tensors = opened.get_tensors()
    try:
        step, scales = json.loads(said["step"]), json.loads(said["scales"])
        change = from_tensors(_under(tensors, _CHANGE), {k: float(v) for k, v in scales.items()}, file.name)
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file.name} does not say what it is of: {type(error).__name__}") from None
    return step, Memory(change, _under(tensors, _SQUARE))


def check_header(file: Path) -> None:
    """Check that a safetensors file is a regular file, and its header of a size that costs little to read.

    Raises:
        OSError, ValueError: it is not.
    """
    with open_file(file) as opened:
        size = int.from_bytes(opened.read(8), "little")
    if size > _HEADER_LIMIT:
        raise ValueError(f"{file.name} has a header of {size} bytes, more than {_HEADER_LIMIT}")


def _under(tensors: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
