"""An adapter as a standard PEFT folder: what `PeftModel.from_pretrained` loads, and a later job continues from.

`adapter_config.json` and `adapter_model.safetensors` are PEFT's own formats; `provenance.json` beside them says which
base model, task and round the adapter belongs to, and `server_step.safetensors` what the server's step remembers, where
it remembers anything. `SHA256SUMS` tells whether they are as they were written. No site is named in any of them.
"""

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .. import __version__, at_rest
from ..adapter import LORA_A, LORA_B, Adapter, BaseClass, Manifest, from_tensors, own_class
from ..aggregation.step import Memory
from ..config import MANY, Labels, Name, Rule, Settings, TaskPlan
from ..errors import ConfigError, FmError, ModelError, WireError
from ..files import read_object
from .peft_config import adapter_config, exactly
from .step_file import check_header, read_memory, write_memory

log = logging.getLogger(__name__)
CONFIG, WEIGHTS, PROVENANCE = "adapter_config.json", "adapter_model.safetensors", "provenance.json"
STEP = "server_step.safetensors"
NEEDED = (CONFIG, WEIGHTS, PROVENANCE)
FILES = (*NEEDED, STEP, at_rest.SUMS)  # all that an adapter's folder can hold
_PREFIX = "base_model.model."  # of every tensor's name
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Saved:
    """An adapter at rest: what a folder, the global model and a site's submission hold. Not all of it travels: what
    the server step remembers stays in the folder.
    """

    adapter: Adapter
    manifest: Manifest
    round: int | None = None  # of the federation that made it; None: unknown
    plan: TaskPlan | None = None  # it was trained by
    step: Rule | None = None  # the server step, as the job asked for it
    memory: Memory = field(default_factory=Memory)  # what that step remembers after the round


class ProvenanceFile(Settings):
    """The content of `provenance.json`."""

    nvflare_fm: Name
    base: Name
    task: Name
    peft: Name
    labels: Labels = ()
    tokenizer: Name = ""
    chat_template: Name = ""
    round: int | None = Field(None, ge=0, le=MANY)
    plan: TaskPlan | None = None


def write_adapter(folder: Path, saved: Saved) -> Path:
    """Write an adapter as a PEFT folder with its checksums, in place of the one that `folder` holds.

    A reader finds the old adapter or the new one, never half of one, even if the writer is killed.

    Args:
        folder: to write; if it holds an adapter, that is replaced.
        saved: the adapter, what it belongs to and where it comes from.

    Returns:
        `folder`.
    Raises:
        ModelError: the disk is full, or the folder may not be written to; the old adapter is still there.
    """
    try:
        with at_rest.replacing(folder) as beside:
            tensors = {name: tensor.contiguous() for name, tensor in saved.adapter.tensors().items()}
            save_file(tensors, beside / WEIGHTS, metadata={"format": "pt"})
            _dump(beside / CONFIG, adapter_config(saved.adapter, saved.manifest, saved.plan))
            _dump(beside / PROVENANCE, _provenance(saved))
            if saved.memory:
                write_memory(beside / STEP, saved.step, saved.memory)
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"adapter {folder.name!r} cannot be saved: {_reason(error)}; the one before it is still there",
            f"{folder}: {error}",
            code="adapter_not_saved",
        ) from None
    return folder


def read_adapter(folder: Path) -> Saved:
    """Read an adapter's folder after verifying its checksums; its tensors are mapped from the file.

    A folder without checksums, as earlier versions wrote it, is read with a warning in the log.

    Returns:
        The adapter, what it belongs to, and where it comes from.
    Raises:
        ModelError: a file is missing, malformed, too large or not as it was written.
    """
    folder, name = at_rest.standing(folder), folder.name
    try:
        if lacking := [needed for needed in NEEDED if not (folder / needed).exists()]:
            raise ValueError(f"{lacking[0]} is missing")
        _verify(folder, name)
        config = read_object(folder / CONFIG)
        said = ProvenanceFile.read(read_object(folder / PROVENANCE), PROVENANCE)
        adapter = _assembled(_tensors(folder / WEIGHTS), config)
        step, memory = read_memory(folder / STEP) if (folder / STEP).exists() else (None, Memory())
    except (OSError, ValueError, SafetensorError, ConfigError, WireError) as error:
        raise ModelError(
            f"adapter {name!r} cannot be read: {_reason(error)}; it needs {CONFIG}, {WEIGHTS} and {PROVENANCE} as "
            "nvflare_fm writes them",
            f"{folder}: {error}",
            code="adapter_unreadable",
        ) from None
    manifest = Manifest(
        said.base, said.task, said.peft, _base_class(config), said.labels, said.tokenizer, said.chat_template
    )
    return Saved(adapter, manifest, said.round, said.plan, step, memory)


def files_of(folder: Path) -> list[str]:
    """List the files of an adapter's folder: all of them must go with a copy of it."""
    return [name for name in FILES if (folder / name).exists()]


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Map the tensors of a saved adapter from its file, by PEFT's names, after verifying its checksums.

    Raises:
        ModelError: they are not as they were written.
    """
    _verify(folder, folder.name)
    return load_file(folder / WEIGHTS)


def _verify(folder: Path, name: str) -> None:
    found = at_rest.condition(folder, (*NEEDED, STEP))
    if found == "damaged":
        raise ModelError(
            f"adapter {name!r} is damaged: its files are not those that were written; take another copy, or the "
            "adapter of an earlier round",
            str(folder),
            code="adapter_damaged",
        )
    if found == "unrecorded":
        log.warning("adapter %r has no %s: whether it is as it was written is not known", name, at_rest.SUMS)


def _tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, mapped."""
    check_header(file)
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES:
            raise ValueError(f"{name!r} is {tensor.dtype}, where floating-point numbers of 16 bits or more are needed")
    return tensors


def _assembled(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Adapter:
    layers = [
        n.removesuffix(LORA_A) for n in tensors if n.endswith(LORA_A) and n.removesuffix(LORA_A) + LORA_B in tensors
    ]
    for layer in layers:
        a, b = tensors[layer + LORA_A].shape, tensors[layer + LORA_B].shape
        if len(a) != 2 or len(b) != 2 or a[0] != b[1] or not a[0]:
            raise ValueError(f"the factors of {layer!r} are {tuple(a)} and {tuple(b)} and do not make a product")
    scales = {layer: _scale(layer, tensors[layer + LORA_A].shape[0], config) for layer in layers}
    lazy = from_tensors(tensors, scales, "the file")
    return Adapter(dict(lazy.lora), dict(lazy.dense))


def _reason(error: Exception) -> str:
    """What happened, without a path: an operating system's error has one, our own reader's errors have none."""
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    if isinstance(error, FmError):
        return error.message
    return type(error).__name__ if isinstance(error, SafetensorError) else str(error)[:200]


def _base_class(config: Mapping[str, Any]) -> BaseClass:
    """Which class of ours the base model needs, if any; no other class that a file names is ever looked at."""
    said = config.get("auto_mapping")
    return own_class(said.get("parent_library"), said.get("base_model_class")) if isinstance(said, Mapping) else ""


def _scale(layer: str, rank: int, config: Mapping[str, Any]) -> float:
    patterns, module = config.get("alpha_pattern") or {}, layer.removeprefix(_PREFIX)
    alpha = patterns.get(exactly(module), config.get("lora_alpha")) if isinstance(patterns, dict) else None
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise ValueError(f"{CONFIG} gives no lora_alpha for {layer!r}")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _provenance(saved: Saved) -> dict[str, Any]:
    manifest = saved.manifest
    return {
        "nvflare_fm": __version__,
        "base": manifest.base,
        "task": manifest.task,
        "peft": manifest.peft,
        "labels": list(manifest.labels),
        "tokenizer": manifest.tokenizer,
        "chat_template": manifest.chat_template,
        "round": saved.round,
        "plan": saved.plan.model_dump(mode="json") if saved.plan else None,
    }


def _dump(file: Path, values: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
