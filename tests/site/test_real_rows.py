"""Public data as they stand, in the shapes people have, become rows of the task they are for."""

import csv
import gzip
import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from nvflare_fm.errors import DataError
from nvflare_fm.site.data import loading as data
from nvflare_fm.site.data.loading import SiteData
from nvflare_fm.site.offer.site_config import DataSource
from nvflare_fm.site.tasks import Cut, registry
from tests.codes import refused
from tests.site import chats, tiny

pytestmark = pytest.mark.realdata
HERMES, PLAIN = chats.tokenizer(chats.HERMES), chats.tokenizer(None)


def load(file: Path, task: str, tokenizer: Any = HERMES, labels: tuple[str, ...] = (), **more: Any) -> SiteData:
    source = DataSource.model_validate({"train": str(file), **more})
    plan = tiny.plan(task, labels=labels, max_length=4096)
    return data.load(source, plan, registry[task], tokenizer)


def text(found: SiteData, i: int = 0) -> str:
    return str(HERMES.decode(found.train["input_ids"][i]))


@pytest.mark.parametrize("tokenizer", [HERMES, PLAIN], ids=["a chat template", "none"])
def test_alpaca_as_it_stands(shared: Path, tmp_path: Path, tokenizer: Any) -> None:
    rows = json.loads((shared / "data/formats/alpaca.json").read_text())
    found = load(tiny.jsonl(tmp_path / "alpaca.jsonl", rows), "causal_lm", tokenizer)
    assert (len(found.train) + len(found.validation), found.bad_rows) == (len(rows), 0)
    inputs = [row["input"] for row in rows if row["input"]]
    texts = [tokenizer.decode(ids) for ids in [*found.train["input_ids"][:], *found.validation["input_ids"][:]]]
    assert all(any(given[:60] in told for told in texts) for given in inputs)


def test_sharegpt_and_tool_calls_as_they_stand(shared: Path) -> None:
    for name in ("sharegpt", "openai_tools"):
        file = shared / f"data/formats/{name}.jsonl"
        count = len(file.read_text().splitlines())
        found = load(file, "causal_lm")
        assert (len(found.train) + len(found.validation), found.bad_rows) == (count, 0)
    assert '<tool_call>\n{"name": "x", "arguments": {}}\n</tool_call>' in text(found)
    with refused("bad_rows", DataError, "tool call"):
        load(shared / "data/formats/openai_tools.jsonl", "causal_lm", chats.tokenizer(chats.CHATML))


def test_labels_with_stray_blanks_and_capitals_as_they_stand(shared: Path) -> None:
    labels = tuple(label.lower() for label in json.loads((shared / "data/banking77/categories.json").read_text()))
    found = load(shared / "data/formats/space_label.jsonl", "sequence_classification", PLAIN, labels)
    assert found.bad_rows == 0
    assert any("'age_limit'" in remark for remark in found.remarks)


def test_banking77_as_it_stands(shared: Path) -> None:
    labels = tuple(json.loads((shared / "data/banking77/categories.json").read_text()))
    columns = {"label": "category"}
    found = load(shared / "data/banking77/test.csv", "sequence_classification", PLAIN, labels, columns=columns)
    assert (len(found.train) + len(found.validation), found.bad_rows, found.cut) == (3080, 0, Cut())


@pytest.mark.parametrize(("asked", "answer"), [("dialogue", "section_text"), ("section_text", "dialogue")])
def test_mts_dialog_in_both_directions_as_it_stands(shared: Path, asked: str, answer: str) -> None:
    file = shared / "data/mts_dialog/MTS-Dialog-ValidationSet.csv"
    with file.open(newline="", encoding="utf-8") as lines:
        rows = list(csv.DictReader(lines))
    for columns in ({"prompt": asked, "completion": answer}, {"instruction": asked, "output": answer}):
        found = load(file, "causal_lm", columns=columns)
        assert (len(found.train) + len(found.validation), found.bad_rows) == (len(rows), 0)
        assert rows[0][asked].split("\n")[0].strip() in text(found)
        assert rows[0][answer][-30:].strip() in text(found)


def test_medquads_questions_and_answers_as_they_stand(shared: Path, tmp_path: Path) -> None:
    with gzip.open(shared / "data/medquad/medquad.jsonl.gz", "rt", encoding="utf-8") as lines:
        (tmp_path / "a.jsonl").write_text("".join(islice(lines, 40)), encoding="utf-8")
    found = load(tmp_path / "a.jsonl", "causal_lm", columns={"instruction": "question", "output": "answer"})
    assert (len(found.train) + len(found.validation), found.bad_rows) == (40, 0)
    assert text(found).startswith("<|im_start|>user\nWhat is")


def test_pubmedqas_questions_are_classified_and_answered(shared: Path, tmp_path: Path) -> None:
    rows = list(json.loads((shared / "data/pubmedqa/pqal_train500.json").read_text()).values())
    file = tiny.jsonl(tmp_path / "a.jsonl", rows)
    columns = {"text": "QUESTION", "label": "final_decision"}
    found = load(file, "sequence_classification", PLAIN, ("yes", "no", "maybe"), columns=columns)
    assert (len(found.train) + len(found.validation), found.bad_rows) == (500, 0)
    found = load(file, "causal_lm", columns={"instruction": "QUESTION", "output": "LONG_ANSWER"})
    assert (len(found.train) + len(found.validation), found.bad_rows) == (500, 0)
