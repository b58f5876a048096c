"""A language model's loss, some positions at a time: the plain loss and its gradients, of whatever is at a time, and
never more logits than that.
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
)

from nvflare_fm.adapter import RoundTask
from nvflare_fm.job.cost import LOGITS_AT_ONCE, positions_at_once
from nvflare_fm.site.model.base_model import BaseModel
from nvflare_fm.site.tasks import IGNORED, registry
from nvflare_fm.site.training import logits
from tests.site import tiny, zoo
from tests.site.held import Held

WORDS = 53
TASK = registry["causal_lm"]
_OPT = {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "word_embed_proj_dim": 16}
_HEADS = {"head_dim": 8, "num_key_value_heads": 2}
# Between a head's product and the logits there is a cap, a factor, a divisor; and OPT's backbone is not where it says.
MODELS: dict[str, Callable[[int], Any]] = {
    **zoo.DECODERS,
    "llama": lambda n: LlamaConfig(vocab_size=n, **zoo._COMMON),
    "gemma2": lambda n: Gemma2Config(vocab_size=n, final_logit_softcapping=2.0, **_HEADS, **zoo._COMMON),
    "cohere": lambda n: CohereConfig(vocab_size=n, logit_scale=0.3, **zoo._COMMON),
    "granite": lambda n: GraniteConfig(vocab_size=n, logits_scaling=3.0, **zoo._COMMON),
    "opt": lambda n: OPTConfig(vocab_size=n, **_OPT, pad_token_id=0, max_position_embeddings=64, dropout=0.0),
}
ADAPTERS: dict[str, Callable[[], Any]] = {
    "lora": lambda: LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"),
    "lora on the head": lambda: LoraConfig(r=2, target_modules=["lm_head", "q_proj"], task_type="CAUSAL_LM"),
    "a whole head": lambda: LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "the head alone": lambda: LoraConfig(r=2, target_modules=["lm_head"]),
    "a prompt": lambda: PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
}


@cache
def made(
    family: str, adapter: str = "lora", dtype: torch.dtype = torch.float32, words: int = WORDS
) -> tuple[PeftModel, BaseModel]:
    """A model with an adapter that is no longer at its start, and the same as a site knows it."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MODELS[family](words)).to(dtype).eval().requires_grad_(False)
    backbone = logits.find_backbone(model, list(range(8)))
    base = BaseModel(model, None, TASK, "", "fp32", dtype, (), frozenset(), backbone=backbone)  # type: ignore[arg-type]
    with_adapter = get_peft_model(model, ADAPTERS[adapter]())
    for parameter in with_adapter.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape) * 0.2
    return with_adapter, base


@st.composite
def batches(draw: st.DrawFn) -> dict[str, Tensor]:
    """Rows of unequal length; of each, something is learned."""
    rows = []
    for _ in range(draw(st.integers(1, 3))):
        ids = draw(st.lists(st.integers(1, WORDS - 1), min_size=2, max_size=6))
        learned = draw(st.lists(st.booleans(), min_size=len(ids) - 1, max_size=len(ids) - 1))
        learned[draw(st.integers(0, len(learned) - 1))] = True
        rows.append(
            {
                "input_ids": ids,
                "labels": [IGNORED, *(i if x else IGNORED for i, x in zip(ids[1:], learned, strict=True))],
            }
        )
    return TASK.batch(rows, 0)


def nats(answers: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(answers, targets, reduction="sum")


def plainly(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """As transformers' own loss has it: all logits, shifted; what is not learned is ignored."""
    said = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    said, labels = said[:, -batch["labels"].shape[1] :][:, :-1].float(), batch["labels"][:, 1:]
    return cross_entropy(said.flatten(0, 1), labels.flatten(), reduction="sum", ignore_index=IGNORED)


def with_gradients(model: Any, loss: Callable[[], Tensor]) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad()
    value = loss()
    value.backward()
    return float(value), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def agree(family: str, adapter: str, batch: dict[str, Tensor], at_once: int, dtype: torch.dtype, close: float) -> None:
    model, base = made(family, adapter, dtype)
    assert base.backbone is not None
    with pytest.MonkeyPatch.context() as patch, base.autocast():
        patch.setattr(logits, "positions_at_once", lambda words: at_once)
        ours, gradients = with_gradients(model, lambda: logits.total(model, base, batch, nats) / 3)  # as a trainer does
        with torch.inference_mode():
            parts = logits.each(model, base, batch, nats)
        theirs, expected = with_gradients(model, lambda: plainly(model, batch) / 3)
    assert ours == pytest.approx(theirs, rel=close)
    assert float(sum(parts)) / 3 == pytest.approx(theirs, rel=close)
    assert gradients.keys() == expected.keys()
    assert gradients
    largest = max(float(gradient.norm()) for gradient in expected.values())
    for name, gradient in expected.items():
        off = float((gradients[name] - gradient).norm())
        least = largest * (0.1 if dtype == torch.float32 else 1.0)  # some cancel out to nearly nothing
        assert off <= close * max(float(gradient.norm()), least), name


@pytest.mark.parametrize("family", MODELS)
@settings(max_examples=max(10, settings.default.max_examples // 4))  # the families differ, the law is one
@given(batch=batches(), at_once=st.integers(1, 20))
def test_loss_and_gradients_are_the_plain_ones_for_every_family(
    family: str, batch: dict[str, Tensor], at_once: int
) -> None:
    agree(family, "lora", batch, at_once, torch.float32, 1e-4)


@pytest.mark.parametrize("adapter", ADAPTERS)
@given(batch=batches(), at_once=st.integers(1, 20))
def test_loss_and_gradients_are_the_plain_ones_for_every_adapter(
    adapter: str, batch: dict[str, Tensor], at_once: int
) -> None:
    agree("llama", adapter, batch, at_once, torch.float32, 1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@given(batch=batches(), at_once=st.integers(1, 20))
def test_loss_and_gradients_are_the_plain_ones_in_sixteen_bits(
    dtype: torch.dtype, batch: dict[str, Tensor], at_once: int
) -> None:
    agree("llama", "lora on the head", batch, at_once, dtype, 3e-2)


@given(batch=batches(), at_once=st.integers(1, 6))
def test_no_more_logits_are_made_than_those_at_a_time(batch: dict[str, Tensor], at_once: int) -> None:
    model, base = made("llama", words=997)
    with pytest.MonkeyPatch.context() as patch, Held() as held:
        patch.setattr(logits, "positions_at_once", lambda words: at_once)
        logits.total(model, base, batch, nats).backward()
    assert held.largest <= max(997 * min(at_once, len(batch["targets"])), 2 * 48 * batch["input_ids"].numel())


def test_a_head_that_is_not_apart_answers_for_all_positions_and_the_loss_is_the_same() -> None:
    class Adding(LlamaForCausalLM):  # type: ignore[misc]
        def forward(self, *args: Any, input_ids: Any = None, **kwargs: Any) -> Any:
            said = super().forward(*args, input_ids=input_ids, **kwargs)
            said.logits = said.logits + torch.nn.functional.one_hot(input_ids, WORDS)
            return said

    torch.manual_seed(0)
    model = Adding(LlamaConfig(vocab_size=WORDS, **zoo._COMMON)).eval()
    assert logits.find_backbone(model, list(range(8))) is None
    base = BaseModel(model, None, TASK, "", "fp32", torch.float32, (), frozenset())  # type: ignore[arg-type]
    batch = TASK.batch([{"input_ids": [3, 4, 5], "labels": [IGNORED, 4, 5]}], 0)
    assert float(logits.total(model, base, batch, nats)) == pytest.approx(float(plainly(model, batch)), rel=1e-5)


@pytest.mark.parametrize("family", MODELS)
def test_without_weights_the_same_is_known(family: str) -> None:
    with torch.device("meta"):
        bare = AutoModelForCausalLM.from_config(MODELS[family](WORDS))
    assert logits.find_backbone(bare, list(range(8))) is not None


@pytest.mark.parametrize("quantization", ["fp32", "nf4"])
def test_a_site_trains_and_measures_the_same_however_many_positions_are_at_a_time(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quantization: str
) -> None:
    peft = {"method": "lora", "rank": 4, "target_modules": ["q_proj", "down_proj"]}
    training = {"local_steps": 3, "batch_size": 4, "gradient_accumulation_steps": 2, "gradient_checkpointing": True}
    task = RoundTask(tiny.plan(quantization=quantization, peft=peft, training=training))
    worker = tiny.worker(tmp_path, llama, "causal_lm")
    whole = worker.train(task)
    monkeypatch.setattr(logits, "positions_at_once", lambda words: 7)
    parts = worker.train(task)
    assert parts.report.before == pytest.approx(whole.report.before, rel=1e-5)
    assert parts.report.after == pytest.approx(whole.report.after, rel=1e-4)
    assert parts.report.loss == pytest.approx(whole.report.loss, rel=1e-5)
    theirs = whole.adapter.tensors()
    for name, tensor in parts.adapter.tensors().items():
        torch.testing.assert_close(tensor, theirs[name], atol=1e-5, rtol=1e-3)


def test_the_backbone_is_as_it_was_whatever_the_head_does(monkeypatch: pytest.MonkeyPatch) -> None:
    model, base = made("llama")
    assert base.backbone is not None

    error = ValueError("the loss")

    def fail(*_: Any) -> Tensor:
        raise error

    batch = TASK.batch([{"input_ids": [3, 4, 5], "labels": [IGNORED, 4, 5]}], 0)
    for at_once in (1, 9):
        monkeypatch.setattr(logits, "positions_at_once", lambda words: at_once)  # noqa: B023
        with pytest.raises(ValueError) as caught:
            logits.total(model, base, batch, fail)
        assert caught.value is error
        assert "forward" not in base.backbone.__dict__
        assert not base.backbone._forward_hooks


def test_a_small_vocabulary_is_answered_for_at_once_and_a_large_one_in_parts() -> None:
    assert positions_at_once(320) > 32 * 2048
    assert positions_at_once(128256) * 128256 <= LOGITS_AT_ONCE
    assert positions_at_once(2**40) == positions_at_once(0) // LOGITS_AT_ONCE == 1
