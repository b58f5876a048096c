"""An adapter and a job that an earlier commit wrote are read as they were meant; `write.py` says how."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForSequenceClassification

from nvflare_fm.export.folder import read_adapter
from nvflare_fm.flare.jobs.job import read_job
from tests.landed.write import HEAD, HERE, HIDDEN, LAYERS, PLAN, RANK

BROUGHT = HERE / "job" / "app_server" / "config" / "initial_adapter"


@pytest.mark.parametrize("folder", [HERE / "adapter", BROUGHT], ids=["by itself", "in a job"])
def test_an_adapter_is_read_with_all_that_it_says(folder: Path) -> None:
    saved = read_adapter(folder)
    adapter, manifest = saved.adapter, saved.manifest
    raw = load_file(folder / "adapter_model.safetensors")
    assert set(adapter.lora) == set(LAYERS)
    for layer, pair in adapter.lora.items():
        assert (pair.rank, pair.scale, pair.shape) == (RANK, 2.0, (HIDDEN, HIDDEN))
        assert torch.equal(pair.A, raw[f"{layer}.lora_A.weight"])
        assert torch.equal(pair.B, raw[f"{layer}.lora_B.weight"])
    assert torch.equal(adapter.dense[HEAD], raw[HEAD])
    assert (manifest.base, manifest.task, manifest.peft) == ("0" * 64, PLAN["task"], "lora")
    assert list(manifest.labels) == PLAN["labels"]
    assert saved.round == 4
    assert saved.plan is not None
    asked = saved.plan.model_dump(include={*PLAN}, mode="json")
    assert asked["training"].items() >= PLAN["training"].items()
    assert asked["peft"].items() >= PLAN["peft"].items()
    assert asked["max_length"] == PLAN["max_length"]
    assert saved.step == {"rule": "momentum"}
    assert torch.equal(saved.memory.change.dense[HEAD], torch.ones(3, HIDDEN))


def test_peft_loads_it() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": HIDDEN, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    base = LlamaForSequenceClassification(LlamaConfig(vocab_size=11, pad_token_id=0, num_labels=3, **sizes)).eval()
    words = {"input_ids": torch.tensor([[3, 5, 7]])}
    before = base(**words).logits
    with_adapter = PeftModel.from_pretrained(base, HERE / "adapter").eval()
    raw = load_file(HERE / "adapter" / "adapter_model.safetensors")
    ours = dict(with_adapter.named_parameters())
    for layer in LAYERS:
        assert torch.equal(ours[f"{layer}.lora_B.default.weight"], raw[f"{layer}.lora_B.weight"])
    assert not torch.allclose(with_adapter(**words).logits, before)


def test_a_job_is_read_as_it_was_meant() -> None:
    job = read_job(HERE / "job")
    assert (job.name, job.min_sites, set(job.sites)) == ("job", 2, {"alder", "birch"})
    assert job.rounds == range(5, 9)  # after the round of the adapter that it brings
    assert job.sites["alder"].overrides.rank == 1
    assert (job.plan.task, list(job.plan.labels)) == (PLAN["task"], PLAN["labels"])
    assert job.plan.training.local_steps == PLAN["training"]["local_steps"]
    assert job.adapter is not None
