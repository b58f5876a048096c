"""Direct preference optimization: TRL's rows, loss, gradients and steps; a reference that is the base model alone."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import set_peft_model_state_dict
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer

from nvflare_fm.adapter import Adapter, LoraPair, RoundTask
from nvflare_fm.config import TaskPlan
from nvflare_fm.export.folder import Saved, write_adapter
from nvflare_fm.site.model import base_model
from nvflare_fm.site.model.base_model import BaseModel
from nvflare_fm.site.offer.site_config import ModelSource
from nvflare_fm.site.peft_methods import attachment_of
from nvflare_fm.site.tasks import BadRow, registry
from nvflare_fm.site.tasks.preference import without_adapter
from nvflare_fm.site.training import logits
from nvflare_fm.site.worker import Worker
from tests.codes import refused
from tests.site import tiny
from tests.strategies import close

TASK, BETA = registry["preference"], 0.3
ENDS = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% if m.role == 'assistant' %}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
IDS = torch.tensor([[1, 40, 50, 60, 70, 80, 90, 7, 5]])


def said(*texts: str, first: str = "user") -> list[dict[str, str]]:
    roles = ["user", "assistant"] if first == "user" else ["assistant", "user"]
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


WHOLE = said("how is he?", "he is well"), said("how is he?", "he is very ill and walks")
ROWS: dict[str, list[dict[str, Any]]] = {  # in TRL's words: standard or conversational, with the prompt explicit or not
    "standard": tiny.rows("preference", 6),
    "standard, implicit": [{"chosen": "how is he? he is well", "rejected": "how is he? he was ill today"}],
    "conversational": [
        {"prompt": said("how is he?"), "chosen": said(a, first="assistant"), "rejected": said(b, first="assistant")}
        for a, b in (("he is well", "he is ill"), ("calm", "he walks today"))
    ],
    "conversational, implicit": [{"chosen": WHOLE[0], "rejected": WHOLE[1]}],
    "conversational, implicit, of several turns": [
        {"chosen": said("a", "b", "how is he?", "well"), "rejected": said("a", "b", "how is he?", "ill today")}
    ],
}


@pytest.fixture(scope="module")
def folder(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose chat template ends an answer with the tokenizer's end token, as TRL's texts end."""
    copy = shutil.copytree(llama, tmp_path_factory.mktemp("ends") / "model")
    words = tiny.tokenizer()
    words.chat_template = ENDS
    words.save_pretrained(copy)
    return copy


def plan(**more: Any) -> TaskPlan:
    training = {"local_steps": 2, "batch_size": 6, "optim": "sgd", "learning_rate": 0.5, "max_grad_norm": 1e9}
    return tiny.plan("preference", training=training | {"dpo_beta": BETA} | more.pop("training", {}), **more)


def base_of(folder: Path, quantization: str = "fp32") -> BaseModel:
    return base_model.load(ModelSource(path=str(folder)), plan(quantization=quantization), TASK)


def of_size(base: BaseModel, rank: int) -> Adapter:
    """A global adapter that is far from nothing, at scale 1."""
    method = attachment_of({"method": "lora", "rank": 1, "lora_alpha": 1})
    with base.lent():
        blank = method.extract(method.attach(base, Adapter(), plan()))
    torch.manual_seed(1)
    pairs = {n: LoraPair(torch.randn(rank, p.shape[1]), torch.randn(p.shape[0], rank)) for n, p in blank.lora.items()}
    return Adapter({n: LoraPair(0.2 * p.A, 0.2 * p.B) for n, p in pairs.items()})


def trl(folder: Path, rows: list[dict[str, Any]], start: Adapter, out: Path, **more: Any) -> DPOTrainer:
    """TRL's trainer on the same base model, with the adapter `start`."""
    rank = next(iter(start.lora.values())).rank
    model = AutoModelForCausalLM.from_pretrained(folder)
    model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear"))
    steps = {"per_device_train_batch_size": len(rows), "optim": "sgd", "max_grad_norm": 0.0, "bf16": False}
    steps |= {"gradient_checkpointing": False, "lr_scheduler_type": "constant", "max_steps": 2}
    args = DPOConfig(str(out), beta=BETA, report_to="none", use_cpu=True, save_strategy="no", **steps, **more)
    words = base_model.load_tokenizer(folder)
    trainer = DPOTrainer(model, args=args, train_dataset=Dataset.from_list(rows), processing_class=words)
    set_peft_model_state_dict(trainer.model, start.tensors())  # now, as TRL's reference is the adapter it is given
    return trainer


@pytest.mark.parametrize("at_once", [5, 10_000])
@pytest.mark.parametrize("rank", [2, 6])
@pytest.mark.parametrize("rows", ROWS)
def test_loss_and_gradients_are_trls_whatever_rides_along_frozen(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: str, rank: int, at_once: int
) -> None:
    """A site of rank 2 trains the first two directions of an adapter of rank 6; the others are no part of π₀."""
    monkeypatch.setattr(logits, "positions_at_once", lambda words: at_once)
    base = base_of(folder)
    start = of_size(base, 6)
    theirs = trl(folder, ROWS[rows], start, tmp_path)
    expected = theirs.compute_loss(theirs.model, next(iter(theirs.get_train_dataloader())))
    expected.backward()
    asked = plan(peft={"method": "lora", "rank": rank, "lora_alpha": rank})
    encoded = [example for row in ROWS[rows] for example in TASK.encode(row, base.tokenizer, asked).examples]
    batch = TASK.batch(encoded, 0)
    with base.lent():
        model = attachment_of(asked.peft).attach(base, start, asked)
        loss = TASK.loss(model, base, batch, asked) / TASK.items(batch)
        loss.backward()
        found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        measured = TASK.metrics(TASK.measure(model, base, batch, asked)[0], asked)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    assert measured["loss"] == pytest.approx(float(expected.detach()), rel=1e-5)
    logged = {name: theirs._metrics["train"][name][0] for name in ("rewards/accuracies", "rewards/margins")}
    assert {name: measured[name] for name in logged} == pytest.approx(logged, rel=1e-4, abs=1e-5)
    assert found
    for name, parameter in theirs.model.named_parameters():
        if parameter.requires_grad:
            gradient = found.pop(name.replace(".default.", ".local."))
            other = parameter.grad[:rank] if "lora_A" in name else parameter.grad[:, :rank]
            close(gradient, other, 1e-4)
    assert not found


def test_a_round_ends_where_trls_training_ends(folder: Path, tmp_path: Path) -> None:
    rows = ROWS["standard"]
    file = str(tiny.jsonl(tmp_path / "rows.jsonl", rows))
    source = {"notes": {"train": file, "validation": file}}
    asked = plan(peft={"method": "lora", "rank": 2, "lora_alpha": 2}, evaluation={"before": False, "after": False})
    base = base_of(folder)
    method = attachment_of(asked.peft)
    with base.lent():
        start = method.extract(method.attach(base, Adapter(), asked))
    theirs = trl(folder, rows, start, tmp_path, learning_rate=0.5)
    theirs.train()
    expected = {n: p.detach() for n, p in theirs.model.named_parameters() if p.requires_grad}
    update = Worker("site-1", tiny.site(folder, Path(file), data=source)).train(RoundTask(asked))
    for name, tensor in update.adapter.tensors().items():
        torch.testing.assert_close(tensor, expected[name.replace(".weight", ".default.weight")], atol=1e-5, rtol=1e-3)
    assert update.report.loss == pytest.approx(theirs.state.log_history[-1]["train_loss"], rel=1e-4)
    assert any(float(pair.B.norm()) > 1e-2 for pair in update.adapter.lora.values())


METHODS: dict[str, dict[str, Any]] = {
    "lora beside a frozen rest": {"method": "lora", "rank": 2, "lora_alpha": 2, "lora_dropout": 0.1},
    "lora and a whole head": {
        "method": "lora",
        "rank": 6,
        "target_modules": ["q_proj"],
        "modules_to_save": ["lm_head"],
    },
    "dora": {"method": "lora", "rank": 6, "use_dora": True},
    "ia3": {"method": "ia3"},
    "vera": {"method": "vera", "r": 16},
    "prompt_tuning": {"method": "prompt_tuning", "num_virtual_tokens": 3},
    "prefix_tuning": {"method": "prefix_tuning", "num_virtual_tokens": 3},
}


@pytest.mark.parametrize("name", METHODS)
def test_the_reference_is_the_base_model_alone_and_leaves_no_trace(llama: Path, name: str) -> None:
    asked, base = plan(peft=METHODS[name]), base_of(llama)
    with torch.inference_mode():
        bare = base.model(input_ids=IDS).logits
    with base.lent():
        start = of_size(base, 6) if "rest" in name else Adapter()
        model = attachment_of(asked.peft).attach(base, start, asked, number=1).train()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1)

        def state() -> list[Any]:
            active = [module.active_adapters for module in model.modules() if hasattr(module, "active_adapters")]
            return [active, *(p.requires_grad for p in model.parameters()), *(m.training for m in model.modules())]

        before, changed = state(), model.eval()(input_ids=IDS).logits
        model.train()
        for _ in range(2):
            with torch.no_grad(), without_adapter(base.model):
                assert torch.equal(base.model(input_ids=IDS).logits, bare)
                assert not any(module.training for module in base.model.modules())
            assert state() == before
        assert any(before[1:])
        assert torch.equal(model.eval()(input_ids=IDS).logits, changed)
        assert not torch.allclose(changed[:, -len(IDS[0]) :], bare, atol=1e-3)


@pytest.mark.parametrize("name", METHODS)
def test_training_makes_chosen_answers_likelier_and_what_is_exported_answers_alike(
    llama: Path, tmp_path: Path, name: str
) -> None:
    training = {"local_steps": 12, "optim": "adamw_torch", "learning_rate": 1e-2, "dpo_beta": 0.1}
    asked = plan(peft=METHODS[name], quantization="nf4", training=training)
    file = str(tiny.jsonl(tmp_path / "rows.jsonl", tiny.rows("preference")))
    source, limits = {"notes": {"train": file, "validation": file}}, {"trainable_modules": ["lm_head"]}
    site = tiny.site(llama, Path(file), data=source, limits=limits | {"train_embeddings": True})
    worker = Worker("site-1", site)
    update = worker.train(RoundTask(asked))
    report = update.report
    if "prompt" not in name and "prefix" not in name:  # whose fresh tokens are no empty adapter
        assert report.before["loss"] == pytest.approx(0.6931, abs=1e-3)
        assert report.before["rewards/margins"] == pytest.approx(0, abs=1e-3)
    assert report.after["loss"] < report.before["loss"] - 0.02
    assert report.after["rewards/margins"] > report.before["rewards/margins"]
    assert worker.validate(RoundTask(asked, update.adapter))["loss"] == pytest.approx(report.after["loss"], rel=1e-4)
    folder, base = write_adapter(tmp_path / "adapter", Saved(update.adapter, update.manifest)), base_of(llama)
    with base.lent():
        ours = attachment_of(asked.peft).attach(base, update.adapter, asked).eval()(input_ids=IDS).logits
    with base.lent() as bare:
        theirs = PeftModel.from_pretrained(bare, folder).eval()(input_ids=IDS).logits
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_small_batches_with_checkpoints_are_one_large_batch(llama: Path, tmp_path: Path) -> None:
    def trained(**more: Any) -> Any:
        asked = plan(quantization="fp32", training={"local_steps": 2, **more}, evaluation={"before": False})
        return tiny.worker(tmp_path, llama, "preference").train(RoundTask(asked))

    large, small = (
        trained(batch_size=8),
        trained(batch_size=2, gradient_accumulation_steps=4, gradient_checkpointing=True),
    )
    assert small.report.loss == pytest.approx(large.report.loss, rel=1e-4)
    theirs = small.adapter.tensors()
    for name, tensor in large.adapter.tensors().items():
        torch.testing.assert_close(tensor, theirs[name], atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize(
    ("row", "code"),
    [
        ({}, "value_missing"),
        ({"prompt": "a", "chosen": "b"}, "value_missing"),
        ({"prompt": "a", "chosen": "b", "rejected": " "}, "value_empty"),
        ({"prompt": "a", "chosen": "b", "rejected": 3}, "not_an_answer"),
        ({"prompt": "a ", "chosen": "b", "rejected": "b"}, "same_answers"),
        ({"prompt": "a", "chosen": "b", "rejected": said("b")}, "answers_differ_in_kind"),
        ({"prompt": said("a"), "chosen": "b", "rejected": "c"}, "prompt_not_text"),
        ({"prompt": said("a"), "chosen": said("b"), "rejected": said("c")}, "no_assistant_turn"),
        ({"chosen": "yes", "rejected": "no"}, "no_common_prompt"),
        ({"chosen": "yes", "rejected": "yes no"}, "no_common_prompt"),
        ({"chosen": WHOLE[0], "rejected": WHOLE[0]}, "same_answers"),
        ({"prompt": "a", "chosen": "b " * 60 + "c", "rejected": "b " * 60}, "same_answers"),
        ({"prompt": "how is it going? " * 9, "chosen": "well", "rejected": "ill"}, "answers_cut_off"),
    ],
)
def test_a_row_without_two_answers_to_one_prompt_is_bad(row: dict[str, Any], code: str) -> None:
    with refused(code, BadRow) as caught:
        TASK.encode(row, tiny.tokenizer(), plan())
    assert "completion" not in str(caught.value)


def test_a_row_is_one_example_and_what_is_cut_of_its_texts_is_counted_together() -> None:
    row = {"prompt": "how is he? ", "chosen": "well " * 60, "rejected": "ill"}
    found = TASK.encode(row, tiny.tokenizer(), plan())
    (example,) = found.examples
    assert example["chosen_tokens"] == 48
    assert len(example["input_ids"]) == len(example["labels"]) > 48
    assert (found.cut.rows, found.cut.answers) == (1, 1)
