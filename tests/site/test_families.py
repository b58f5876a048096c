"""Families × tasks × ranks × precisions: two rounds each, then plain PEFT loads the adapter and finds the same loss."""

from collections.abc import Callable
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch.nn.functional import cross_entropy
from transformers import BitsAndBytesConfig

from nvflare_fm.adapter import RoundTask
from nvflare_fm.aggregation.combine import Combined
from nvflare_fm.config import Aggregation, SiteOverrides
from nvflare_fm.export.folder import Saved, write_adapter
from nvflare_fm.export.peft_config import adapter_config
from nvflare_fm.simulate import federate
from nvflare_fm.site.model.base_model import keep_packing
from nvflare_fm.site.tasks import IGNORED, collate, registry
from tests.site import tiny, zoo

RANKS = {"equal": (4, 4), "mixed": (2, 5)}
KINDS = list(product(RANKS, ("nf4", "fp32")))
# A Latin square is never slow: each family meets each task once, another kind of site a task, each task every kind.
CASES = [
    pytest.param(family, task, *kind, marks=() if (f + t - k) % len(KINDS) == 0 else pytest.mark.slow)
    for f, family in enumerate(zoo.FAMILIES)
    for t, task in enumerate(zoo.tasks(family))
    for k, kind in enumerate(KINDS)
]


@pytest.fixture(scope="module")
def offered(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A family's folder, made when it is first asked for."""
    return cache(lambda family: zoo.save(tmp_path_factory.mktemp(family), family))


@pytest.mark.parametrize(("family", "task", "ranks", "quantization"), CASES)
def test_every_family_learns_every_task_and_plain_peft_finds_the_same_loss(
    offered: Callable[[str], Path], tmp_path: Path, family: str, task: str, ranks: str, quantization: str
) -> None:
    workers = {
        f"site-{i}": tiny.worker(
            tmp_path, offered(family), task, f"site-{i}", shift=i, overrides=SiteOverrides(rank=rank)
        )
        for i, rank in enumerate(RANKS[ranks])
    }
    training = {"local_steps": 2, "batch_size": 24, "learning_rate": 1e-3}
    plan = tiny.plan(task, quantization=quantization, training=training, evaluation={"after": False})
    first, second = federate(workers, plan, Aggregation(), 2)
    assert not second.combined.refused
    measured = workers["site-0"].validate(RoundTask(plan, second.combined.adapter, second.combined.manifest))
    assert measured["loss"] < first.reports["site-0"].before["loss"]
    plain = loss_under_plain_peft(
        write_adapter(tmp_path / "adapter", Saved(second.combined.adapter, second.combined.manifest)),
        base=zoo.plain(offered(family), task, **four_bits(second.combined) if quantization == "nf4" else {}),
        batch=collate(list(workers["site-0"]._job(RoundTask(plan), trains=False).data.validation), pad_id=0),
        task=task,
    )
    assert plain == pytest.approx(measured["loss"], rel=1e-4)


def four_bits(made: Combined) -> dict[str, Any]:
    heads = adapter_config(made.adapter, made.manifest).get("modules_to_save") or ()
    kept = [*heads, "lm_head", "embed_out"]
    bits = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, llm_int8_skip_modules=kept
    )
    return {"quantization_config": bits}


@torch.inference_mode()
def loss_under_plain_peft(adapter: Path, base: Any, batch: dict[str, torch.Tensor], task: str) -> float:
    keep_packing(base)
    base.config.pad_token_id = 0
    model = PeftModel.from_pretrained(base, adapter).eval()
    batch = {name: column.to(base.device) for name, column in batch.items()}  # 4-bit weights lie where a GPU is
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    targets = registry[task].targets(batch["labels"])
    return float(cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=IGNORED))
