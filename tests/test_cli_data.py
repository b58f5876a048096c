"""`nvflare-fm data check`: what it tells of a file, and that what it says to paste reads the file as it did."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from nvflare_fm.cli import app
from nvflare_fm.job.tasks import TASKS
from nvflare_fm.site.data.check import block, inspect
from nvflare_fm.site.data.rows import how_to_read, rows
from nvflare_fm.site.offer.site_config import DataSource, load_site
from tests.fuzz.mutations import Changes, changes, mutated
from tests.site import tiny


def typed(file: Path, task: str, *words: Any) -> Result:
    environment = {"COLUMNS": "150"}
    return CliRunner(env=environment).invoke(app, ["data", "check", str(file), "--task", task, *map(str, words)])


def pasted(said: str, folder: Path) -> DataSource:
    """The data set of a site file that holds what was printed last."""
    (folder / "fm_site.yaml").write_text(said[said.index("\ndata:\n") :])
    return load_site(folder / "fm_site.yaml").data_set("notes")


GERMAN = "utterance;category\r\nÜbung macht müde;calm\r\nwas nun;ill\r\nähnlich;calm\r\nzu; viel; hier\r\n"


@pytest.fixture
def german(tmp_path: Path) -> Path:
    (tmp_path / "notes [red].csv").write_bytes(GERMAN.encode("cp1252"))
    return tmp_path / "notes [red].csv"


def test_a_file_is_told_and_what_is_pasted_reads_it(german: Path) -> None:
    done = typed(german, "sequence_classification")
    said = re.sub(r"\s+", " ", done.stdout)
    for told in (
        "notes [red].csv: csv, encoding cp1252, delimiter ';' (guessed: encoding, delimiter)",
        "letters beyond ASCII, as they are read: Üäü",
        "utterance │ text",
        "category │ label",
        "calm │ 2",
        "length in characters: shortest 7, half up to 7, 95 % up to 16, longest 16",
        "3 rows can be used, 1 cannot",
        "line 5: the line has more or fewer fields than the header",
    ):
        assert told in said
    assert done.exit_code == 1  # a quarter of the rows is too much
    source = pasted(done.stdout, german.parent)
    assert (source.encoding, source.delimiter) == ("cp1252", ";")
    assert source.columns == {"text": "utterance", "label": "category"}
    _, first = next(rows(how_to_read(Path(source.train), source, "train")))
    assert dict(first) == {"utterance": "Übung macht müde", "category": "calm"}


def test_a_model_and_labels_count_tokens_and_what_does_not_belong(tmp_path: Path) -> None:
    base = tmp_path / "base"
    tiny.save(base)
    long = {"text": "walks today " * 30, "label": "calm"}
    file = tiny.jsonl(tmp_path / "a.jsonl", [*tiny.rows("sequence_classification", 30), long])
    done = typed(file, "sequence_classification", "--model", base, "--labels", "calm,ill", "--max-length", 16)
    said = re.sub(r"\s+", " ", done.stdout)
    assert done.exit_code == 1
    length = len(tiny.tokenizer()(long["text"])["input_ids"])
    assert f"longest {length}" in said
    assert "not learned or not whole (max_length = 16 tokens)" in said
    assert "well (not among --labels) │ 10" in said
    assert "21 rows can be used, 10 cannot" in said


@pytest.mark.parametrize(
    ("rows", "task", "columns"),
    [
        ([{"QUESTION": "a b", "Answer": "c"}], "causal_lm", {"instruction": "QUESTION", "output": "Answer"}),
        ([{"instruction": "a", "output": "c", "input": ""}], "causal_lm", {}),
        ([{"messages": [{"role": "user", "content": "b"}, {"role": "assistant", "content": "c"}]}], "causal_lm", {}),
        ([{"words": ["a"], "ner": ["O"]}, {"words": ["b"], "ner": ["X"]}], "token_classification",
         {"tokens": "words", "labels": "ner"}),
        ([{"tokens": ["a"], "ner_tags": ["O"]}, {"tokens": ["b"], "ner_tags": ["X"]}], "token_classification", {}),
        ([{"id": i, "what": f"a text {i}", "kind": "ab"[i % 2]} for i in range(6)], "sequence_classification",
         {"text": "what", "label": "kind"}),
        ([{"a": 1, "b": 2}], "sequence_classification", {}),
    ],
)  # fmt: skip
def test_columns_are_proposed_where_a_task_reads_other_names(
    tmp_path: Path, rows: list[dict[str, Any]], task: str, columns: dict[str, str]
) -> None:
    source = DataSource(train=str(tiny.jsonl(tmp_path / "a.jsonl", rows)))
    found = inspect(source, task)
    assert found.columns == columns
    assert found.is_proposed == bool(columns)
    assert found.good == (0 if "b" in rows[0] else len(rows))


MISTAKES: dict[str, tuple[list[str], str]] = {
    "no file": (["none.csv", "--task", "causal_lm"], "no_such_file"),
    "no task of that name": (["a.jsonl", "--task", "causal_ml"], 'did you mean "causal_lm"'),
    "a column that is not there": (
        ["a.jsonl", "--task", "causal_lm", "--column", "text=promt"],
        "'promt', did you mean \"prompt\"? found: 'prompt', 'completion'",
    ),
    "half a column": (["a.jsonl", "--task", "causal_lm", "--column", "text"], "no_column"),
    "no encoding": (["a.jsonl", "--task", "causal_lm", "--encoding", "zip"], "wrong_setting"),
    "no format": (["a.jsonl", "--task", "causal_lm", "--format", "[red]"], "wrong_setting"),
    "no length": (["a.jsonl", "--task", "causal_lm", "--max-length", "1", "--model", "base"], "max_length"),
    "no model": (["a.jsonl", "--task", "causal_lm", "--model", "."], "no_tokenizer"),
    "an ending nobody knows": (["a.docx", "--task", "causal_lm"], "data_format_unknown"),
    "no text": (["a.csv", "--task", "causal_lm"], "set its encoding"),
}


@pytest.mark.parametrize(("words", "said"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line_with_the_remedy(
    tmp_path: Path, words: list[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny.save(tmp_path / "base")
    tiny.jsonl(tmp_path / "a.jsonl", tiny.rows("causal_lm"))
    (tmp_path / "a.docx").touch()
    (tmp_path / "a.csv").write_bytes("привет".encode("cp1251"))
    done = CliRunner().invoke(app, ["data", "check", *words])
    assert done.exit_code == 1
    assert isinstance(done.exception, SystemExit)
    assert said in str(done.exception)


def test_a_file_without_the_columns_that_a_task_reads_is_told_what_they_are(tmp_path: Path) -> None:
    done = typed(tiny.jsonl(tmp_path / "a.jsonl", [{"a": 1, "b": 2}]), "token_classification")
    assert "the task reads 'tokens' and 'labels'; say which columns these are with --column" in done.stdout
    assert done.exit_code == 1


def test_numbers_to_predict_and_lists_of_labels_are_said_to_be_other_tasks(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label\n" + "".join(f"a,{i + 0.5}\n" for i in range(8)))
    tiny.jsonl(tmp_path / "b.jsonl", [{"text": "a", "label": ["x", "y"]}] * 8)
    for name, task in (("a.csv", "regression"), ("b.jsonl", "multi_label")):
        said = re.sub(r"\s+", " ", typed(tmp_path / name, "sequence_classification").stdout)
        assert "0 rows can be used, 8 cannot" in said
        assert task in said


def test_nothing_that_a_file_holds_is_markup(tmp_path: Path) -> None:
    hostile = {"text": "[/bold]\x1b[2J", "label": "[red]\x1b[31m"}
    file = tiny.jsonl(tmp_path / "a.jsonl", [hostile, hostile | {"label": "[/]"}, {"[/a]": "\ud800", "text": 3}])
    said = typed(file, "sequence_classification").stdout
    assert "[red]\\x1b[31m" in said
    assert "\x1b" not in said


SOURCE = json.dumps([*tiny.rows("sequence_classification", 3), {"text": "", "label": None}], indent=1).encode()


@given(how=changes, task=st.sampled_from(sorted(TASKS)))
def test_any_file_is_told_or_refused(tmp_path_factory: pytest.TempPathFactory, how: Changes, task: str) -> None:
    file = tmp_path_factory.getbasetemp() / "a.json"
    file.write_bytes(mutated(SOURCE, how))
    done = typed(file, task)
    assert isinstance(done.exception, SystemExit | type(None))


def test_the_block_says_no_more_than_is_needed(tmp_path: Path) -> None:
    source = DataSource(train=str(tmp_path / "a.parquet"))
    Dataset.from_list(tiny.rows("causal_lm")).to_parquet(source.train)
    assert block(inspect(source, "causal_lm"), source) == f"data:\n  notes:\n    train: {source.train}\n"
