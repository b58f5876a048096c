"""An adapter goes on and comes off without a trace, and every site starts a round at exactly the global adapter."""

import json
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from nvflare_fm.adapter import Adapter, LoraPair, RoundTask, from_tensors
from nvflare_fm.algebra.lora import shorten
from nvflare_fm.config import TaskPlan
from nvflare_fm.errors import ConfigError, WireError
from nvflare_fm.export.folder import Saved, write_adapter
from nvflare_fm.export.peft_config import adapter_config
from nvflare_fm.site import peft_methods
from nvflare_fm.site.model import base_model
from nvflare_fm.site.model.attach import wrap
from nvflare_fm.site.model.base_model import BaseModel
from nvflare_fm.site.offer.site_config import ModelSource
from nvflare_fm.site.peft_methods import Attachment
from nvflare_fm.site.tasks import registry as tasks
from tests.codes import refused
from tests.site import tiny

START = TaskPlan()
IDS = torch.tensor([[1, 40, 50, 60, 70, 80, 90, 7, 5]])


def base_of(folder: Path, task: str = "causal_lm", quantization: str = "nf4") -> BaseModel:
    plan = tiny.plan(task, quantization=quantization)
    return base_model.load(ModelSource(path=str(folder)), plan, tasks[task])


def method(rank: int, **more: Any) -> Attachment:
    return peft_methods.attachment_of({"method": "lora", "rank": rank, "lora_alpha": 16, **more})


def global_adapter(base: BaseModel, rank: int) -> Adapter:
    """A canonical adapter of size to matter."""
    with base.lent():
        blank = method(1).extract(method(1).attach(base, Adapter(), START))
    torch.manual_seed(1)
    made = {n: LoraPair(torch.randn(rank, p.shape[1]), torch.randn(p.shape[0], rank)) for n, p in blank.lora.items()}
    return Adapter({n: shorten(p, rank)[0].rescaled(0.1) for n, p in made.items()})


def weights(base: BaseModel) -> dict[str, bytes]:
    """Every value of the base model, quantization constants included."""
    values = base.model.state_dict().items()
    return {n: v.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes() for n, v in values}


@torch.inference_mode()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS.to(model.device)).logits.cpu()


@pytest.mark.parametrize("rank", [1, 3, 6, 9])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_every_site_starts_at_exactly_the_global_adapter_whatever_its_rank(
    llama: Path, rank: int, use_rslora: bool
) -> None:
    base = base_of(llama, quantization="fp32")
    start = global_adapter(base, 6)
    merged = AutoModelForCausalLM.from_pretrained(llama).eval()
    with torch.no_grad():
        for layer, pair in start.lora.items():
            merged.get_submodule(layer.removeprefix("base_model.model.")).weight.add_(pair.delta())
    with base.lent():
        model = method(rank, use_rslora=use_rslora).attach(base, start, START).eval()
        torch.testing.assert_close(logits(model), logits(merged), atol=2e-4, rtol=1e-4)


def test_without_rest_a_site_starts_from_the_first_directions_alone(llama: Path) -> None:
    base = base_of(llama, quantization="fp32")
    start = global_adapter(base, 6)
    with base.lent():
        alone = method(2).extract(method(2).attach(base, start, TaskPlan(rest="none")), whole=True)
    for layer, pair in alone.lora.items():
        first = LoraPair(start.lora[layer].A[:2], start.lora[layer].B[:, :2], start.lora[layer].scale)
        torch.testing.assert_close(pair.delta(), first.delta(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("factors", ["AB", "A", "B"])
def test_what_is_left_without_the_rest_is_as_if_it_had_never_been_there(llama: Path, factors: str) -> None:
    base = base_of(llama, quantization="fp32")
    start, seen = global_adapter(base, 6), []
    for rest in ("none", "tail"):
        with base.lent():
            model = method(2).attach(base, start, TaskPlan(rest=rest, factors=factors)).eval()
            if rest == "tail":
                assert any(".rest." in name for name, _ in model.named_parameters())
                method(2).leave_rest(model, factors)
            trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
            seen.append((trained, {*dict(model.named_parameters())}, logits(model)))
    assert seen[0][:2] == seen[1][:2]
    assert torch.equal(seen[0][2], seen[1][2])


@pytest.mark.parametrize("rest", ["none", "all"])
def test_what_a_site_trains_does_not_depend_on_whether_it_measures_first(
    llama: Path, tmp_path: Path, rest: str
) -> None:
    start = global_adapter(base_of(llama, quantization="fp32"), 4)
    seen = []
    for before in (False, True):
        asked = {"peft": {"method": "lora", "rank": 2}, "evaluation": {"before": before, "after": False}, "rest": rest}
        update = tiny.worker(tmp_path, llama, "causal_lm").train(RoundTask(tiny.plan(**asked), start))
        assert bool(update.report.before) == before
        seen.append(update.adapter.tensors())
    assert seen[0].keys() == seen[1].keys()
    assert all(torch.equal(tensor, seen[1][name]) for name, tensor in seen[0].items())


def test_the_whole_adapter_of_an_untrained_site_is_the_global_one(llama: Path) -> None:
    base = base_of(llama)
    start = global_adapter(base, 6)
    with base.lent():
        model = method(2).attach(base, start, START)
        whole, part = method(2).extract(model, whole=True), method(2).extract(model)
    assert {p.rank for p in part.lora.values()} == {2}
    assert {p.rank for p in whole.lora.values()} == {6}
    for layer, pair in start.lora.items():
        torch.testing.assert_close(whole.lora[layer].delta(), pair.delta(), atol=1e-5, rtol=1e-4)


def test_only_the_local_adapter_is_trained_and_it_is_float32(llama: Path) -> None:
    base = base_of(llama)
    with base.lent():
        model = method(2).attach(base, global_adapter(base, 6), START)
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        assert trained
        assert all(".local." in n and p.dtype == torch.float32 for n, p in trained.items())
        assert any(".rest." in n for n, _ in model.named_parameters())


def test_fresh_adapters_are_nested_by_rank_and_change_nothing(llama: Path) -> None:
    base = base_of(llama)
    adapters = {}
    for rank in (2, 5):
        with base.lent():
            adapters[rank] = method(rank).extract(method(rank).attach(base, Adapter(), TaskPlan(seed=7)))
    for layer, small in adapters[2].lora.items():
        assert torch.equal(small.A, adapters[5].lora[layer].A[:2])
        assert not small.B.any()
        assert small.A.norm() > 1


@pytest.mark.parametrize("quantization", ["nf4", "fp4", "int8", "bf16", "fp32"])
def test_the_base_is_byte_identical_and_bare_after_an_adapter_came_off(
    llama: Path, tmp_path: Path, quantization: str
) -> None:
    base = base_of(llama, "sequence_classification", quantization)
    before, names = weights(base), [n for n, _ in base.model.named_modules()]
    tiny.worker(tmp_path, llama, "sequence_classification").train(
        RoundTask(tiny.plan("sequence_classification", quantization=quantization))
    )
    assert base_of(llama, "sequence_classification", quantization) is base
    assert weights(base) == before
    assert [n for n, _ in base.model.named_modules()] == names
    assert not any(p.requires_grad for p in base.model.parameters())
    assert not base.model.training


def everything(base: BaseModel) -> dict[str, Any]:
    """All that a base model and what is quantized in it consist of: values by their bytes, the rest as it is."""
    found: dict[str, Any] = {"config": base.model.config.to_dict()}

    def note(name: str, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            numbers = value.detach().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
            found[name] = (value.dtype, tuple(value.shape), type(value), value.requires_grad, numbers)
        elif isinstance(value, int | float | str | bool | None) and value is not False:  # a flag is off or not there
            found[name] = value
        elif type(value).__module__.startswith("bitsandbytes") and not isinstance(value, torch.nn.Module):
            for key, inner in vars(value).items():
                note(f"{name}.{key}", inner)

    for path, module in base.model.named_modules():
        hooks = [value for key, value in vars(module).items() if key.endswith("hooks")]
        found[f"{path}/kind"] = (type(module), sum(map(len, hooks)))
        for key, value in vars(module).items():
            note(f"{path}/{key}", value)
        for key, value in (*module._parameters.items(), *module._buffers.items()):
            note(f"{path}.{key}", value)
            for own, inner in vars(value).items() if value is not None else ():
                note(f"{path}.{key}/{own}", inner)
    return found


LENT: list[dict[str, Any]] = [
    {"method": "lora", "rank": 2, "lora_dropout": 0.1},
    {"method": "lora", "rank": 2, "use_dora": True},
    {"method": "ia3"},
    {"method": "vera", "r": 8},
    {"method": "prompt_tuning", "num_virtual_tokens": 3},
    {"method": "prefix_tuning", "num_virtual_tokens": 3},
    {"method": "head"},
]


TASKS = ("causal_lm", "sequence_classification")
# Each method on each precision, and by turns on one of the tasks, is never slow.
LOANS = [
    pytest.param(quantization, peft, task, marks=() if (q + p - t) % len(TASKS) == 0 else pytest.mark.slow)
    for q, quantization in enumerate(("nf4", "fp4", "int8", "bf16", "fp32"))
    for p, peft in enumerate(LENT)
    for t, task in enumerate(TASKS)
    if not (peft["method"] == "head" and task == "causal_lm")  # it has no head of its own
]


@pytest.mark.parametrize(("quantization", "peft", "task"), LOANS)
def test_what_was_lent_is_given_back_as_it_was_to_the_last_bit(
    llama: Path, tmp_path: Path, quantization: str, peft: dict[str, Any], task: str
) -> None:
    base = base_of(llama, task, quantization)
    answers, before = logits(base.model), everything(base)
    training = {"local_steps": 1, "batch_size": 2, "gradient_checkpointing": peft["method"] != "prefix_tuning"}
    plan = tiny.plan(task, peft=peft, quantization=quantization, training=training, evaluation={"after": False})
    if "use_dora" in peft and quantization == "int8":
        with pytest.raises(ConfigError) as raised:
            tiny.worker(tmp_path, llama, task).train(RoundTask(plan))
        assert raised.value.code == "dora_on_int8"
        with suppress(AttributeError), base.lent():  # as if it were not refused
            logits(wrap(base, peft_methods.attachment_of(peft).config(base), 0))
    else:
        tiny.worker(tmp_path, llama, task).train(RoundTask(plan))
    assert base_of(llama, task, quantization) is base
    now = everything(base)
    assert sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name)) == []
    assert torch.equal(logits(base.model), answers)


def test_the_base_is_bare_again_after_a_failure(llama: Path) -> None:
    base = base_of(llama)
    names = [n for n, _ in base.model.named_modules()]
    start, narrow = global_adapter(base, 6), method(2, target_modules="q_proj")
    with pytest.raises(WireError), base.lent():
        narrow.attach(base, start, START)
    assert [n for n, _ in base.model.named_modules()] == names


@pytest.mark.parametrize(
    ("name", "task"),
    [
        (name, task)
        for name in ("lora", "ia3", "vera", "prompt_tuning", "prefix_tuning", "head")
        for task in ("causal_lm", "sequence_classification", "token_classification")
        if (name, task) != ("head", "causal_lm")  # which has no head of its own
    ],
)
def test_each_method_trains_travels_and_is_loaded_by_peft(llama: Path, tmp_path: Path, name: str, task: str) -> None:
    plan = tiny.plan(task, peft={"method": name}, training={"local_steps": 12, "batch_size": 12, "learning_rate": 0.01})
    worker = tiny.worker(tmp_path, llama, task)
    update = worker.train(RoundTask(plan))
    assert update.report.after["loss"] < update.report.before["loss"]
    base = base_of(llama, task, "fp32")
    travelled = from_tensors(update.adapter.tensors(), update.adapter.scales(), "site-1")
    folder = write_adapter(tmp_path / "adapter", Saved(travelled, update.manifest, 0, plan))
    with base.lent():
        ours = logits(peft_methods.attachment_of(plan.peft).attach(base, travelled, START).eval())
    with base.lent() as bare:
        theirs = logits(PeftModel.from_pretrained(bare, folder).eval())
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    again = worker.validate(RoundTask(plan, travelled, update.manifest))
    assert again["loss"] == pytest.approx(update.report.after["loss"], rel=1e-5)


def test_dora_trains_with_its_magnitudes_and_refuses_another_rank(llama: Path, tmp_path: Path) -> None:
    plan = tiny.plan(peft={"method": "lora", "rank": 4, "use_dora": True}, quantization="nf4")
    worker = tiny.worker(tmp_path, llama, "causal_lm")
    update = worker.train(RoundTask(plan))
    assert any("magnitude" in name for name in update.adapter.dense)
    assert worker.validate(RoundTask(plan, update.adapter))["loss"] == pytest.approx(update.report.after["loss"])
    folder, base = write_adapter(tmp_path / "adapter", Saved(update.adapter, update.manifest)), base_of(llama)
    with base.lent():
        ours = logits(peft_methods.attachment_of(plan.peft).attach(base, update.adapter, START).eval())
    with base.lent() as bare:
        torch.testing.assert_close(ours, logits(PeftModel.from_pretrained(bare, folder).eval()), atol=1e-5, rtol=1e-5)
    wider = tiny.plan(peft={"method": "lora", "rank": 2, "use_dora": True}, quantization="nf4")
    with refused("one_rank", ConfigError, "2", "4"):
        worker.train(RoundTask(wider, update.adapter))


def test_an_adapter_for_other_layers_is_refused_by_name(llama: Path) -> None:
    base = base_of(llama)
    start = global_adapter(base, 2)
    layer = sorted(start.lora)[0]
    fewer = replace(start, lora={n: p for n, p in start.lora.items() if n != layer})
    with base.lent(), refused("adapter_misfit", WireError, layer):
        method(2).attach(base, fewer, START)
    wider = replace(start, lora={**start.lora, layer: LoraPair(torch.ones(2, 3), torch.ones(5, 2))})
    with base.lent(), refused("adapter_misfit", WireError, layer):
        method(2).attach(base, wider, START)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("name", ["ia3", "prompt_tuning", "prefix_tuning"])
@pytest.mark.parametrize("quantization", ["nf4", "bf16"])
def test_what_peft_puts_before_and_between_layers_fits_a_base_of_another_type(
    llama: Path, quantization: str, name: str, dtype: str
) -> None:
    plan = tiny.plan(quantization=quantization, compute_dtype=dtype, peft={"method": name})
    base = base_model.load(ModelSource(path=str(llama)), plan, tasks[plan.task])
    with base.lent():
        peft_methods.attachment_of(plan.peft).attach(base, Adapter(), plan)  # is tried with a text, or refused


def test_target_modules_that_match_nothing_are_refused(llama: Path) -> None:
    base = base_of(llama)
    with base.lent(), refused("no_such_module", ConfigError, "target_modules", "nothing_like_it"):
        method(2, target_modules="nothing_like_it").attach(base, Adapter(), START)


def test_what_peft_is_told_is_plain_json_by_the_names_of_the_tensors_without_a_path(
    llama: Path, tmp_path: Path
) -> None:
    task = "sequence_classification"
    update = tiny.worker(tmp_path, llama, task).train(RoundTask(tiny.plan(task)))
    said = adapter_config(update.adapter, update.manifest)
    assert json.loads(json.dumps(said)) == said
    assert str(llama) not in json.dumps(said)
    assert "model.layers.0.self_attn.q_proj" in said["target_modules"]
    assert (said["modules_to_save"], said["task_type"], said["peft_type"]) == (["score"], "SEQ_CLS", "LORA")
