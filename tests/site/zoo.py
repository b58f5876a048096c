"""Tiny random models of twelve families, made from transformers' own configurations, over one tokenizer."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    DebertaV2Config,
    DistilBertConfig,
    FalconConfig,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    MistralConfig,
    ModernBertConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen3Config,
    RobertaConfig,
)

from tests.site import tiny

_WIDTHS = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
_ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_COMMON = _WIDTHS | _ENDS | {"max_position_embeddings": 64, "initializer_range": 0.2}
_STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # what is measured twice must be the same
_GROUPED = {"num_key_value_heads": 2}
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.2}
_DISTIL = {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 64, "pad_token_id": 0}
_DISTIL |= {"dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0, "initializer_range": 0.2}
_WINDOW = {"global_attn_every_n_layers": 2, "local_attention": 16, "cls_token_id": 1, "sep_token_id": 2}

DECODERS: dict[str, Callable[[int], PreTrainedConfig]] = {
    "gpt2": lambda n: GPT2Config(vocab_size=n, **_GPT2, bos_token_id=1, eos_token_id=2),
    "gpt_neox": lambda n: GPTNeoXConfig(vocab_size=n, **_COMMON),
    "falcon": lambda n: FalconConfig(vocab_size=n, ffn_hidden_size=48, **_COMMON),
    "phi3": lambda n: Phi3Config(vocab_size=n, **_COMMON, **_GROUPED),
    "qwen3": lambda n: Qwen3Config(vocab_size=n, head_dim=8, **_COMMON, **_GROUPED),
    "gemma3": lambda n: Gemma3TextConfig(vocab_size=n, head_dim=8, sliding_window=32, **_COMMON, **_GROUPED),
    "mistral": lambda n: MistralConfig(vocab_size=n, **_COMMON, **_GROUPED),
}
ENCODERS: dict[str, Callable[[int], PreTrainedConfig]] = {
    "bert": lambda n: BertConfig(vocab_size=n, **_COMMON, **_STILL),
    "distilbert": lambda n: DistilBertConfig(vocab_size=n, **_DISTIL),
    "roberta": lambda n: RobertaConfig(vocab_size=n, **_COMMON | {"max_position_embeddings": 65}, **_STILL),
    "deberta": lambda n: DebertaV2Config(vocab_size=n, **_COMMON, **_STILL, relative_attention=True),
    "modernbert": lambda n: ModernBertConfig(vocab_size=n, **_COMMON, **_WINDOW),
}
FAMILIES = DECODERS | ENCODERS
HEADS = {"sequence_classification": "SequenceClassification", "token_classification": "TokenClassification"}
_NO_SUCH_HEAD = {("gemma3", "token_classification")}  # in transformers


def tasks(family: str) -> list[str]:
    """Those that transformers has a head for."""
    possible = ["causal_lm", *HEADS] if family in DECODERS else [*HEADS]
    return [task for task in possible if (family, task) not in _NO_SUCH_HEAD]


def save(folder: Path, family: str) -> Path:
    """A folder as a site would offer it: decoders with their language model's head, encoders bare."""
    torch.manual_seed(0)
    words = tiny.tokenizer()
    kind = AutoModelForCausalLM if family in DECODERS else AutoModel
    kind.from_config(FAMILIES[family](len(words))).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def plain(folder: Path, task: str, **more: Any) -> Any:
    """The base model as somebody without this package loads it."""
    head = HEADS.get(task)
    kind = getattr(transformers, f"AutoModelFor{head or 'CausalLM'}")
    labels = {"num_labels": len(tiny.LABELS)} if head else {}
    return kind.from_pretrained(folder, **labels, **more)
