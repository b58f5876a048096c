"""What is written is what PEFT loads and what a later job reads."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import nn

from nvflare_fm.adapter import Adapter, LoraPair
from nvflare_fm.config import TaskPlan
from nvflare_fm.errors import ModelError
from nvflare_fm.export import folder as export

from .messages import MANIFEST, adapter, same


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(5, 6, bias=False)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn = Attention()


class Base(nn.Module):
    """Two layers under the names of a Llama, and a third one the adapter does not touch."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.layers = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return sum((block.self_attn.q_proj(x) for block in self.model.layers), torch.zeros(()))


def mixed() -> Adapter:
    """A rank and a scale of its own in every layer."""
    pairs = adapter(1, rank=3, scale=4.0).lora
    first, second = sorted(pairs)
    return Adapter({first: pairs[first], second: LoraPair(torch.randn(2, 5), torch.randn(6, 2), 0.3)})


@pytest.mark.parametrize("merged", [Adapter(adapter(1).lora), mixed()], ids=["one rank", "a rank for each layer"])
def test_peft_adds_exactly_the_adapters_delta(tmp_path: Path, merged: Adapter) -> None:
    folder = export.write_adapter(tmp_path / "last", export.Saved(merged, replace(MANIFEST, task="one_without_a_head")))
    base = Base()
    x = torch.randn(4, 5)
    before = base(x)
    model = PeftModel.from_pretrained(base, str(folder))
    expected = before + sum(x @ merged.lora[n].delta().T for n in merged.lora)
    torch.testing.assert_close(model(x), expected)
    assert get_peft_model_state_dict(model).keys() == merged.tensors().keys()


def test_sites_with_rslora_get_the_same_delta(tmp_path: Path) -> None:
    plan = TaskPlan(peft={"method": "lora", "rank": 3, "use_rslora": True})
    merged = Adapter(adapter(1, scale=0.7).lora)
    folder = export.write_adapter(tmp_path / "last", export.Saved(merged, MANIFEST, 0, plan))
    assert export.read_adapter(folder).adapter.scales() == pytest.approx(merged.scales())


@pytest.mark.parametrize("merged", [adapter(2, scale=4.0), mixed(), Adapter(dense={"v": torch.ones(3)})])
def test_reading_undoes_writing(tmp_path: Path, merged: Adapter) -> None:
    saved = export.Saved(merged, MANIFEST, 7, TaskPlan(seed=5))
    found = export.read_adapter(export.write_adapter(tmp_path / "x" / "last", saved))
    read = found.adapter
    assert read.tensors().keys() == merged.tensors().keys()
    assert all(torch.equal(t, merged.tensors()[n]) for n, t in read.tensors().items())
    assert read.scales() == pytest.approx(merged.scales())
    assert (MANIFEST.base, MANIFEST.task, MANIFEST.peft, MANIFEST.labels) == ("base-1", "causal_lm", "lora", ())
    assert replace(found, adapter=merged) == saved


def test_writing_again_replaces_the_whole_folder_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    export.write_adapter(tmp_path / "last", export.Saved(adapter(1), MANIFEST))
    (tmp_path / "last" / "stale.txt").write_text("of the old one")
    export.write_adapter(tmp_path / "last", export.Saved(adapter(2), MANIFEST))
    assert same(export.read_adapter(tmp_path / "last").adapter, adapter(2))
    assert sorted(f.name for f in tmp_path.iterdir()) == ["last"]
    assert not (tmp_path / "last" / "stale.txt").exists()


def test_a_write_that_fails_leaves_the_old_adapter_whole(tmp_path: Path) -> None:
    export.write_adapter(tmp_path / "last", export.Saved(adapter(1), MANIFEST))
    with pytest.raises(TypeError):
        export.write_adapter(tmp_path / "last", export.Saved(adapter(2), MANIFEST, object()))
    assert same(export.read_adapter(tmp_path / "last").adapter, adapter(1))
    assert sorted(f.name for f in tmp_path.iterdir()) == ["last"]


@pytest.mark.parametrize("missing", export.NEEDED)
def test_a_folder_that_lacks_a_file_is_refused_without_telling_its_path(tmp_path: Path, missing: str) -> None:
    folder = export.write_adapter(tmp_path / "last", export.Saved(adapter(1), MANIFEST))
    (folder / missing).unlink()
    with pytest.raises(ModelError) as caught:
        export.read_adapter(folder)
    assert caught.value.code == "adapter_unreadable"
    assert missing in caught.value.message
    assert str(tmp_path) not in caught.value.message


def test_provenance_names_the_base_and_no_site(tmp_path: Path) -> None:
    folder = export.write_adapter(tmp_path / "last", export.Saved(adapter(1), MANIFEST, 3))
    told = json.loads((folder / export.PROVENANCE).read_text())
    assert told["base"] == "base-1"
    assert told["round"] == 3
    assert told.keys() == {
        "nvflare_fm", "base", "task", "peft", "labels", "tokenizer", "chat_template", "round", "plan",
    }  # fmt: skip
