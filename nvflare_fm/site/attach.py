"""Putting an adapter on a base model and taking its values off again: what all PEFT methods share.

PEFT's own functions do the naming, so that what is read here is what `PeftModel.from_pretrained` reads.
"""

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from peft import get_peft_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor

from ..adapter import BaseClass, own_class
from ..config import Factors
from ..errors import ConfigError, WireError

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

    from .base_model import BaseModel

LOCAL, REST = "local", "rest"  # the trained adapter, and the frozen directions beside it


def wrap(base: "BaseModel", config: "PeftConfig", seed: int) -> "PeftModel":
    """The base model with a trainable adapter in float32, its fresh heads made from `seed`.

    Raises:
        ConfigError: the settings do not fit this model, for example no module is called as `target_modules` says.
    """
    try:
        model = get_peft_model(base.model, config, adapter_name=LOCAL)
    except (ValueError, TypeError, KeyError, AttributeError, NotImplementedError) as error:
        raise ConfigError(f"PEFT cannot put this adapter on base model: {error}") from None
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
            _fill_fresh(name, parameter, base, seed)
    _check_heads(model, base)
    return model


def _check_heads(model: "PeftModel", base: "BaseModel") -> None:
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    for head in base.heads:
        if not any(f".{head}." in name for name in trained):
            raise ConfigError(f"PEFT does not train the new layer {head!r} with this method; use lora or ia3")


def _fill_fresh(name: str, parameter: Tensor, base: "BaseModel", seed: int) -> None:
    plain = name.removeprefix("base_model.model.").removeprefix("base_model.").replace(f"modules_to_save.{LOCAL}.", "")
    if plain not in base.fresh:
        return
    with torch.no_grad():
        if parameter.ndim > 1:
            parameter.copy_(seeded_normal(plain, tuple(parameter.shape), _spread(base.model), seed))
        else:
            parameter.fill_(1.0 if plain.endswith("weight") else 0.0)


def fill_prompt(model: "PeftModel", seed: int) -> None:
    """Small seeded values for a learned prompt; PEFT's standard normal ones drown a model's own embeddings."""
    with torch.no_grad():
        for name, parameter in model.prompt_encoder[LOCAL].named_parameters():
            parameter.copy_(seeded_normal(f"prompt/{name}", tuple(parameter.shape), _spread(model), seed))


def _spread(model: Any) -> float:
    return getattr(model.config, "initializer_range", None) or 0.02


def seeded_normal(name: str, shape: tuple[int, ...], std: float, seed: int) -> Tensor:
    """Normal values that depend on the seed and the tensor's name alone, so they are equal at every site."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.empty(shape).normal_(0.0, std, generator=generator)


def tensors(model: "PeftModel", adapter: str = LOCAL) -> dict[str, Tensor]:
    """The adapter's values under PEFT's saved names, copied to the CPU in float32."""
    own = {n: p for n, p in model.named_parameters() if p.requires_grad or f".{LOCAL}." in n or f".{REST}." in n}
    state = get_peft_model_state_dict(model, state_dict=own, adapter_name=adapter, save_embedding_layers=False)
    return {name: tensor.detach().to("cpu", torch.float32, copy=True) for name, tensor in state.items()}


def put(model: "PeftModel", values: Mapping[str, Tensor], adapter: str = LOCAL) -> None:
    """Sets the adapter's values.

    Raises:
        WireError: a tensor is missing, unknown or of another shape.
    """
    mine = {name: tuple(tensor.shape) for name, tensor in tensors(model, adapter).items()}
    theirs = {name: tuple(tensor.shape) for name, tensor in values.items()}
    if differing := sorted(n for n in mine.keys() | theirs.keys() if mine.get(n) != theirs.get(n)):
        name = differing[0]
        raise WireError(
            f"the global adapter does not fit this site's model: {name!r} is {theirs.get(name, 'missing')} there, "
            f"{mine.get(name, 'unknown')} here ({len(differing)} tensors differ); do base model and PEFT settings "
            "agree?"
        )
    set_peft_model_state_dict(model, dict(values), adapter_name=adapter)


def heads(model: "PeftModel", base: "BaseModel") -> list[Tensor]:
    """What is trained of the modules that are trained whole because they are the task's own or new."""
    prefixes = tuple(f".{head}.modules_to_save.{LOCAL}." for head in base.heads)
    return [p for name, p in model.named_parameters() if p.requires_grad and any(prefix in name for prefix in prefixes)]


def freeze(model: "PeftModel", factors: Factors) -> None:
    """Leaves only `factors` of the trained adapter's pairs to be trained."""
    for name, parameter in model.named_parameters():
        if factors != "AB" and f".{LOCAL}." in name and ".lora_" in name:
            parameter.requires_grad_(f".lora_{factors}." in name)


def base_class(model: "PeftModel") -> BaseClass:
    """The class of the base model where it is ours: on transformers' own class the adapter would not do."""
    kind = type(model.get_base_model())
    return own_class(kind.__module__, kind.__qualname__)
