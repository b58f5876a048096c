"""What the parts train: models with random weights in the shapes of real ones, rows, plans and sites."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import torch

from nvflare_fm.adapter import RoundTask
from nvflare_fm.config import TaskPlan
from nvflare_fm.job.cost import activation_bytes, trained_bytes
from nvflare_fm.site.model import base_model
from nvflare_fm.site.model.base_model import BaseModel
from nvflare_fm.site.model.shapes import shapes
from nvflare_fm.site.offer.site_config import ModelSource, SiteConfig
from nvflare_fm.site.tasks import registry
from nvflare_fm.site.worker import Worker
from tests.gpu.measuring import GIB, TINY, now, on_gpu, say, work
from tests.site import tiny

RANK, RATE = 16, 1e-4
_LLAMA = {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256}
SHAPES: dict[str, dict[str, Any]] = {  # of Llama 3.2 1B and Llama 3 8B
    "1b": _LLAMA | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64},
    "8b": _LLAMA | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "head_dim": 128},
}
_TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16, "vocab_size": 512}
_TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2}
_TINY_LENGTH = 32
_WORDS = ["patient", "walks", "today", "calm", "ill", "well", "and", "is", "sleeps", "eats", "slowly", "again"]
_ALL = {"privacy": tiny.OPEN, "limits": {"memory_gib": 1000.0, "max_rows_per_step": 4096, "max_batch_size": 4096}}


def model(name: str) -> Path:
    """The folder of a model, made where it is not there yet."""
    folder = work() / (f"tiny-{name}" if TINY else name)
    if (folder / "complete").exists():
        return folder
    from transformers import AutoModelForCausalLM, LlamaConfig

    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    sizes = {**(_TINY if TINY else SHAPES[name]), "max_position_embeddings": 8192, "rms_norm_eps": 1e-5}
    torch.manual_seed(0)
    began = now()
    with torch.device("cuda" if on_gpu() else "cpu"):
        config = LlamaConfig(**sizes, **ends, tie_word_embeddings=name == "1b")
        made = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    ready = now()
    made.save_pretrained(folder, max_shard_size="1GB")
    tiny.tokenizer().save_pretrained(folder)
    (folder / "complete").touch()
    say(
        "model", name=name, numbers=sum(p.numel() for p in made.parameters()), made_s=ready - began,
        written_s=now() - ready, gib=sum(f.stat().st_size for f in folder.glob("*.safetensors")) / GIB,
        free_disk_gib=shutil.disk_usage(folder).free / GIB,
    )  # fmt: skip
    return folder


def rows(name: str, count: int, length: int, seed: int) -> str:
    """A file of texts of at least `length` tokens. Their words come from a small vocabulary, so there is something to
    learn.
    """
    chance, file = random.Random(seed), work() / f"{name}-{count}-{length}-{seed}.jsonl"
    texts = [" ".join(chance.choices(_WORDS, weights=range(1, 13), k=length)) for _ in range(count)]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(file)


def plan(quantization: str, batch: int, length: int, steps: int, checkpointing: bool = False, **more: Any) -> TaskPlan:
    """LoRA of rank 16 on all linear layers; nothing is measured unless `more` says so."""
    training = {"local_steps": steps, "batch_size": batch, "learning_rate": RATE}
    training |= {"gradient_checkpointing": checkpointing, **more.pop("training", {})}
    peft = {"method": "lora", "rank": RANK, "lora_alpha": 2 * RANK, **more.pop("peft", {})}
    values = {"quantization": quantization, "max_length": _TINY_LENGTH if TINY else length, "peft": peft}
    values |= {"evaluation": {"before": False, "after": False}} | more
    return TaskPlan.read({**values, "training": training}, "check")


def site(folder: Path, seed: int = 0, count: int = 64, length: int = 2048) -> SiteConfig:
    length = _TINY_LENGTH if TINY else length
    files = {"train": rows("train", count, length, seed), "validation": rows("validation", 16, length, seed)}
    offered = {"models": {"base": {"path": str(folder)}}, "data": {"notes": files}, **_ALL}
    return SiteConfig.read(offered, "check")


def worker(folder: Path, name: str = "site-1", overrides: Any = None, **more: Any) -> Worker:
    return Worker(name, site(folder, **more), overrides)


def loaded(folder: Path, asked: TaskPlan) -> BaseModel:
    return base_model.load(ModelSource(path=str(folder)), asked, registry[asked.task])


def task(asked: TaskPlan) -> RoundTask:
    return RoundTask(asked)


def predicted(folder: Path, asked: TaskPlan) -> dict[str, int]:
    """Bytes, as `nvflare-fm plan` tells them for a training step."""
    base, adapter = shapes(folder, asked)
    trained = trained_bytes(adapter, asked, asked.rank, asked.rank)
    return {"weights": base.size(asked), "trained": trained, "activations": activation_bytes(base, adapter, asked)}
