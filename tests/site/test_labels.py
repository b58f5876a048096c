"""Labels as files have them: what is taken is told, what is not has a reason to act on, and no value is repeated."""

import logging
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nvflare_fm.errors import DataError
from nvflare_fm.site.data import loading as data
from nvflare_fm.site.offer.site_config import DataSource
from nvflare_fm.site.tasks import BadRow, registry
from nvflare_fm.site.tasks.labels import find
from tests.codes import refused
from tests.site import tiny

LABELS = ("age_limit", "Refund", "no-show")
WORDS = tiny.tokenizer()


def load(file: Path, task: str = "sequence_classification", labels: tuple[str, ...] = LABELS, **more: Any) -> Any:
    source = DataSource.model_validate({"train": str(file), **more})
    return data.load(source, tiny.plan(task, labels=labels), registry[task], WORDS)


@given(labels=st.lists(st.text(max_size=6).filter(str.strip), min_size=2, max_size=5, unique=True))
def test_each_of_the_plans_labels_is_itself_whatever_it_looks_like(labels: list[str]) -> None:
    assert [find(label, tuple(labels)) for label in labels] == [(place, "") for place in range(len(labels))]


@pytest.mark.parametrize("label", ["Age Limit ", " AGE-LIMIT", "age  limit", "age_limit\t", "Age_Limit"])
def test_a_label_that_differs_in_blanks_and_capitals_is_taken_and_told(label: str) -> None:
    place, remark = find(label, LABELS)
    assert place == 0
    assert "'age_limit'" in remark
    assert label not in remark


def test_a_label_that_could_be_two_of_the_plans_is_neither() -> None:
    labels = ("Calm", "calm", "ill")
    assert [find(label, labels)[0] for label in labels] == [0, 1, 2]
    with refused("unknown_label", BadRow):
        find("CALM", labels)


@given(place=st.integers(-3, 5), blanks=st.sampled_from(["{}", " {}", "{} "]))
def test_a_number_is_a_place_where_no_label_is_a_number(place: int, blanks: str) -> None:
    for label in (place, blanks.format(place)):
        if 0 <= place < 3:
            found, remark = find(label, LABELS)
            assert found == place
            assert repr(LABELS[place]) in remark
        else:
            with pytest.raises(BadRow):
                find(label, LABELS)


def test_where_a_label_is_a_number_no_number_is_a_place() -> None:
    assert [find(label, ("1", "2", "3"))[0] for label in (1, "2", " 3")] == [0, 1, 2]
    assert find(1, ("low", "2", "1"))[0] == 2
    for label in (0, "0", 3):
        with refused("unknown_label", BadRow):
            find(label, ("low", "2", "1"))


@pytest.mark.parametrize(
    ("label", "code"),
    [
        (["Refund"], "multi_label"), ([0, 1, 1], "multi_label"), ("['Refund', 'no-show']", "multi_label"),
        (0.5, "regression"), (1.0, "regression"), ("36.6", "regression"), ("-0,5", "regression"),
        (None, "value_missing"), ("", "value_missing"), ("  ", "value_missing"), (float("nan"), "value_missing"),
        (True, "unknown_label"), ({"a": 1}, "label_type"), (b"Refund", "label_type"), (7, "unknown_label"),
    ],
)  # fmt: skip
def test_what_is_no_label_is_a_bad_row(label: Any, code: str) -> None:
    with refused(code, BadRow):
        find(label, LABELS)


def test_a_site_whose_labels_are_lists_or_numbers_is_told_which_task_they_are_for(tmp_path: Path) -> None:
    for rows, code in (
        ([{"text": "a", "label": ["Refund"]}], "multi_label"),
        ([{"text": "a", "labels": ["Refund"]}], "multi_label"),
        ([{"text": "a", "label": 36.6}, {"text": "b", "label": 38.0}, {"text": ""}], "regression"),
    ):
        with pytest.raises(DataError) as caught:
            load(tiny.jsonl(tmp_path / "a.jsonl", rows))
        assert caught.value.code == code
        assert "36" not in str(caught.value)


def test_one_usable_row_keeps_the_kind_of_the_others_from_the_job(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"text": "a", "label": 0.5}] * 9 + [{"text": "a", "label": "Refund"}]
    with pytest.raises(DataError) as caught:
        load(tiny.jsonl(tmp_path / "a.jsonl", rows))
    assert caught.value.code == "bad_rows"


def test_the_sites_log_names_the_plans_nearest_label_and_no_value(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"text": "a", "label": label} for label in ("Age Limit ", "Age Limit ", "Refund", "Refnud", "Xyzzyx", "2")]
    with caplog.at_level(logging.WARNING):
        found = load(tiny.jsonl(tmp_path / "a.jsonl", rows), max_bad_rows=0.5)
    assert found.bad_rows == 2
    assert "2 rows: a label is taken as the plan's 'age_limit'" in caplog.text
    assert "1 row: the number 2 is taken as the place of the plan's label 'no-show'" in caplog.text
    assert "line 4: 'label' is not among the plan's labels (the nearest is 'Refund')" in caplog.text
    assert "line 5: 'label' is not among the plan's labels (in all" in caplog.text
    assert not any(value in caplog.text for value in ("Age Limit", "Refnud", "Xyzzyx"))
    with pytest.raises(DataError) as caught:
        load(tmp_path / "a.jsonl")
    assert not any(label in caught.value.message for label in LABELS)


def test_a_site_says_which_of_the_plans_labels_its_own_are(tmp_path: Path) -> None:
    codes = {"AL": "age_limit", "7": "Refund"}
    rows = [{"text": "a", "label": label} for label in ("AL", 7, "no-show", "AL")]
    source = {"train": str(tiny.jsonl(tmp_path / "a.jsonl", rows)), "labels": codes}
    source["validation"] = source["train"]
    plan = tiny.plan("sequence_classification", labels=LABELS)
    found = data.load(DataSource.model_validate(source), plan, registry[plan.task], WORDS)
    assert found.train["labels"][:] == [0, 1, 2, 0]


def test_a_column_that_is_in_no_row_is_named_with_those_found(tmp_path: Path) -> None:
    file = tiny.jsonl(tmp_path / "a.jsonl", [{"body": "SECRET", "label": "Refund"}] * 3)
    with pytest.raises(DataError) as caught:
        load(file, columns={"text": "bdy"})
    assert caught.value.code == "column_missing"
    assert "no column 'bdy', did you mean \"body\"? found: 'body', 'label'" in str(caught.value)
    assert "body" not in caught.value.message
    with pytest.raises(DataError) as asked:
        load(file)
    assert "found: 'body', 'label'; perhaps: columns: {\"text\": \"body\"}" in asked.value.local
    assert load(file, columns={"text": "body"}).bad_rows == 0
    assert "SECRET" not in str(caught.value)


TAGS = ("O", "B-drug", "I-drug", "B-dose")


def tagged(words: str, labels: list[Any]) -> dict[str, Any]:
    return {"tokens": words.split(), "labels": labels}


def test_tags_are_names_or_places() -> None:
    plan = tiny.plan("token_classification", labels=TAGS)
    task = registry["token_classification"]
    named = task.encode(tagged("take aspirin now", ["O", "B-drug", "O"]), WORDS, plan)
    assert task.encode(tagged("take aspirin now", [0, 1, 0]), WORDS, plan).examples == named.examples
    assert task.encode(tagged("take aspirin now", ["o", "b_drug", "O"]), WORDS, plan).examples == named.examples
    with pytest.raises(BadRow) as caught:
        task.encode(tagged("take aspirin", [["O"], ["B-drug"]]), WORDS, plan)
    assert caught.value.code == "multi_label"


@given(length=st.integers(8, 30))
def test_every_entity_is_learned_whole_or_counted(length: int) -> None:
    plan = tiny.plan("token_classification", labels=TAGS, max_length=length)
    words = "he is ill take aspirin strong today and walks 3 mg"
    labels = ["O", "O", "O", "O", "B-drug", "I-drug", "O", "O", "O", "B-dose", "B-dose"]
    found = registry["token_classification"].encode(tagged(words, labels), WORDS, plan)
    kept = [label for label in found.examples[0]["labels"] if label >= 0]
    assert kept == [TAGS.index(label) for label in labels][: len(kept)]
    whole = (len(kept) > 5) + (len(kept) > 9) + (len(kept) > 10)
    assert found.cut.entities == 3 - whole
    assert found.cut.tokens == max(0, len(WORDS(words)["input_ids"]) - length)
    assert found.cut.rows == (found.cut.tokens > 0)


def test_a_text_that_is_cut_is_counted_at_the_site_and_told_in_its_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"text": "word " * (60 if i == 0 else 3), "label": "Refund"} for i in range(20)]
    with caplog.at_level(logging.INFO):
        found = load(tiny.jsonl(tmp_path / "a.jsonl", rows))
    tokens = len(WORDS("word " * 60)["input_ids"])
    assert (found.cut.rows, found.cut.tokens, found.cut.answers, found.cut.entities) == (1, tokens - 48, 0, 0)
    (told,) = [record for record in caplog.records if "cut" in record.message]
    assert told.levelno == logging.INFO
    assert f"1 row is cut: {tokens - 48} tokens" in told.message
    with caplog.at_level(logging.INFO):
        load(tiny.jsonl(tmp_path / "a.jsonl", rows[:3]))
    assert caplog.records[-1].levelno == logging.WARNING
