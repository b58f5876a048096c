"""The head alone: nothing else changes, and what lies below it is computed once without changing a bit."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import AutoPeftModelForSequenceClassification, AutoPeftModelForTokenClassification, PeftModel

from nvflare_fm.adapter import Adapter, RoundTask
from nvflare_fm.aggregation.combine import combine
from nvflare_fm.aggregation.merge import registry as merge_rules
from nvflare_fm.config import Aggregation, RoundPlan
from nvflare_fm.errors import ConfigError, PolicyError
from nvflare_fm.export.folder import Saved, write_adapter
from nvflare_fm.job.cost import activation_bytes
from nvflare_fm.job.settle import settle
from nvflare_fm.simulate import federate
from nvflare_fm.site.model import base_model
from nvflare_fm.site.model.shapes import shapes
from nvflare_fm.site.model.states import FrozenBackbone, States
from nvflare_fm.site.offer.site_config import ModelSource
from nvflare_fm.site.tasks import registry as tasks
from nvflare_fm.site.worker import Worker
from tests.codes import refused
from tests.site import tiny
from tests.site.test_mean_pooling import OLD, declared

HEAD: dict[str, Any] = {"method": "head"}
TASKS = ["sequence_classification", "token_classification", "multi_label", "regression"]
KINDS = ["llama", "bert", "averaged"]
ROOM = 2**20


def plan(task: str = "sequence_classification", **more: Any) -> Any:
    return tiny.plan(task, peft=HEAD, **more)


@pytest.fixture(scope="module")
def models(llama: Path, bert: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    averaged = declared(bert, tmp_path_factory.mktemp("averaged") / "model", OLD)
    return {"llama": llama, "bert": bert, "averaged": averaged}


def site(folder: Path, model: Path, task: str, room: float = ROOM) -> Worker:
    worker = tiny.worker(folder, model, task)
    worker._states = States(room)
    return worker


def lent(model: Path, task: str, quantization: str = "fp32") -> base_model.BaseModel:
    return base_model.load(ModelSource(path=str(model)), plan(task, quantization=quantization), tasks[task])


@pytest.mark.parametrize(
    ("kind", "task", "quantization"),
    [
        *(("bert", task, "nf4") for task in TASKS),
        *(("averaged", TASKS[0], quantization) for quantization in ("nf4", "int8", "bf16", "fp32")),
        ("llama", TASKS[0], "fp32"),
    ],
)
def test_kept_or_computed_anew_it_is_the_same_to_the_last_bit(
    models: dict[str, Path], tmp_path: Path, kind: str, task: str, quantization: str
) -> None:
    asked = plan(task, quantization=quantization, training={"local_steps": 3, "batch_size": 5, "learning_rate": 1e-2})
    kept, anew = (site(tmp_path, models[kind], task, room) for room in (ROOM, 0))
    one, other = kept.train(RoundTask(asked)), anew.train(RoundTask(asked))
    assert (kept._states.bytes > 0, anew._states.bytes) == (True, 0)
    assert sorted(one.adapter.dense) == sorted(other.adapter.dense)
    assert all(torch.equal(one.adapter.dense[name], other.adapter.dense[name]) for name in one.adapter.dense)
    assert (one.report.before, one.report.after, one.report.loss) == (
        other.report.before, other.report.after, other.report.loss,
    )  # fmt: skip
    again = RoundTask(asked, one.adapter, one.manifest, 1)
    assert all(torch.equal(t, anew.train(again).adapter.dense[n]) for n, t in kept.train(again).adapter.dense.items())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("task", ["sequence_classification", "token_classification"])
def test_only_the_head_travels_and_learns(models: dict[str, Path], tmp_path: Path, kind: str, task: str) -> None:
    worker = site(tmp_path, models[kind], task)
    asked = plan(task, training={"local_steps": 8, "batch_size": 12, "learning_rate": 3e-3})
    first, second = federate({"site-1": worker}, asked, Aggregation(), 2)
    assert not second.combined.adapter.lora
    heads = {name.split(".")[2] for name in second.combined.adapter.dense}
    assert heads == set(lent(models[kind], task).heads)
    assert second.reports["site-1"].after["loss"] < first.reports["site-1"].before["loss"]


texts = st.lists(st.lists(st.integers(8, 300), min_size=1, max_size=9), min_size=1, max_size=12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("quantization", ["fp32", "nf4", "int8"])
def test_a_texts_states_are_its_own_whatever_is_beside_it(
    models: dict[str, Path], kind: str, quantization: str
) -> None:
    base = lent(models[kind], TASKS[0], quantization)
    bare = base.model._modules[base.model.base_model_prefix]
    assert bare is not None
    rough = quantization == "int8" or base.compute_dtype != torch.float32

    @settings(max_examples=8 if quantization == "int8" else 20)
    @given(texts, st.integers(0, 3), st.sampled_from([0, 3000, ROOM]))
    def check(found: list[list[int]], wider: int, room: int) -> None:
        states = States(room)
        frozen = FrozenBackbone(bare, base, states).train()
        width = max(map(len, found)) + wider
        ids = torch.tensor([text + [0] * (width - len(text)) for text in found])
        mask = torch.tensor([[1] * len(text) + [0] * (width - len(text)) for text in found])
        with torch.inference_mode(), base.autocast():
            theirs = bare(input_ids=ids, attention_mask=mask).last_hidden_state
            ours = frozen(input_ids=ids, attention_mask=mask).last_hidden_state
        assert torch.equal(frozen(ids, attention_mask=mask).last_hidden_state, ours)  # with room, from what is kept
        assert states.bytes <= room
        for place, text in enumerate(found):
            alone = FrozenBackbone(bare, base, States())(torch.tensor([text]), torch.ones(1, len(text)))
            (state,) = alone.last_hidden_state
            assert torch.equal(state, ours[place, : len(state)])
            expected = theirs[place, : len(text)]
            expected = expected.mean(0, keepdim=True) if kind == "averaged" else expected
            assert rough or torch.allclose(state, expected, atol=1e-4)

    check()


def test_other_calls_and_other_answers_are_left_to_the_backbone(models: dict[str, Path]) -> None:
    base = lent(models["bert"], TASKS[0])
    bare = base.model._modules["bert"]
    assert bare is not None
    states = States(ROOM)
    frozen, ids = FrozenBackbone(bare, base, states), torch.tensor([[8, 9, 10], [11, 12, 0]])
    padded_left = torch.tensor([[1, 1, 1], [0, 1, 1]])
    for more in ({}, {"attention_mask": padded_left}, {"attention_mask": padded_left * 0}, {
        "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)
    }):  # fmt: skip
        assert torch.equal(frozen(ids, **more).last_hidden_state, bare(ids, **more).last_hidden_state)
    whole = {"attention_mask": torch.ones_like(ids), "output_hidden_states": True}
    assert len(frozen(ids, **whole).hidden_states) == 3
    assert not states.bytes


def test_what_is_kept_is_of_one_job_and_one_base_model_and_has_its_bound(
    models: dict[str, Path], tmp_path: Path
) -> None:
    first, second = (site(tmp_path, models["bert"], TASKS[0]) for _ in range(2))
    first.train(RoundTask(plan()))
    assert first._states.bytes
    assert not second._states.bytes
    base = lent(models["bert"], TASKS[0])
    assert not any(isinstance(module, FrozenBackbone) for module in base.model.modules())
    states = States(ROOM)
    text = (8, 9)
    states.keep(base.model, text, base.model.base_model(torch.tensor([text]), return_dict=True))
    assert states.of(base.model, text) is not None
    assert states.of(base.model, (8,)) is None
    assert states.of(base.model.base_model, text) is None
    for gib, most in ((4.0, 2**28), (64.0, 2**30)):
        offered = tiny.site(models["bert"], tmp_path / "rows.jsonl", limits={"memory_gib": gib})
        assert Worker("site-1", offered)._states.most_bytes == most


def test_a_backbone_with_something_trained_in_it_is_not_frozen(models: dict[str, Path], tmp_path: Path) -> None:
    file = str(tiny.jsonl(tmp_path / "rows.jsonl", tiny.rows(TASKS[0])))
    limits = {"trainable_modules": ["encoder.layer.1"]}
    worker = Worker("site-1", tiny.site(models["bert"], Path(file), limits=limits))
    asked = tiny.plan(TASKS[0], peft=HEAD | {"modules_to_save": ["encoder.layer.1"]})
    update = worker.train(RoundTask(asked))
    assert any(".encoder.layer.1." in name for name in update.adapter.dense)
    assert not worker._states.bytes
    folder, base = write_adapter(tmp_path / "adapter", Saved(update.adapter, update.manifest, 0, asked)), None
    said = json.loads((folder / "adapter_config.json").read_text())
    assert said["modules_to_save"] == ["classifier", "encoder.layer.1"]
    base = lent(models["bert"], TASKS[0])
    with base.lent() as bare:
        loaded = PeftModel.from_pretrained(bare, folder)
        trained = {n for n, _ in loaded.named_parameters() if "modules_to_save" in n}
    assert len(trained) == len(update.adapter.dense)
    _, adapter = shapes(models["bert"], asked)
    assert adapter.below


@pytest.mark.parametrize(("kind", "task"), [("bert", TASKS[0]), ("bert", TASKS[1]), ("llama", TASKS[0])])
def test_the_folder_loads_by_pefts_own_classes(models: dict[str, Path], tmp_path: Path, kind: str, task: str) -> None:
    update = site(tmp_path, models[kind], task).train(RoundTask(plan(task)))
    folder = write_adapter(tmp_path / "adapter", Saved(update.adapter, update.manifest, 0, plan(task)))
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": str(models[kind])}))
    auto = AutoPeftModelForTokenClassification if "token" in task else AutoPeftModelForSequenceClassification
    model = auto.from_pretrained(folder, num_labels=len(tiny.LABELS))
    state = dict(model.named_parameters())
    for name, tensor in update.adapter.dense.items():
        module, _, leaf = name.rpartition(".")
        assert torch.equal(state[f"{module}.modules_to_save.default.{leaf}"].float(), tensor)


def test_without_a_head_to_train_it_is_refused_at_the_server_and_at_the_site(llama: Path, tmp_path: Path) -> None:
    for task in ("causal_lm", "preference"):
        with refused("nothing_trained", ConfigError):
            settle(RoundPlan(task=task, peft=HEAD), Aggregation())
        with refused("nothing_trained", ConfigError):
            tiny.worker(tmp_path, llama, task).train(RoundTask(plan(task)))
    settle(RoundPlan(peft=HEAD | {"modules_to_save": ["lm_head"]}), Aggregation())
    with refused("not_trainable", PolicyError):
        asked = tiny.plan(TASKS[0], peft=HEAD | {"modules_to_save": ["model.norm"]})
        tiny.worker(tmp_path, llama, TASKS[0]).train(RoundTask(asked))


def test_rules_about_factors_are_refused_and_all_others_give_the_mean(models: dict[str, Path], tmp_path: Path) -> None:
    asked = plan(training={"local_steps": 1, "batch_size": 4, "learning_rate": 1e-2})
    updates = [tiny.worker(tmp_path, models["bert"], TASKS[0], f"site-{i}", i).train(RoundTask(asked)) for i in (0, 1)]
    name, *_ = updates[0].adapter.dense
    expected = sum(update.adapter.dense[name] for update in updates) / 2
    for rule in merge_rules:
        if merge_rules[rule].factors != ("AB",) or merge_rules[rule].shares != "AB" or merge_rules[rule].rest == "all":
            with refused("needs_plain_lora", ConfigError):
                settle(RoundPlan(task=TASKS[0], labels=tiny.LABELS, peft=HEAD), Aggregation(merge=rule))
        else:
            merged = combine(Adapter(), None, updates, Aggregation(merge=rule), 1).adapter
            torch.testing.assert_close(merged.dense[name], expected)
    settle(RoundPlan(task=TASKS[0], labels=tiny.LABELS, peft=HEAD, uplink="ckks"), Aggregation())


def test_a_step_holds_nothing_of_the_layers_for_a_way_back(models: dict[str, Path]) -> None:
    base, head = shapes(models["bert"], plan())
    _, lora = shapes(models["bert"], tiny.plan(TASKS[0]))
    deep = replace(base, depth=12)
    assert (head.below, lora.below) == (False, True)
    assert activation_bytes(deep, head, plan()) == activation_bytes(base, head, plan())
    assert activation_bytes(deep, head, plan()) < activation_bytes(deep, lora, plan()) / 5
