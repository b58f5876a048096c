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
from .adapter import LORA_A, LORA_B, Adapter, Manifest, from_tensors
from .config import RoundPlan
from .errors import ModelError

CONFIG, WEIGHTS, PROVENANCE = "adapter_config.json", "adapter_model.safetensors", "provenance.json"
_PREFIX = "base_model.model."


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
        _dump(beside / CONFIG, adapter_config(adapter, manifest))
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
        told_of = {name: str(told.get(name, "")) for name in ("tokenizer", "chat_template")}
        manifest = Manifest(told["base"], told["task"], told["peft"], config, tuple(told["labels"]), **told_of)
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


def adapter_config(adapter: Adapter, manifest: Manifest) -> dict[str, Any]:
    """PEFT's configuration, with the rank and α that make α/r the merged adapter's own scale in every layer."""
    config = {**manifest.adapter_config, "base_model_name_or_path": None, "inference_mode": True}
    if not adapter.lora:
        return config
    ranks = {_module(layer): adapter.lora[layer].rank for layer in adapter.lora}
    alphas = {_module(layer): adapter.lora[layer].scale * adapter.lora[layer].rank for layer in adapter.lora}
    rank, alpha = _usual(ranks), _usual(alphas)
    return config | {
        "peft_type": "LORA",
        "r": int(rank),
        "lora_alpha": _short(alpha),
        "use_rslora": False,  # α/√r with rsLoRA: the scale is already the right one
        "rank_pattern": {_exactly(m): r for m, r in ranks.items() if r != rank},
        "alpha_pattern": {_exactly(m): _short(a) for m, a in alphas.items() if a != alpha},
        "target_modules": _targets(config.get("target_modules"), list(ranks)),
    }


def _targets(said: Any, modules: list[str]) -> str | list[str]:
    """The sites' own target_modules where they cover every layer of the adapter, else each layer by its full name."""
    if isinstance(said, list) and all(any(f".{m}".endswith(f".{end}") for end in said) for m in modules):
        return said
    return modules


def _usual(values: Mapping[str, float]) -> float:
    return max(sorted(values.values()), key=list(values.values()).count)


def _exactly(module: str) -> str:
    """As a key of rank_pattern, which PEFT matches as a regular expression at the end of a module's name."""
    return "^" + re.escape(module)


def _module(layer: str) -> str:
    return layer.removeprefix(_PREFIX)


def _short(alpha: float) -> float | int:
    return int(alpha) if alpha == int(alpha) else alpha


def _scale(layer: str, rank: int, config: Mapping[str, Any]) -> float:
    patterns = config.get("alpha_pattern") or {}
    found = [a for pattern, a in patterns.items() if re.match(rf"(.*\.)?({pattern})$", _module(layer))]
    alpha = float(found[0] if found else config["lora_alpha"])
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _provenance(manifest: Manifest, provenance: Provenance) -> dict[str, Any]:
    return {
        "nvflare_fm": __version__,
        "base": manifest.base,
        "task": manifest.task,
        "peft": manifest.peft,
        "labels": list(manifest.labels),
        "tokenizer": manifest.tokenizer,
        "chat_template": manifest.chat_template,
        "round": provenance.round,
        "plan": provenance.plan.model_dump(mode="json") if provenance.plan else None,
    }


def _dump(file: Path, values: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
