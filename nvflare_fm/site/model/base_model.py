"""A base model in 4, 8, 16 or 32 bits, frozen, loaded once and lent to one adapter at a time.

After QLoRA (arXiv:2305.14314): NF4 with double quantization. Weights are safetensors only and no code comes with them.
"""

import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoTokenizer, BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase

from ...config import RoundPlan
from ...errors import ConfigError, ModelError
from ..check.probe import TOKENS, check_causal, check_ids, counts_from_padding, unreached
from ..data.tokenization import PROBES, chat_template_digest, tokenizer_digest
from ..offer.site_config import ModelSource
from ..tasks import Task
from ..training.logits import find_backbone
from ..training.memory import ran_out
from .fingerprint import fingerprint, model_config, read_config

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_MAY_LACK = 0.1  # of the numbers below a head
_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]  # of a hub repository: weights, tokenizer, no code


@dataclass(frozen=True)
class BaseModel:
    """A frozen base model and what must be known to put an adapter on it."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    task: Task
    fingerprint: str
    quantization: str
    compute_dtype: torch.dtype
    heads: tuple[str, ...]  # modules that are trained whole: the task's head, and whatever the checkpoint lacks
    fresh: frozenset[str]  # parameters the checkpoint lacks; each site makes them from the plan's seed
    unreached: frozenset[str] = frozenset()  # modules that no text goes through
    backbone: nn.Module | None = None  # of a language model: see `logits`
    lock: threading.RLock = field(default_factory=threading.RLock)

    @cached_property
    def tokenization(self) -> dict[str, str]:
        """Digests of what its tokenizer does, by name in a manifest; conversations where the task has any."""
        ids = {"tokenizer": tokenizer_digest(self.tokenizer)}
        if not self.task.promises.learns_text:
            return ids
        return ids | {"chat_template": chat_template_digest(self.tokenizer)}

    def autocast(self) -> AbstractContextManager[Any]:
        """Products in the compute type, the adapter itself in float32."""
        if self.compute_dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.model.device.type, self.compute_dtype)

    @contextmanager
    def lent(self) -> Iterator[PreTrainedModel]:
        """The model, to put an adapter on; afterwards it is bare, frozen and bit for bit as it was, whatever was done.

        PEFT wraps layers in place and leaves hooks; to read an int8 layer's numbers on a CPU, as DoRA does, replaces
        the parameter and drops its scales. So all that a module or a quantized weight holds is put back.
        """
        with self.lock:
            held = [(inner, dict(inner)) for inner in _holders(self.model)]
            try:
                yield self.model
            finally:
                for inner, before in held:  # the same dict: handles of hooks refer to it
                    inner.clear()
                    inner.update(before)
                for trace in ("peft_config", "_hf_peft_config_loaded", "_require_grads_hook", "_require_grads_hooks"):
                    self.model.__dict__.pop(trace, None)
                if self.model.supports_gradient_checkpointing:
                    self.model.gradient_checkpointing_disable()  # its name since transformers 5.0, and until 6
                self.model.requires_grad_(False).eval()


def _holders(model: nn.Module) -> Iterator[dict[Any, Any]]:
    """Where a model's modules keep their children, parameters, buffers and hooks, and 8-bit ones their scales."""
    for module in model.modules():
        yield from (value for value in vars(module).values() if isinstance(value, dict))
        if hasattr(state := getattr(module, "state", None), "SCB"):
            yield vars(state)


def device() -> torch.device:
    """The GPU of this process, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())


def compute_dtype(requested: str, quantization: str, width: int) -> torch.dtype:
    """The type matrix products are computed in.

    Args:
        requested: as in the plan; auto: the type of the weights where they are not quantized, else what is fast here.
        width: the model's hidden size.

    Raises:
        ConfigError: fp16 on a CPU, where there is no gradient scaling.
    """
    if requested == "auto":
        requested = quantization if quantization in DTYPES else _natural(width)
    if requested == "fp16" and device().type == "cpu":
        raise ConfigError("fp16 needs a GPU; ask for bf16 or fp32 on this site", code="needs_gpu")
    return DTYPES[requested]


def _natural(width: int) -> str:
    """bf16 where the hardware multiplies it: other CPUs are 30 times slower in it. On one core with AMX and NF4,
    a step of MiniLM (width 384) takes 0.55 s in bf16 and 0.82 s in fp32, one of stories260k (64) 0.21 s and 0.12 s;
    on one with AVX512-BF16 a step of MiniLM's first two layers takes 0.045 s and 0.089 s.
    """
    if device().type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        multiplies = capabilities.get("amx_bf16", False) or capabilities.get("avx512_bf16", False)
        return "bf16" if width >= 256 and multiplies else "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


_loaded: dict[tuple[Any, ...], BaseModel] = {}
_loading = threading.Lock()


def load(source: ModelSource, plan: RoundPlan, task: Task, trained_whole: tuple[str, ...] = ()) -> BaseModel:
    """The base model a plan asks for, from memory where this process holds it already.

    Args:
        trained_whole: modules that PEFT trains whole and that must stay out of quantization.

    Raises:
        ModelError: no weights, unsafe weights, or not the weights that were pinned.
    """
    key = (source, plan.quantization, plan.double_quant, plan.compute_dtype, plan.task, plan.labels, trained_whole)
    with _loading:
        if key not in _loaded:
            folder = locate(source)
            identity = fingerprint(folder)
            _check_pins(identity, source, plan)  # before memory is taken
            _loaded[key] = _load(folder, identity, plan, task, trained_whole)
        base = _loaded[key]
    _check_pins(base.fingerprint, source, plan)
    return base


def _check_pins(identity: str, source: ModelSource, plan: RoundPlan) -> None:
    for pin, whose in ((source.fingerprint, "site"), (plan.fingerprint, "plan")):
        if pin and pin != identity:
            raise ModelError(
                f"the base model's weights are {identity}, the {whose} pins others; point the alias at the pinned ones",
                f"{whose}: {pin}",
                code="not_the_pinned_weights",
            )


def locate(source: ModelSource) -> Path:
    """The folder of a base model, fetched from the hub first where the site says so; refused where it is unsafe.

    Raises:
        ModelError: the folder lacks a configuration or safetensors weights, or is an adapter or already quantized.
    """
    if bool(source.path) == bool(source.hub_id):
        raise ConfigError("a model at a site needs one of path and hub_id", code="model_source")
    folder = Path(source.path) if source.path else _fetch(source)
    if not (folder / "config.json").is_file():
        raise ModelError(
            "the base model's folder has no config.json; check the alias's path", str(folder), code="no_config"
        )
    if not any(folder.glob("*.safetensors")):
        raise ModelError(
            "the base model has no *.safetensors weights, and pickled weights are never loaded; convert them first",
            str(folder),
            code="no_safetensors",
        )
    if (folder / "adapter_config.json").exists():
        raise ModelError(
            "the base model's folder holds an adapter; offer the model it was trained on",
            str(folder),
            code="model_is_adapter",
        )
    if "quantization_config" in model_config(folder):
        raise ModelError(
            "the base model is quantized already; offer its 16-bit or 32-bit weights",
            str(folder),
            code="model_is_quantized",
        )
    return folder


def _fetch(source: ModelSource) -> Path:
    from huggingface_hub import snapshot_download

    if not source.revision:
        raise ConfigError("a hub_id needs the revision (a commit) the site trusts", code="no_revision")
    try:
        return Path(snapshot_download(source.hub_id, revision=source.revision, allow_patterns=_FILES))
    except Exception as error:  # the hub client raises many kinds; all mean the same to the site
        raise ModelError(
            "the base model cannot be fetched from the hub; fetch it beforehand", str(error), code="hub_failed"
        ) from None


def _load(folder: Path, identity: str, plan: RoundPlan, task: Task, trained_whole: tuple[str, ...]) -> BaseModel:
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        width = getattr(config.get_text_config(), "hidden_size", 0)
        dtype = compute_dtype(plan.compute_dtype, plan.quantization, width)
        tokenizer = load_tokenizer(folder)
        for name, value in task.model_config(plan).items():
            setattr(config, name, value)
        config.pad_token_id, config.use_cache = tokenizer.pad_token_id, False
        model, fresh, heads = _load_weights(folder, config, plan, task, dtype, trained_whole)
    except (OSError, ValueError, KeyError, ImportError, AssertionError) as error:
        if ran_out(error):
            raise
        raise ModelError(
            "the base model cannot be loaded; is it a whole model that transformers knows without remote code?",
            f"{folder}: {error}",
            code="model_unloadable",
        ) from error
    model.requires_grad_(False).eval()
    keep_packing(model)
    beside, backbone = unreached(model), None
    if task.promises.learns_text:
        if tokenizer.eos_token_id is None:
            raise ModelError(
                "the base model's tokenizer has no token that ends a text, so no answer would end; name one as "
                "eos_token in tokenizer_config.json",
                code="no_end_token",
            )
        text = ordinary_ids(tokenizer, TOKENS)
        check_causal(model, text, plan.quantization)
        backbone = find_backbone(model, text)
    known = (identity, plan.quantization, dtype, heads, frozenset(fresh), beside, backbone)
    return BaseModel(model, tokenizer, task, *known)


def _load_weights(
    folder: Path, config: Any, plan: RoundPlan, task: Task, dtype: torch.dtype, trained_whole: tuple[str, ...]
) -> tuple[PreTrainedModel, set[str], tuple[str, ...]]:
    model_class = task.model_class(folder)
    check_head(model_class, config, plan.task)
    with torch.device("meta"):
        bare = model_class.from_config(config, trust_remote_code=False)
    on_top = parts_on_top(bare)
    skipped = {*on_top, *(name for name, _ in bare.named_modules() if _ends(name, trained_whole))}
    while True:
        model, info = model_class.from_pretrained(
            folder,
            config=config,
            dtype=DTYPES.get(plan.quantization, dtype),
            quantization_config=_quantization(plan, dtype, sorted(skipped)),
            device_map={"": device()},
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            ignore_mismatched_sizes=True,  # a head for other labels is a fresh head
            output_loading_info=True,
        )
        _check_fit(bare, info, on_top)
        fresh = {*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])}
        lacking = {name.rpartition(".")[0] for name in fresh}
        if plan.quantization in DTYPES or lacking <= skipped:
            break
        skipped |= lacking  # rare: the checkpoint lacks a layer below the head, which must be trained unquantized too
    if task.promises.learns_text and (headless := sorted(name for name in lacking if name.split(".")[0] in on_top)):
        raise ModelError(
            f"the base model's weights lack a language model's head ({headless[0]}); offer a causal language model, or "
            "ask for a classification task",
            str(folder),
            code="no_language_model_head",
        )
    heads = {*(() if task.promises.learns_text else on_top), *lacking}
    return model, fresh, tuple(sorted(h for h in heads if not any(h.startswith(f"{o}.") for o in heads)))


def _check_fit(bare: PreTrainedModel, info: Mapping[str, Any], on_top: set[str]) -> None:
    """Heads may be new, and a layer or two such as a pooler; more than that, and the weights are another model's.

    Raises:
        ModelError: weights below the head have another shape than config.json says, or are not there.
    """
    below = {name: p.numel() for name, p in bare.named_parameters() if name.split(".")[0] not in on_top}
    unlike = [name for name, *_ in info["mismatched_keys"] if name in below]
    missing = sorted(below.keys() & set(info["missing_keys"]))
    if unlike or sum(below[name] for name in missing) > _MAY_LACK * sum(below.values()):
        name = (unlike or missing)[0]
        raise ModelError(
            f"the base model's weights do not fit its config.json: {name!r} "
            f"{'has another shape' if unlike else 'is not there'}; fetch the model again",
            code="weights_do_not_fit",
        )


def check_head(model_class: Any, config: Any, task: str) -> None:
    """Hold a task against what transformers can build of a kind of model.

    Raises:
        ModelError: transformers has no such head for this kind of model.
    """
    known = getattr(model_class, "_model_mapping", None)  # of transformers' Auto classes; our own take any
    if known is not None and type(config) not in known:
        raise ModelError(
            f"transformers has no {task} model of the base model's kind ({config.model_type}); ask for another task, "
            "or offer another model",
            code="no_such_head",
        )


def parts_on_top(model: PreTrainedModel) -> set[str]:
    """What the task's class puts on top of the backbone: classifier, score, lm_head, pre_classifier, …"""
    parts = {name for name, child in model.named_children() if next(child.parameters(), None) is not None}
    return parts - {model.base_model_prefix}


def _ends(name: str, parts: tuple[str, ...]) -> bool:
    """As PEFT finds modules_to_save; what is inside them is trained with them, so it stays out of quantization too."""
    return any(f".{name}".endswith(f".{part}") for part in parts)


def _quantization(plan: RoundPlan, dtype: torch.dtype, skipped: list[str]) -> BitsAndBytesConfig | None:
    if plan.quantization in DTYPES:
        return None
    if plan.quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=plan.quantization,
        bnb_4bit_use_double_quant=plan.double_quant,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=skipped,
    )


def keep_packing(model: PreTrainedModel) -> None:
    """On CPUs with AVX512-BF16, bitsandbytes 0.50 repacks a 4-bit layer in place when it is first used for inference:
    that fails where the layer's width is no multiple of 32, and would change the weights that others share.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The fast tokenizer of a base model, with a token to pad with.

    Raises:
        ModelError: it cannot be read, is not a fast one, so which characters a token stands for is not known, or is not
            the model's.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True, use_fast=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(
            "the base model's tokenizer cannot be loaded; is the folder a whole model?",
            f"{folder}: {error}",
            code="no_tokenizer",
        ) from None
    if not tokenizer.is_fast:
        raise ModelError(
            "the base model has no fast tokenizer (tokenizer.json); convert it first", str(folder), code="no_tokenizer"
        )
    config = read_config(folder)
    tokenizer.pad_token = _padding(tokenizer, config)
    check_ids(used_ids(tokenizer), vocabulary(config))
    tokenizer.padding_side = "right"
    return tokenizer


def _padding(tokenizer: PreTrainedTokenizerBase, config: Any) -> str:
    """The token to pad with: the tokenizer's, or the model's where positions are counted from it.

    Raises:
        ModelError: there is none.
    """
    token = tokenizer.pad_token or tokenizer.eos_token or tokenizer.unk_token
    models = getattr(config, "pad_token_id", None)
    if models is not None and models != tokenizer.convert_tokens_to_ids(token or "") and counts_from_padding(config):
        token = tokenizer.convert_ids_to_tokens(models)
    if token is None:
        raise ModelError(
            "the base model's tokenizer has no token to pad with; name a pad_token, eos_token or unk_token in "
            "tokenizer_config.json",
            code="no_padding_token",
        )
    return str(token)


def vocabulary(config: Any) -> int | None:
    """How many tokens a model has rows for, by its configuration."""
    return getattr(config.get_text_config(), "vocab_size", None)


def used_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The ids that a tokenizer gives to all kinds of texts, and that we add."""
    added = {i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None}
    return added.union(*(tokenizer(text, verbose=False)["input_ids"] for text in PROBES))


def ordinary_ids(tokenizer: PreTrainedTokenizerBase, count: int) -> list[int]:
    """The first ids that stand for text."""
    special = set(tokenizer.all_special_ids)
    return [i for i in range(len(tokenizer)) if i not in special][:count]
