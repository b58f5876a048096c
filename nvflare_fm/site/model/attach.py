"""Putting an adapter on a base model and taking its values off again: what all PEFT methods share.

PEFT's own functions do the naming, so that what is read here is what `PeftModel.from_pretrained` reads.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from peft import get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

from ...adapter import BaseClass, own_class
from ...config import Factors
from ...errors import ConfigError, WireError
from ...job.peft.head import NO_LAYER
from ...registry import nearest
from ..check.probe import stacked
from ..training.memory import ran_out

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

    from .base_model import BaseModel

LOCAL, REST = "local", "rest"  # the trained adapter, and the frozen directions beside it
PREFIX = "base_model.model."  # that PEFT puts before the name of each of a model's modules


def wrap(base: "BaseModel", config: "PeftConfig", seed: int) -> "PeftModel":
    """The base model with a trainable adapter in float32, its fresh heads made from `seed`.

    Raises:
        ConfigError: the settings do not fit this model, for example no module is called as `target_modules` says.
    """
    _check_known(base.model, config)
    _keep_reached(base, config)
    try:
        model = get_peft_model(base.model, config, adapter_name=LOCAL)
    except (ValueError, TypeError, KeyError, AttributeError, NotImplementedError) as error:
        raise ConfigError(
            "peft: PEFT cannot put this adapter on the base model; choose other target_modules or another method",
            str(error),
            code="not_adaptable",
        ) from None
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
            _fill_fresh(name, parameter, base, seed)
    _check_heads(model, base)
    return model


def _check_known(model: nn.Module, config: "PeftConfig") -> None:
    """Holds the names in the settings against the model's modules. target_modules may name those of several
    architectures.

    Raises:
        ConfigError: none of them is there, or one of those to be trained whole is not.
    """
    names = [f".{name}" for name, _ in model.named_modules()]
    for setting in ("target_modules", "feedforward_modules", "modules_to_save"):
        asked = getattr(config, setting, None) or ()
        if isinstance(asked, str):  # all-linear
            continue
        known = [end for end in asked if any(name.endswith(f".{end}") for name in names)]
        if len(known) < len(asked) and (setting == "modules_to_save" or not known):
            unknown = next(end for end in asked if end not in known)
            hint = nearest(unknown, sorted({name.rpartition(".")[2] for name in names}))
            raise ConfigError(
                f"peft.{setting} names what is no module of the base model; {hint}give ends of its modules' names",
                repr(unknown),
                code="no_such_module",
            )


def _keep_reached(base: "BaseModel", config: "PeftConfig") -> None:
    """Leaves out what no text goes through.

    Raises:
        ConfigError: not all that a text goes through can be adapted, and the plan does not say which it wants.
    """
    if getattr(config, "target_modules", None) == "all-linear" and (beyond := stacked(base.model, base.unreached)):
        raise ConfigError(
            f"the base model keeps weights of several layers in one tensor ({beyond[0]}), and all-linear does not "
            "reach them; name target_modules, such as q_proj, and only those are adapted",
            code="experts_not_adapted",
        )
    if base.unreached and hasattr(config, "exclude_modules") and config.target_modules != NO_LAYER:
        config.exclude_modules = set(base.unreached)


def trained_modules(model: "PeftModel", heads: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The modules of the base model that are trained whole beside the new `heads`, and those that are trained, whole or
    with factors, though they turn words into vectors or vectors into words.

    Such a module is known by what it is: it holds the numbers of an embedding, or is what the model answers with.
    """
    base = model.get_base_model()
    embeddings = {id(p) for m in base.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    try:
        answers = base.get_output_embeddings()
    except NotImplementedError:  # of a model that answers with no words
        answers = None
    whole, telling = [], []
    for name, module in base.named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            whole += [] if any(f"{name}.".startswith(f"{head}.") for head in heads) else [name]
            original = module.original_module
        elif isinstance(module, BaseTunerLayer):
            original = module.get_base_layer()
        else:
            continue
        if (answers is not None and answers in (module, original)) or any(
            id(p) in embeddings for p in original.parameters()
        ):
            telling.append(name)
    return tuple(whole), tuple(telling)


@torch.inference_mode()
def check_fits(model: "PeftModel", base: "BaseModel") -> None:
    """Tries what PEFT puts before or between a model's layers: not every model takes it.

    Raises:
        ConfigError: a text does not come through.
    """
    if model.device.type == "meta":
        return
    ids = torch.zeros(1, 2, dtype=torch.long, device=model.device)
    try:
        with base.autocast():
            model(input_ids=ids, attention_mask=torch.ones_like(ids))
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, NotImplementedError, RuntimeError) as error:
        if ran_out(error):
            raise
        raise ConfigError(
            f"this base model does not work with PEFT's {model.peft_type.lower()}; use another method, such as lora",
            f"{type(error).__name__}: {error}",
            code="method_does_not_fit",
        ) from None


def _check_heads(model: "PeftModel", base: "BaseModel") -> None:
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not trained:
        raise ConfigError("the PEFT method would train nothing of the base model; use lora", code="nothing_trained")
    for head in base.heads:
        if not any(f".{head}." in name for name in trained):
            raise ConfigError(
                f"PEFT does not train the new layer {head!r} with this method; use lora or ia3", code="head_not_trained"
            )


def _fill_fresh(name: str, parameter: Tensor, base: "BaseModel", seed: int) -> None:
    plain = name.removeprefix(PREFIX).removeprefix("base_model.").replace(f"modules_to_save.{LOCAL}.", "")
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
            "agree?",
            code="adapter_misfit",
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
