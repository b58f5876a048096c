"""What is learned of a row, and metrics that do not depend on how rows were batched."""

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from transformers import AutoModelForTokenClassification, LlamaModel, pipeline

from nvflare_fm.adapter import RoundTask
from nvflare_fm.config import RoundPlan
from nvflare_fm.export.folder import Saved, write_adapter
from nvflare_fm.site import peft_methods
from nvflare_fm.site.tasks import IGNORED, BadRow, collate, registry
from nvflare_fm.site.worker import Worker
from tests.codes import refused
from tests.site import tiny, words

WORDS = tiny.tokenizer()


def encode(row: dict[str, Any], task: str = "causal_lm", **more: Any) -> dict[str, Any]:
    return encoded(row, WORDS, tiny.plan(task, **more))


def encoded(row: dict[str, Any], tokenizer: Any, plan: RoundPlan) -> dict[str, Any]:
    """The one example that a row becomes."""
    (example,) = registry[plan.task].encode(row, tokenizer, plan).examples
    return example


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
    assert learned(row) == "ill<end>well<end></s>"
    assert row["bytes"] == len("ill<end>well<end>")


ANSWER = "well and calm today"
TURNS = "{% for m in messages %}{{ m.role }}: {{ m.content }}{% if m.role == 'assistant' %}END{% endif %}\n{% endfor %}"
ENDS: dict[str, dict[str, Any]] = {  # how an end token can come in: the tokenizer's parts, its settings, the rows
    "nobody puts one": {},
    "the tokenizer's flag": {"settings": {"add_eos_token": True, "add_bos_token": True}},
    "the tokenizer's post-processor": {"around": ("<s>", "</s>")},
    "the post-processor, before another token": {"around": ("<s>", "</s> <unk>")},
    "the post-processor, for another token": {"around": ("<s>", "<end>")},
    "the data": {"row": {"prompt": "how is he? ", "completion": f"{ANSWER}</s>"}},
    "the data, before a line's end": {"row": {"prompt": "how is he? ", "completion": f"{ANSWER}</s>\n"}},
    "the data and the tokenizer": {
        "row": {"prompt": "how is he? ", "completion": f"{ANSWER}</s>"}, "around": ("<s>", "</s>"),
    },
    "padding with it": {"settings": {"pad_token": "</s>"}, "around": ("", "</s>")},
    "the beginning is the end": {"settings": {"bos_token": "</s>", "pad_token": "</s>"}, "around": ("</s>", "")},
    "the template": {"template": TURNS.replace("END", "</s>")},
    "the template, by eos_token": {"template": TURNS.replace("END", "{{ eos_token }}")},
    "the template, for another token": {"template": TURNS.replace("END", "<end>")},
    "not the template": {"template": TURNS.replace("END", "")},
    "the template, not the tokenizer": {"template": TURNS.replace("END", "</s>"), "around": ("<s>", "</s>")},
}  # fmt: skip


@pytest.mark.parametrize("how", ENDS)
def test_after_training_on_an_answer_generation_stops_behind_it(llama: Path, tmp_path: Path, how: str) -> None:
    given = ENDS[how]
    made = words.byte_level(size=320)
    tokenizer = words.fast(words.between(made, *given.get("around", ("", ""))), **given.get("settings", {}))
    tokenizer.chat_template = given.get("template")
    messages = [{"role": "user", "content": "how is he?"}, {"role": "assistant", "content": ANSWER}]
    row = {"messages": messages} if tokenizer.chat_template else {"prompt": "how is he? ", "completion": ANSWER}
    folder = shutil.copytree(llama, tmp_path / "model")
    tokenizer.save_pretrained(folder)
    file = str(tiny.jsonl(tmp_path / "rows.jsonl", [given.get("row", row)] * 4))
    worker = Worker("site-1", tiny.site(folder, Path(file), data={"notes": {"train": file, "validation": file}}))
    training = {"local_steps": 30, "batch_size": 1, "learning_rate": 1e-2}
    peft = {"method": "lora", "rank": 16, "lora_alpha": 16}
    plan = tiny.plan(training=training, evaluation={"before": False, "after": False}, peft=peft)
    update, job = worker.train(RoundTask(plan)), worker._job(RoundTask(plan), trains=True)
    ids, labels = job.data.train[0]["input_ids"], job.data.train[0]["labels"]
    begins = next(i for i, label in enumerate(labels) if label != IGNORED)
    with job.base.lent():
        model = peft_methods.attachment_of(plan.peft).attach(job.base, update.adapter, plan).eval()
        ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "max_new_tokens": 40}
        prompt = torch.tensor([ids[:begins]], device=model.device)
        said = model.generate(input_ids=prompt, do_sample=False, **ends)[0, begins:].tolist()
    assert ANSWER in tokenizer.decode(said)
    assert said[-1] == tokenizer.eos_token_id, tokenizer.decode(said)


def test_blanks_that_a_tokenizer_trims_off_are_learned_where_they_are_the_answers() -> None:
    for tokenizer in (words.fast(words.byte_level(trimmed=trimmed)) for trimmed in (True, False)):
        row = {"prompt": "how  is he?   ", "completion": "a    b  "}
        found = encoded(row, tokenizer, tiny.plan())
        assert tokenizer.decode([i for i in found["labels"] if i != IGNORED]).strip(" ") == "a    b  </s>"


def test_a_row_of_which_only_the_end_is_left_is_bad() -> None:
    tokenizer = words.fast(words.between(words.word_pieces(), "<s>", "</s>"))
    with refused("answers_cut_off", BadRow):
        encoded({"text": "\u200b"}, tokenizer, tiny.plan())


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
    ("row", "code"),
    [
        ({}, "value_missing"),
        ({"text": " "}, "value_empty"),
        ({"text": 3}, "value_not_text"),
        ({"prompt": "a"}, "value_missing"),
        ({"prompt": "how is it going? " * 9, "completion": "well"}, "answers_cut_off"),
        ({"messages": "hello"}, "not_a_conversation"),
        ({"messages": [{"role": "user", "content": "a"}]}, "no_assistant_turn"),
        ({"messages": [{"role": "assistant"}]}, "wrong_content"),
    ],
)
def test_a_row_without_an_answer_is_bad(row: dict[str, Any], code: str) -> None:
    with refused(code, BadRow):
        encode(row)


def test_a_template_that_does_not_write_an_answer_behind_its_own_prompt_is_told_of() -> None:
    words = tiny.tokenizer()
    words.chat_template = "{{ messages | length }}" + tiny.CHAT
    turns = [{"role": r, "content": "a"} for r in ("user", "assistant", "user", "assistant")]
    with refused("template_rewrites", BadRow):
        encoded({"messages": turns}, words, tiny.plan())


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


KINDS = words.kinds()
LETTERS = "aelwp3äöü€.,-'"
LISTS = st.lists(st.text(LETTERS, min_size=1, max_size=6), min_size=1, max_size=6)


@pytest.mark.parametrize("kind", KINDS)
@given(listed=LISTS)
def test_a_word_list_is_tokenized_as_the_running_text(kind: str, listed: list[str]) -> None:
    tokenizer, text = KINDS[kind], " ".join(listed)
    row = {"tokens": listed, "labels": [tiny.LABELS[i % 3] for i in range(len(listed))]}
    found = encoded(row, tokenizer, tiny.plan("token_classification"))
    assert found["input_ids"] == tokenizer(text)["input_ids"][:48]
    places = [i for i, label in enumerate(found["labels"]) if label != IGNORED]
    spans = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    starts = [len(" ".join([*listed[:i], ""])) for i in range(len(listed))]
    if kind != "sentence pieces":  # whose tokens may cover several words
        assert [tiny.LABELS[found["labels"][i]] for i in places] == row["labels"]
        assert all(start - 1 <= spans[i][0] <= start for i, start in zip(places, starts, strict=True))


@given(listed=LISTS, labels=st.data())
def test_where_no_blank_matters_a_word_lists_labels_are_where_transformers_examples_put_them(
    listed: list[str], labels: st.DataObject
) -> None:
    tokenizer = KINDS["word pieces"]
    row = {"tokens": listed, "labels": [labels.draw(st.sampled_from(tiny.LABELS)) for _ in listed]}
    found = encoded(row, tokenizer, tiny.plan("token_classification"))
    theirs = tokenizer(listed, is_split_into_words=True)
    of_word, before = theirs.word_ids(), [None, *theirs.word_ids()]
    assert found["input_ids"] == theirs["input_ids"]
    assert found["labels"] == [
        IGNORED if w is None or w == earlier else tiny.LABELS.index(row["labels"][w])
        for w, earlier in zip(of_word, before, strict=False)
    ]


def test_words_that_are_blank_have_no_label_and_do_not_shift_the_others() -> None:
    row = {"tokens": ["he", "", "is", " ", "ill"], "labels": ["calm", "ill", "well", "ill", "calm"]}
    for tokenizer in KINDS.values():
        found = encoded(row, tokenizer, tiny.plan("token_classification"))
        assert [label for label in found["labels"] if label != IGNORED] in ([0, 2, 0], [0, 0])


def test_batches_are_padded_on_the_right_and_padding_is_not_learned() -> None:
    batch = collate(
        [{"input_ids": [5], "labels": [5], "bytes": 1}, {"input_ids": [6, 7], "labels": [6, 7], "bytes": 2}], 9
    )
    assert batch["input_ids"].tolist() == [[5, 9], [6, 7]]
    assert batch["labels"].tolist() == [[5, IGNORED], [6, 7]]
    assert batch["attention_mask"].tolist() == [[1, 0], [1, 1]]
    assert batch["bytes"].tolist() == [1, 2]


@pytest.mark.parametrize("task", ["causal_lm", "sequence_classification", "token_classification"])
def test_metrics_do_not_depend_on_the_batch_size(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str
) -> None:
    worker = tiny.worker(tmp_path, llama, task)
    one, many = (worker.validate(RoundTask(tiny.plan(task, evaluation={"batch_size": size}))) for size in (1, 7))
    assert one == pytest.approx(many, rel=1e-5)
    sizes: list[int] = []
    monkeypatch.setattr("nvflare_fm.job.cost.MEASURED_AT_ONCE", 60)
    monkeypatch.setattr(LlamaModel, "forward", counting(LlamaModel.forward, sizes))
    assert worker.validate(RoundTask(tiny.plan(task, evaluation={"batch_size": 7}))) == pytest.approx(many, rel=1e-5)
    assert 0 < max(sizes) <= 60


def counting(forward: Any, sizes: list[int]) -> Any:
    """`forward`, which notes how many positions it is given."""

    def counted(self: Any, input_ids: torch.Tensor | None = None, **kwargs: Any) -> Any:
        sizes.append(input_ids.numel() if input_ids is not None else 0)
        return forward(self, input_ids=input_ids, **kwargs)

    return counted


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
        batch = {name: column.to(model.device) for name, column in batch.items()}
        assert worker.validate(RoundTask(plan))["loss"] == pytest.approx(float(model(**batch).loss), rel=1e-5)


def ner(labels: list[str], truth: list[str], answer: list[str]) -> dict[str, float]:
    """Metrics of two texts of equal length, their words' labels one after the other."""
    places = {which: torch.tensor([labels.index(x) for x in said]) for which, said in (("t", truth), ("a", answer))}
    columns = {"nats": torch.ones(len(truth)), "words": torch.tensor([len(truth) // 2] * 2)}
    plan = tiny.plan("token_classification", labels=labels)
    return registry["token_classification"].metrics(columns | {"label": places["t"], "answer": places["a"]}, plan)


@pytest.mark.parametrize(
    ("truth", "answer", "f1"),
    [
        ("B-x I-x O B-y", "B-x I-x O B-y", 1.0),
        ("B-x I-x O B-y", "B-x O O B-y", 0.5),  # half an entity is none
        ("B-x I-x O B-y", "B-y I-y O B-y", 0.5),  # nor is one of another kind
        ("B-x B-x O O", "B-x I-x O O", 0.0),  # two that touch are not one
        ("I-x I-x B-x O", "I-x I-x B-x O", 1.0),  # IOB1
        ("B-x E-x S-y O", "B-x E-x S-y O", 1.0),  # BIOES
        ("B-x L-x U-y O", "B-x L-x U-x O", 0.5),  # BILOU
        ("B I O O", "B I O B", 2 / 3),  # one kind
        ("x x O y", "x x O y", 1.0),  # no places: runs
        ("x x O y", "x O O y", 0.5),
        ("x O O x", "O x x O", 0.0),  # no entity runs over the end of a text
    ],
)
def test_entities_count_whole_in_every_scheme_of_places(truth: str, answer: str, f1: float) -> None:
    said = truth.split(), answer.split()
    found = ner(sorted({"O", *said[0], *said[1], *(["B", "I"] if "B" in said[0] else [])}), *said)
    assert found["f1"] == pytest.approx(f1)


def test_an_entity_at_the_end_of_one_text_and_at_the_start_of_the_next_are_two() -> None:
    assert ner(["O", "x"], ["O", "x", "x", "O"], ["O", "x", "O", "O"])["recall"] == 0.5


def test_where_there_is_no_entity_there_is_no_f1() -> None:
    found = ner(["O", "B-x"], ["O"] * 4, ["O", "B-x", "O", "O"])
    assert found.keys() == {"loss", "accuracy"}
    assert ner(["O", "B-x"], ["B-x"] * 4, ["O"] * 4)["f1"] == 0


def test_entities_are_found_in_running_text_after_training_on_word_lists(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "model")
    rows = [{"tokens": s.split(), "labels": ["B-state" if w in tiny.LABELS else "O" for w in s.split()]}
            for s in tiny.SENTENCES]  # fmt: skip
    file = tiny.jsonl(tmp_path / "rows.jsonl", rows)
    worker = Worker("site-1", tiny.site(folder, file, data={"notes": {"train": str(file), "validation": str(file)}}))
    plan = tiny.plan(
        "token_classification", labels=["O", "B-state"],
        training={"local_steps": 20, "batch_size": 20, "learning_rate": 1e-2},
    )  # fmt: skip
    update = worker.train(RoundTask(plan))
    assert update.report.after["f1"] == 1
    named = {"id2label": {0: "O", 1: "B-state"}, "label2id": {"O": 0, "B-state": 1}}
    model = PeftModel.from_pretrained(
        AutoModelForTokenClassification.from_pretrained(folder, **named),
        write_adapter(tmp_path / "adapter", Saved(update.adapter, update.manifest)),
    )
    find = pipeline("token-classification", model, tokenizer=tiny.tokenizer(), aggregation_strategy="first")
    for text, entities in zip(tiny.SENTENCES, find(tiny.SENTENCES), strict=True):
        assert [e["word"].strip() for e in entities] == [w for w in text.split() if w in tiny.LABELS]


@pytest.mark.parametrize("task", registry)
def test_a_row_that_is_made_up_fills_max_length_and_can_be_learned(task: str) -> None:
    plan = tiny.plan(task)
    (example,) = registry[task].encode(registry[task].made_up(plan), WORDS, plan).examples
    batch = registry[task].batch([example, example], 0)
    assert batch["input_ids"].shape == (2 * registry[task].promises.texts_per_row, plan.max_length)
    assert registry[task].items(batch) > 0
