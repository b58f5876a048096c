"""What is learned of a row, and metrics that do not depend on how rows were batched."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.metrics import f1_score

from nvflare_fm.adapter import RoundTask
from nvflare_fm.site.tasks import IGNORED, BadRow, collate, registry
from tests.site import tiny

WORDS = tiny.tokenizer()


def encode(row: dict[str, Any], task: str = "causal_lm", **more: Any) -> dict[str, Any]:
    return registry[task].encode(row, WORDS, tiny.plan(task, **more))


def learned(row: dict[str, Any]) -> str:
    return WORDS.decode([label for label in row["labels"] if label != IGNORED])


def test_only_the_completion_is_learned_and_its_end() -> None:
    row = encode({"prompt": "how is he? ", "completion": "he is well"})
    assert learned(row) == "he is well</s>"
    assert WORDS.decode(row["input_ids"]) == "how is he? he is well</s>"
    assert row["bytes"] == len("he is well")


def test_a_token_that_straddles_the_start_of_the_answer_is_learned() -> None:
    row = encode({"prompt": "patient 1 is", "completion": " well"})
    assert learned(row).endswith("well</s>")
    assert " is" not in learned(row)


def test_every_assistant_turn_is_learned_and_nothing_else() -> None:
    turns = [("system", "be kind"), ("user", "hello"), ("assistant", "ill"), ("user", "why"), ("assistant", "well")]
    row = encode({"messages": [{"role": role, "content": text} for role, text in turns]})
    assert learned(row) == "ill<end>well<end>"
    assert row["bytes"] == len("ill<end>well<end>")


def test_plain_text_is_learned_whole_but_for_the_token_nothing_predicts() -> None:
    row = encode({"text": "patient is ill"})
    first = WORDS.decode(row["input_ids"][:1])
    assert first + learned(row) == "patient is ill</s>"
    assert row["bytes"] == len("patient is ill") - len(first)


def test_bytes_are_those_of_utf8_and_of_the_part_that_was_kept() -> None:
    assert encode({"prompt": "a", "completion": "äöü€"})["bytes"] == 9
    cut = encode({"prompt": "a", "completion": "x y z x y z x y z x y z"}, max_length=8)
    assert len(cut["input_ids"]) == 8
    assert cut["bytes"] == len(learned(cut))


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({}, "none of"),
        ({"text": " "}, "'text' is empty"),
        ({"text": 3}, "not a text"),
        ({"prompt": "a"}, "'completion' is missing"),
        ({"prompt": "how is it going? " * 9, "completion": "well"}, "max_length"),
        ({"messages": "hello"}, "not a list"),
        ({"messages": [{"role": "user", "content": "a"}]}, "no assistant turn"),
        ({"messages": [{"role": "assistant"}]}, "'content'"),
    ],
)
def test_a_row_without_an_answer_is_bad(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRow, match=reason):
        encode(row)


def test_a_template_that_rewrites_earlier_turns_is_told_of() -> None:
    words = tiny.tokenizer()
    words.chat_template = "{{ messages | length }}" + tiny.CHAT
    turns = [{"role": r, "content": "a"} for r in ("user", "assistant", "user", "assistant")]
    with pytest.raises(BadRow, match="rewrites earlier turns"):
        registry["causal_lm"].encode({"messages": turns}, words, tiny.plan())
    words.chat_template = None
    with pytest.raises(BadRow, match="no chat template"):
        registry["causal_lm"].encode({"messages": turns}, words, tiny.plan())


@pytest.mark.parametrize("label", ["worse", "", None, 7])
def test_a_label_that_is_not_the_plans_is_bad_and_not_repeated(label: Any) -> None:
    with pytest.raises(BadRow) as caught:
        encode({"text": "a", "label": label}, "sequence_classification")
    assert "worse" not in str(caught.value)


def test_a_word_is_learned_once_at_its_first_token() -> None:
    row = encode({"tokens": ["unheardof", "is", "ill"], "labels": ["calm", "well", "ill"]}, "token_classification")
    assert len(row["input_ids"]) > 3
    assert [label for label in row["labels"] if label != IGNORED] == [0, 2, 1]
    assert row["labels"][0] == 0


def test_batches_are_padded_on_the_right_and_padding_is_not_learned() -> None:
    batch = collate(
        [{"input_ids": [5], "labels": [5], "bytes": 1}, {"input_ids": [6, 7], "labels": [6, 7], "bytes": 2}], 9
    )
    assert batch["input_ids"].tolist() == [[5, 9], [6, 7]]
    assert batch["labels"].tolist() == [[5, IGNORED], [6, 7]]
    assert batch["attention_mask"].tolist() == [[1, 0], [1, 1]]
    assert batch["bytes"].tolist() == [1, 2]


@pytest.mark.parametrize("task", ["causal_lm", "sequence_classification", "token_classification"])
def test_metrics_do_not_depend_on_the_batch_size(llama: Path, tmp_path: Path, task: str) -> None:
    worker = tiny.worker(tmp_path, llama, task)
    one, many = (worker.validate(RoundTask(tiny.plan(task, evaluation={"batch_size": size}))) for size in (1, 7))
    assert one == pytest.approx(many, rel=1e-5)


def test_language_model_metrics_are_the_means_they_say() -> None:
    nats, tokens, size = torch.tensor([2.0, 6.0]), torch.tensor([1, 3]), torch.tensor([4, 12])
    found = registry["causal_lm"].metrics({"nats": nats, "tokens": tokens, "bytes": size}, tiny.plan())
    assert found == pytest.approx({"loss": 2.0, "perplexity": math.exp(2.0), "bits_per_byte": 8 / math.log(2) / 16})


def test_the_loss_of_evaluation_is_the_models_own(llama: Path, tmp_path: Path) -> None:
    worker, plan = tiny.worker(tmp_path, llama, "causal_lm"), tiny.plan(evaluation={"batch_size": 24})
    job = worker._job(RoundTask(plan), trains=True)
    batch = collate(list(job.data.validation), 0)
    batch.pop("bytes")
    with job.base.lent() as model, torch.inference_mode():
        assert worker.validate(RoundTask(plan))["loss"] == pytest.approx(float(model(**batch).loss), rel=1e-5)


def test_macro_f1_of_tokens_leaves_out_what_most_words_bear() -> None:
    plan = tiny.plan("token_classification", labels=["O", "drug", "dose"])
    truth, answer = torch.tensor([0, 0, 0, 1, 2, 2]), torch.tensor([0, 0, 1, 1, 2, 0])
    found = registry["token_classification"].metrics({"nats": torch.ones(6), "label": truth, "answer": answer}, plan)
    assert found["macro_f1"] == pytest.approx(f1_score(truth, answer, labels=[1, 2], average="macro"))
    only_o = registry["token_classification"].metrics(
        {"nats": torch.ones(6), "label": truth, "answer": torch.zeros(6, dtype=int)}, plan
    )
    assert only_o["macro_f1"] == 0
