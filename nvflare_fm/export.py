"""An adapter as a standard PEFT folder: what `PeftModel.from_pretrained` loads, and a later job continues from.

`adapter_config.json` and `adapter_model.safetensors` are PEFT's own formats; `provenance.json` beside them says which
base model, task and round the adapter belongs to. No site is named in it.
"""

import json
import math
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from . import __version__
from .adapter import LORA_A, LORA_B, Adapter, BaseClass, Manifest, from_tensors, own_class
from .config import RoundPlan
from .errors import ModelError
from .peft_config import adapter_config

CONFIG, WEIGHTS, PROVENANCE = "adapter_config.json", "adapter_model.safetensors", "provenance.json"
_PREFIX = "base_model.model."  # of every tensor's name


@dataclass(frozen=True)
class Provenance:
    """Where an adapter comes from, beside what its manifest says."""

    round: int | None = None  # of the federation that made it; None: unknown
    plan: RoundPlan | None = None


def write_adapter(folder: Path, adapter: Adapter, manifest: Manifest, provenance: Provenance = Provenance()) -> Path:
    """Writes beside `folder`, then renames: a reader finds the old adapter or the new one, never a half of one."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        tensors = {name: tensor.contiguous() for name, tensor in adapter.tensors().items()}
        save_file(tensors, beside / WEIGHTS, metadata={"format": "pt"})
        _dump(beside / CONFIG, adapter_config(adapter, manifest, provenance.plan))
        _dump(beside / PROVENANCE, _provenance(manifest, provenance))
        beside.chmod(0o755)  # mkdtemp's 0700 would hide the result from the user's group
        old = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        beside.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    return folder


def read_adapter(folder: Path) -> tuple[Adapter, Manifest, Provenance]:
    """
    Raises:
        ModelError: a file is missing or malformed.
    """
    try:
        config = json.loads((folder / CONFIG).read_text())
        told = json.loads((folder / PROVENANCE).read_text())
        tensors = load_file(folder / WEIGHTS)
        manifest = Manifest(told["base"], told["task"], told["peft"], _base_class(config), tuple(told["labels"]))
        plan = RoundPlan.read(told["plan"], PROVENANCE) if told.get("plan") else None
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ModelError(
            f"adapter {folder.name!r} cannot be read: {type(error).__name__}; it needs {CONFIG}, {WEIGHTS} and "
            f"{PROVENANCE} as nvflare_fm writes them",
            f"{folder}: {error}",
        ) from None
    layers = [
        n.removesuffix(LORA_A) for n in tensors if n.endswith(LORA_A) and n.removesuffix(LORA_A) + LORA_B in tensors
    ]
    scales = {layer: _scale(layer, tensors[layer + LORA_A].shape[0], config) for layer in layers}
    lazy = from_tensors(tensors, scales, f"adapter {folder.name!r}")
    adapter = Adapter(dict(lazy.lora), dict(lazy.dense))
    return adapter, manifest, Provenance(told.get("round"), plan)


def _base_class(config: Mapping[str, Any]) -> BaseClass:
    """Which class of ours the base model needs, if any; no other class that a file names is ever looked at."""
    said = config.get("auto_mapping")
    return own_class(said.get("parent_library"), said.get("base_model_class")) if isinstance(said, Mapping) else ""


def _scale(layer: str, rank: int, config: Mapping[str, Any]) -> float:
    patterns = config.get("alpha_pattern") or {}
    module = layer.removeprefix(_PREFIX)
    found = [a for pattern, a in patterns.items() if re.match(rf"(.*\.)?({pattern})$", module)]
    alpha = float(found[0] if found else config["lora_alpha"])
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _provenance(manifest: Manifest, provenance: Provenance) -> dict[str, Any]:
    return {
        "nvflare_fm": __version__,
        "base": manifest.base,
        "task": manifest.task,
        "peft": manifest.peft,
        "labels": list(manifest.labels),
        "round": provenance.round,
        "plan": provenance.plan.model_dump(mode="json") if provenance.plan else None,
    }


def _dump(file: Path, values: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
