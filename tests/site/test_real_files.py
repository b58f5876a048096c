"""Public files as they stand give the rows that they hold, for the task they are for."""

import csv
import gzip
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from nvflare_fm.site.data import loading as data
from nvflare_fm.site.data.check import inspect, word_tokenizer
from nvflare_fm.site.data.rows import how_to_read, rows
from nvflare_fm.site.offer.site_config import DataSource
from nvflare_fm.site.tasks import registry
from tests.site import tiny

pytestmark = pytest.mark.realdata
FORMATS = {  # what `data check` must tell of each
    "excel_de.csv": "csv, encoding cp1252, delimiter ';' (guessed: encoding, delimiter)",
    "tab.tsv": r"csv, encoding utf-8, delimiter '\t' (guessed: encoding, delimiter)",
    "array_oneline.json": "json, encoding utf-8 (guessed: encoding)",
    "space_label.jsonl": "jsonl, encoding utf-8 (guessed: encoding)",
    "alpaca.json": "json, encoding utf-8 (guessed: encoding)",
    "sharegpt.jsonl": "jsonl, encoding utf-8 (guessed: encoding)",
    "openai_tools.jsonl": "jsonl, encoding utf-8 (guessed: encoding)",
}


def records(file: Path) -> list[Any]:
    """The rows as the standard library reads the file, told how."""
    if file.suffix in (".csv", ".tsv"):
        german = file.name == "excel_de.csv"
        with file.open(encoding="cp1252" if german else "utf-8", newline="") as opened:
            delimiter = ";" if german else "\t" if file.suffix == ".tsv" else ","
            return list(csv.DictReader(opened, delimiter=delimiter))
    if file.suffix == ".json":
        found = json.loads(file.read_text(encoding="utf-8"))
        return found if isinstance(found, list) else list(found.values())
    content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    return [json.loads(line) for line in content.split(b"\n") if line]


def read(file: Path) -> Iterable[Any]:
    return [row for _, row in rows(how_to_read(file, DataSource(train=str(file)), "train"))]


@pytest.mark.parametrize("name", FORMATS)
def test_a_file_as_people_bring_it_is_guessed_and_read_whole(shared: Path, name: str) -> None:
    file = shared / "data/formats" / name
    assert read(file) == records(file)
    assert str(how_to_read(file, DataSource(train=str(file)), "train")) == FORMATS[name]


MTS = "mts_dialog/MTS-Dialog-{}.csv"
DATA: list[
    tuple[str, str, dict[str, str], int]
] = [  # what `data check` proposes where names differ, and how many labels
    ("banking77/train.csv", "sequence_classification", {"label": "category"}, 77),
    (MTS.format("TrainingSet"), "sequence_classification", {"text": "dialogue", "label": "section_header"}, 20),
    (MTS.format("TrainingSet"), "causal_lm", {"prompt": "dialogue", "completion": "section_text"}, 0),
    (MTS.format("ValidationSet"), "causal_lm", {"prompt": "section_text", "completion": "dialogue"}, 0),
    ("pubmedqa/pqal_train500.json", "sequence_classification", {"text": "QUESTION", "label": "final_decision"}, 3),
    ("medquad/medquad.jsonl.gz", "sequence_classification", {"text": "question", "label": "qtype"}, 16),
    ("formats/excel_de.csv", "sequence_classification", {}, 6),
    ("formats/tab.tsv", "sequence_classification", {}, 6),
    ("formats/array_oneline.json", "sequence_classification", {}, 6),
]


@pytest.mark.parametrize(("name", "task", "columns", "labels"), DATA)
def test_a_public_data_set_is_trained_on_as_it_stands(
    shared: Path, name: str, task: str, columns: dict[str, str], labels: int
) -> None:
    """Every row is used; where a task has labels, it has all of them."""
    file = shared / "data" / name
    source = DataSource.model_validate({"train": str(file), "columns": columns})
    whole = records(file)
    known = tuple(sorted({row[columns.get("label", "label")] for row in whole})) if labels else ()
    assert len(known) == labels
    found = data.load(source, tiny.plan(task, labels=known, max_length=8192), registry[task], word_tokenizer())
    assert found.bad_rows == 0
    assert len(found.train) + len(found.validation) == len(whole)


def test_medical_questions_are_read_whole_and_answered(shared: Path, tmp_path: Path) -> None:
    file = shared / "data/medquad/medquad.jsonl.gz"
    whole = records(file)
    assert read(file) == whole
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(json.dumps({"data": whole[:1000]}, indent=1).encode()))
    found = inspect(DataSource(train=str(tmp_path / "a.json.gz")), "causal_lm")
    assert found.columns == {"instruction": "question", "output": "answer"}
    assert (found.good, found.reasons.total()) == (1000, 0)


PROPOSED = ("banking77/train.csv", MTS.format("ValidationSet"), "pubmedqa/pqal_train500.json")


@pytest.mark.parametrize("name", PROPOSED)
def test_columns_of_a_public_data_set_are_found_by_their_names(shared: Path, name: str) -> None:
    expected = next(columns for file, _, columns, _ in DATA if file.split("-T")[0] == name.split("-V")[0])
    found = inspect(DataSource(train=str(shared / "data" / name)), "sequence_classification")
    assert found.columns == expected
    assert not found.reasons


def test_two_conversations_of_a_public_table_run_over_several_lines(shared: Path) -> None:
    file = shared / "data" / MTS.format("ValidationSet")
    lines = [line for line, _ in rows(how_to_read(file, DataSource(train=str(file)), "train"))]
    text = file.read_text(encoding="utf-8").splitlines()
    assert all(re.match(r"\d+,", text[line - 1]) for line in lines)
