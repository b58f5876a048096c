"""What a plan makes of a base model, without its weights: which layers are quantized and which get an adapter.

The model is built on torch's meta device and PEFT puts its adapter there, so no rule about names is repeated here.
"""

import warnings
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from ...adapter import LORA_A, LORA_B
from ...config import RoundPlan
from ...errors import FmError, ModelError
from ...job import peft
from ...job.cost import AdapterShape, BaseShape
from ..check.probe import TOKENS, check_length, positions, stacked, unreached
from ..peft_methods import attachment_of
from ..tasks import registry as tasks
from ..training.logits import find_backbone
from .attach import LOCAL, PREFIX, trained_modules, wrap
from .base_model import BaseModel, check_head, compute_dtype, load_tokenizer, parts_on_top


def shapes(folder: Path, plan: RoundPlan) -> tuple[BaseShape, AdapterShape]:
    """What the plan makes of the base model, and what of it is trained.

    Args:
        folder: with the base model's config.json. A layer that its weights lack, which is rare, is not noticed here.

    Raises:
        ModelError: transformers cannot build a model from it.
        ConfigError: PEFT cannot put the plan's adapter on it, or texts may be too long for it.
    """
    decisive = {"task", "labels", "peft", "quantization", "double_quant", "compute_dtype"}
    base, adapter = _shapes(folder, plan.model_dump_json(include=decisive))
    check_length(base.positions, plan.max_length, peft.read(plan.peft).virtual_tokens)
    return base, adapter


@lru_cache(maxsize=32)
def _shapes(folder: Path, asked: str) -> tuple[BaseShape, AdapterShape]:
    plan = RoundPlan.model_validate_json(asked)
    warnings.filterwarnings("ignore", category=FutureWarning)  # transformers' and PEFT's to each other
    task, attachment = tasks[plan.task], attachment_of(plan.peft)
    config, model = _built(folder, plan)
    if any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        load_tokenizer(folder)  # is refused where it is not the model's
    on_top = parts_on_top(model)
    skipped = {*on_top, *attachment.method.trained_whole}
    linear = [
        module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and not any(f".{part}." in f".{name}." for part in skipped)
    ]
    numbers, beside, text = sum(each.weight.numel() for each in linear), unreached(model), config.get_text_config()
    fans_out = [each.weight.shape[isinstance(each, Conv1D)] for each in linear]
    depth = _number(text, "num_hidden_layers", "n_layer")
    base = BaseShape(
        quantized=numbers,
        rows=sum(each.weight.shape[0] for each in linear),
        kept=sum(p.numel() for p in model.parameters()) - numbers,
        depth=depth,
        hidden=_number(text, "hidden_size", "n_embd", "d_model"),
        inner=max(fans_out, default=0) * fans_out.count(max(fans_out, default=0)) // max(1, depth),
        heads=_number(text, "num_attention_heads", "n_head") if _drops_scores(text) else 0,
        answers=len(plan.labels) or _number(text, "vocab_size"),
        positions=positions(model, beside),
        context=_number(text, "max_position_embeddings"),
        stacked=sum(p.numel() for name in stacked(model, beside) for p in model.get_submodule(name).parameters()),
        head_is_apart=task.promises.learns_text and find_backbone(model, list(range(TOKENS))) is not None,
    )
    heads = () if task.promises.learns_text else tuple(sorted(on_top))
    dtype = compute_dtype(plan.compute_dtype, plan.quantization, base.hidden)
    tokenizer: PreTrainedTokenizerBase = None  # type: ignore[assignment]  # no method asks for it
    lent = BaseModel(model, tokenizer, task, "", plan.quantization, dtype, heads, frozenset(), beside)
    with torch.device("meta"):
        wrapped = wrap(lent, attachment.config(lent), plan.seed)
    whole, embeddings = trained_modules(wrapped, heads)
    own = {name: parameter for name, parameter in wrapped.named_parameters() if parameter.requires_grad}
    saved = {name.replace(f".{LOCAL}.", "."): parameter for name, parameter in own.items()}  # as in PEFT's file
    below = any(name.removeprefix(PREFIX).split(".")[0] not in on_top for name in own)
    return base, replace(adapter_shape(saved), whole=whole, embeddings=embeddings, below=below)


def adapter_shape(tensors: dict[str, torch.Tensor]) -> AdapterShape:
    """Of an adapter's tensors under PEFT's saved names."""
    layers = sorted(name.removesuffix(LORA_A) for name in tensors if name.endswith(LORA_A))
    sizes = {n: (tensors[n + LORA_B].shape[0], tensors[n + LORA_A].shape[1]) for n in layers}
    return AdapterShape(sizes, tuple(t.numel() for n, t in tensors.items() if not n.endswith((LORA_A, LORA_B))))


def _built(folder: Path, plan: RoundPlan) -> tuple[Any, Any]:
    task = tasks[plan.task]
    if not (folder / "config.json").is_file():
        raise ModelError("the base model's folder has no config.json; check its path", str(folder), code="no_config")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        for name, value in task.model_config(plan).items():
            setattr(config, name, value)
        kind = task.model_class(folder)
        check_head(kind, config, plan.task)
        with torch.device("meta"):
            return config, kind.from_config(config, trust_remote_code=False)
    except FmError:
        raise
    except Exception as error:  # a folder may hold anything, and transformers lets it raise anything
        raise ModelError(
            f"no {plan.task} model can be made from the folder's config.json; is it a model that transformers knows "
            "without remote code?",
            f"{folder}: {error}",
            code="model_unloadable",
        ) from None


def _number(config: Any, *names: str) -> int:
    return next((int(value) for name in names if (value := getattr(config, name, None))), 0)


def _drops_scores(config: Any) -> bool:
    return any(getattr(config, name, 0) for name in ("attention_probs_dropout_prob", "attention_dropout", "attn_pdrop"))
