"""Tiny random models and data made on the spot: a Llama and a BERT with fast tokenizers, rows in every file format."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from nvflare_fm.config import TaskPlan
from nvflare_fm.site.offer.site_config import SiteConfig
from nvflare_fm.site.worker import Worker

LABELS = ("calm", "ill", "well")
OPEN = {
    "min_examples": 1,
    "min_update_rows": 1,
    "min_metric_rows": 1,
    "counts": ["examples", "tokens", "steps", "bad_rows"],
}
LABELS_OF = {"causal_lm": (), "preference": (), "regression": ("age",)}
CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SENTENCES = [f"patient {i} is {LABELS[i % 3]} and walks {'äöü€'[i % 4]} today" for i in range(40)]


def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE with the special tokens of a chat model."""
    special = ["<pad>", "<s>", "</s>", "<end>", "<|user|>", "<|assistant|>", "<|system|>"]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        SENTENCES,
        trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    fast.chat_template = CHAT
    return fast


def save(folder: Path, kind: str = "llama", **sizes: Any) -> Path:
    """A folder as a site would offer it."""
    torch.manual_seed(0)
    words = tokenizer()
    common = {"vocab_size": len(words), "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2} | sizes
    common |= {"num_attention_heads": 4, "pad_token_id": 0, "initializer_range": 0.2, "classifier_dropout": 0.0}
    model: PreTrainedModel
    if kind == "llama":
        model = LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, bos_token_id=1, eos_token_id=2, **common))
    else:
        model = BertModel(BertConfig(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **common))
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def rows(task: str, count: int = 24, shift: int = 0) -> list[dict[str, Any]]:
    chosen = [(i, SENTENCES[(i + shift) % len(SENTENCES)]) for i in range(count)]
    if task == "causal_lm":
        return [{"prompt": f"how is {i}? ", "completion": s} for i, s in chosen]
    if task == "sequence_classification":
        return [{"text": s, "label": LABELS[(i + shift) % 3]} for i, s in chosen]
    if task == "multi_label":
        return [{"text": s, "labels": [x for x in LABELS if x in s or not (i + shift) % 2]} for i, s in chosen]
    if task == "regression":
        return [{"text": s, "label": 30.0 + 10 * LABELS.index(s.split()[3])} for _, s in chosen]
    if task == "preference":
        return [{"prompt": f"how is {i}? ", "chosen": s, "rejected": s.replace("walks", "flies")} for i, s in chosen]
    return [{"tokens": s.split(), "labels": [w if w in LABELS else "calm" for w in s.split()]} for _, s in chosen]


def jsonl(file: Path, lines: list[dict[str, Any]]) -> Path:
    part = file.with_name(f"{file.name}.{os.getpid()}")  # several processes of a site may write the same rows
    part.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return part.replace(file)


def site(model: Path, train: Path, **more: Any) -> SiteConfig:
    """A site with few rows that tells all it counts, unless `privacy` says otherwise."""
    values = {"models": {"base": {"path": str(model)}}, "data": {"notes": {"train": str(train)}}} | more
    return SiteConfig.read(values | {"privacy": OPEN | more.get("privacy", {})}, "test")


def worker(folder: Path, model: Path, task: str, name: str = "site-1", shift: int = 0, **more: Any) -> Worker:
    """A site that is measured on the rows it trains on."""
    file = str(jsonl(folder / f"{name}-{task}.jsonl", rows(task, shift=shift)))
    return Worker(name, site(model, Path(file), data={"notes": {"train": file, "validation": file}}), **more)


def plan(task: str = "causal_lm", **more: Any) -> TaskPlan:
    values: dict[str, Any] = {
        "task": task,
        "quantization": "fp32",
        "labels": LABELS_OF.get(task, LABELS),
        "max_length": 48,
        "peft": {"method": "lora", "rank": 4, "lora_alpha": 8},
        "training": {"local_steps": 3, "batch_size": 4, "learning_rate": 1e-2},
    }
    return TaskPlan.read(values | more, "test")
