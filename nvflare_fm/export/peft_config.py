"""PEFT's `adapter_config.json`, written from what an adapter's tensors are called and how they are shaped.

No site's word is needed for it, so none is taken: no pattern that PEFT would match, no class that it would import.
"""

import re
from collections.abc import Mapping
from typing import Any

from ..adapter import LORA_A, LORA_B, Adapter, Manifest
from ..config import RoundPlan
from ..job import peft
from ..job.peft.head import NO_LAYER
from ..job.peft.vera import PROJECTION_PRNG_KEY
from ..job.tasks import TASKS

_PREFIX, _IA3, _MAGNITUDE, _PROMPT = "base_model.model.", ".ia3_l", ".lora_magnitude_vector", "prompt_embeddings"
_VERA_B, _VERA_D = ".vera_lambda_b", ".vera_lambda_d"


def adapter_config(adapter: Adapter, manifest: Manifest, plan: RoundPlan | None = None) -> dict[str, Any]:
    """PEFT's configuration of `adapter`, for `PeftModel.from_pretrained`.

    Args:
        plan: that it was trained by; its own lists of modules are used where they fit the tensors.

    Returns:
        Plain JSON. Of pairs: the rank and α that make α/r each pair's own scale.
    """
    settings: Mapping[str, Any] = plan.peft if plan else {}
    method = peft.registry[manifest.peft] if manifest.peft in set(peft.registry) else None
    if method and not method.adapts:
        own = _whole(adapter, settings)
    elif adapter.lora or any(_is_lora(name) for name in adapter.dense):
        own = _lora(adapter, settings)
    elif any(name.endswith(_IA3) for name in adapter.dense):
        own = _ia3(adapter)
    elif any(name.endswith(_VERA_D) for name in adapter.dense):
        own = _vera(adapter, settings)
    else:
        own = _prompt(adapter)
    return own | {
        "peft_type": method.peft_type if method else manifest.peft.upper(),
        "task_type": TASKS[manifest.task].peft_type if manifest.task in TASKS else None,
        "auto_mapping": _auto_mapping(manifest.base_class),
        "base_model_name_or_path": None,
        "inference_mode": True,
    }


def _lora(adapter: Adapter, settings: Mapping[str, Any]) -> dict[str, Any]:
    found = adapter.descriptions()
    shared = [
        name.removesuffix(LORA_A) for name in adapter.dense if name.endswith(LORA_A)
    ]  # whose B stays at the sites
    scales = {**dict.fromkeys(shared, _scale(settings)), **adapter.scales()}
    ranks = {_module(layer): found[layer + LORA_A].shape[0] for layer in scales}
    alphas = {_module(layer): scale * ranks[_module(layer)] for layer, scale in scales.items()}
    rank, alpha = _usual(ranks), _usual(alphas)
    return {
        "r": int(rank),
        "lora_alpha": _short(alpha),
        "use_rslora": False,  # α/√r with rsLoRA: the scale is already the right one
        "use_dora": any(_MAGNITUDE in name for name in adapter.dense),
        "lora_dropout": float(settings.get("lora_dropout", 0.0)),
        "rank_pattern": {exactly(m): r for m, r in ranks.items() if r != rank},
        "alpha_pattern": {exactly(m): _short(a) for m, a in alphas.items() if a != alpha},
        "target_modules": _targets(settings.get("target_modules"), list(ranks)),
        "modules_to_save": _trained_whole(adapter, settings),
    }


def _scale(settings: Mapping[str, Any]) -> float:
    """α/r, or α/√r with rsLoRA, of the pairs that a plan asks for; 1 where it says nothing of them."""
    if "lora_alpha" not in settings or "rank" not in settings:
        return 1.0
    rank = float(settings["rank"])
    return float(settings["lora_alpha"]) / (rank**0.5 if settings.get("use_rslora") else rank)


def _ia3(adapter: Adapter) -> dict[str, Any]:
    found = {_module(n.removesuffix(_IA3)): t for n, t in adapter.descriptions().items() if n.endswith(_IA3)}
    return {
        "target_modules": sorted(found),
        "feedforward_modules": sorted(m for m, t in found.items() if t.shape[0] == 1),  # they scale what goes in
        "modules_to_save": _trained_whole(adapter, {}),
    }


def _vera(adapter: Adapter, settings: Mapping[str, Any]) -> dict[str, Any]:
    found = {_module(n.removesuffix(_VERA_D)): t for n, t in adapter.descriptions().items() if n.endswith(_VERA_D)}
    return {
        "r": max(t.shape[0] for t in found.values()),
        "vera_dropout": float(settings.get("vera_dropout", 0.0)),
        "projection_prng_key": PROJECTION_PRNG_KEY,
        "save_projection": False,
        "target_modules": _targets(settings.get("target_modules"), sorted(found)),
        "modules_to_save": _trained_whole(adapter, settings),
    }


def _whole(adapter: Adapter, settings: Mapping[str, Any]) -> dict[str, Any]:
    """No layer with factors: modules trained whole alone, as the plan calls them, others in full."""
    modules = {_module(name).rpartition(".")[0] for name in adapter.dense}
    listed = {end for end in settings.get("modules_to_save", ()) if any(f".{end}." in f".{m}." for m in modules)}
    others = {module for module in modules if not any(f".{end}." in f".{module}." for end in listed)}
    return {"target_modules": NO_LAYER, "modules_to_save": sorted(filter(None, listed | others))}


def _prompt(adapter: Adapter) -> dict[str, Any]:
    """The rest PEFT reads from the base model."""
    found = adapter.descriptions()
    return {"num_virtual_tokens": found[_PROMPT].shape[0]} if _PROMPT in found else {}


def _auto_mapping(base_class: str) -> dict[str, str] | None:
    library, _, name = base_class.rpartition(".")
    return {"base_model_class": name, "parent_library": library} if name else None


def _trained_whole(adapter: Adapter, settings: Mapping[str, Any]) -> list[str] | None:
    """The modules that are trained beside factors: as the plan calls them, a head by its name, others in full."""
    own = {n for n in adapter.dense if _is_lora(n) or n.endswith((_IA3, _VERA_B, _VERA_D))}
    tensors = [_module(n) for n in adapter.dense if n not in own]
    adapted = {_module(n).split(".")[0] for n in [*adapter.lora, *own]}
    modules = set()
    for tensor in tensors:
        listed = [end for end in settings.get("modules_to_save", ()) if f".{end}." in f".{tensor}"]
        top, module = tensor.split(".")[0], tensor.rpartition(".")[0]
        modules |= {*listed} or {module if top in adapted else top}
    return sorted(filter(None, modules)) or None


def _is_lora(name: str) -> bool:
    return name.endswith((LORA_A, LORA_B)) or _MAGNITUDE in name


def _targets(listed: Any, modules: list[str]) -> list[str]:
    """The plan's own target_modules where they cover every layer of the adapter, else each layer by its full name."""
    covering = isinstance(listed, list | tuple) and all(
        any(f".{m}".endswith(f".{end}") for end in listed) for m in modules
    )
    return [*listed] if covering else modules


def _usual(values: Mapping[str, float]) -> float:
    return max(sorted(values.values()), key=list(values.values()).count)


def exactly(module: str) -> str:
    """As a key of rank_pattern, which PEFT matches as a regular expression at the end of a module's name."""
    return "^" + re.escape(module)


def _module(layer: str) -> str:
    return layer.removeprefix(_PREFIX)


def _short(alpha: float) -> float | int:
    return int(alpha) if alpha == int(alpha) else alpha
