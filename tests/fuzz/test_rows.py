"""A site's file of rows mutated, and rows that hold anything: a bad row is counted, a bad file is an error of ours."""

import csv
import datetime
import gzip
import io
import json
import zipfile
from pathlib import Path
from typing import Any

import openpyxl
import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from nvflare_fm.errors import DataError
from nvflare_fm.job.tasks import TASKS as TASK_PROMISES
from nvflare_fm.site.data import loading as site_data
from nvflare_fm.site.offer.site_config import DataSource
from nvflare_fm.site.tasks import registry
from tests.fuzz.mutations import Changes, changes, junk, mutated
from tests.site import chats, tiny

WORDS = tiny.tokenizer()
TASKS = tuple(TASK_PROMISES)
COLUMNS = {"regression": {"label": "number"}, "multi_label": {"labels": "topics"}, "preference": {"prompt": "asked"}}
PLANS = {task: tiny.plan(task, max_length=64) for task in TASKS}
SECRET = "Quarantine-9"  # in every row: no message may repeat it
CODES = (
    "data_unreadable",
    "data_format_unknown",
    "bad_rows",
    "no_rows",
    "no_validation_rows",
    "multi_label",
    "regression",
    "column_missing",
)
CHATS = {name: chats.tokenizer(*how) for name, how in chats.BY_EOS.items()}


def rows(count: int = 4) -> list[dict[str, Any]]:
    """Rows that every task can use; some of them under names of their own, see COLUMNS."""
    both = zip(tiny.rows("sequence_classification", count), tiny.rows("token_classification", count), strict=True)
    pair = {"asked": "how is he? ", "chosen": "well", "rejected": "ill, they say"}
    beside = [{"number": 36.5 + i, "topics": [*tiny.LABELS[: i % 3]], **pair, "ward": SECRET} for i in range(count)]
    return [{**text, **tokens, **more} for (text, tokens), more in zip(both, beside, strict=True)]


def files() -> dict[str, bytes]:
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows()).encode()
    table = io.StringIO(newline="")
    beside = ["ward", "number", "topics", "asked", "chosen", "rejected"]
    writer = csv.DictWriter(table, ["text", "label", *beside], extrasaction="ignore")
    writer.writeheader()
    writer.writerows([*rows(), {"text": 'two\nlines, "quoted"', "label": "calm", "ward": SECRET}])
    german = table.getvalue().replace(",", ";").replace("€", "").encode("cp1252", "ignore")
    words = ["\n".join(f"{w} NN {t}" for w, t in zip(r["tokens"], r["labels"], strict=True)) for r in rows()]
    book = openpyxl.Workbook()
    for line in csv.reader(io.StringIO(table.getvalue(), newline="")):
        book.active.append(line)
    sheets = io.BytesIO()
    book.save(sheets)
    columns = io.BytesIO()
    typed = {"at": datetime.datetime(2026, 1, 1), "raw": b"\x00\xff", "number": 1.5, "nested": {"a": [1, None]}}
    Dataset.from_list([row | typed for row in rows()]).to_parquet(columns)
    return {
        "a.jsonl": lines,
        "a.jsonl.gz": gzip.compress(lines),
        "a.json": json.dumps(rows(), indent=1).encode(),
        "b.json": json.dumps({str(i): row for i, row in enumerate(rows())}).encode(),
        "c.json": json.dumps({name: [row[name] for row in rows()] for name in rows()[0]}).encode(),
        "a.csv": table.getvalue().encode(),
        "b.csv": german,
        "a.tsv": table.getvalue().replace(",", "\t").encode("utf-16"),
        "a.conll": "\n\n".join(words).encode(),
        "a.xlsx": sheets.getvalue(),
        "a.parquet": columns.getvalue(),
    }


WHOLE = files()
BINARY = ("a.parquet", "a.xlsx")
with zipfile.ZipFile(io.BytesIO(WHOLE["a.xlsx"])) as book:
    SHEETS = {name: book.read(name) for name in book.namelist()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rows")


def outcome(file: Path, content: bytes, task: str, tokenizer: Any = WORDS, **more: Any) -> str:
    """The code under which a site refuses the file, or "read"."""
    file.write_bytes(content)
    columns = COLUMNS.get(task, {})
    source = DataSource.model_validate({"train": str(file), "max_bad_rows": 0.99, "columns": columns, **more})
    try:
        read = site_data.load(source, PLANS[task], registry[task], tokenizer)
    except DataError as error:
        assert SECRET not in str(error)  # noqa: PT017
        assert str(file.parent) not in error.message  # noqa: PT017
        return error.code
    assert len(read.train) == len(read.train_rows) > 0
    assert len(read.validation) == len(read.validation_rows) > 0
    texts = TASK_PROMISES[task].texts_per_row
    assert max(map(len, read.train["input_ids"][:])) <= texts * PLANS[task].max_length
    registry[task].batch(read.train.select(range(2)), 0) if len(read.train) > 1 else None
    assert not any(SECRET in remark for remark in read.remarks)
    return "read"


@pytest.mark.parametrize("name", WHOLE)
def test_an_untouched_file_is_read(folder: Path, name: str) -> None:
    listed = name.endswith(("json", "jsonl", "parquet", "gz"))
    tables = [task for task in TASKS if task not in ("causal_lm", "token_classification")]
    for task in ["token_classification"] if name == "a.conll" else TASKS if listed else tables:
        assert outcome(folder / name, WHOLE[name], task) == "read", task


@given(name=st.sampled_from([n for n in WHOLE if n not in BINARY]), task=st.sampled_from(TASKS), how=changes)
def test_mutated_lines_are_bad_rows_or_an_error_of_ours(folder: Path, name: str, task: str, how: Changes) -> None:
    assert outcome(folder / name, mutated(WHOLE[name], how), task) in ("read", *CODES)


@given(task=st.sampled_from(TASKS), how=changes)
def test_a_mutated_parquet_file_is_rows_or_an_error_of_ours(folder: Path, task: str, how: Changes) -> None:
    assert outcome(folder / "a.parquet", mutated(WHOLE["a.parquet"], how), task) in ("read", *CODES)


@given(task=st.sampled_from(TASKS), how=changes, part=st.sampled_from([*SHEETS, ""]))
def test_a_mutated_workbook_is_rows_or_an_error_of_ours(folder: Path, task: str, how: Changes, part: str) -> None:
    """The zip file itself, or a part of it that is well packed and holds anything."""
    content = mutated(WHOLE["a.xlsx"], how)
    if part:
        changed = io.BytesIO()
        with zipfile.ZipFile(changed, "w") as packed:
            for name, text in SHEETS.items():
                packed.writestr(name, mutated(text, how) if name == part else text)
        content = changed.getvalue()
    assert outcome(folder / "a.xlsx", content, task) in ("read", *CODES)


@given(content=st.text('{}[]",: \\\na0', max_size=60), name=st.sampled_from(["a.json", "a.jsonl", "a.csv", "a.txt"]))
def test_brackets_quotes_and_commas_in_any_order_are_rows_or_an_error_of_ours(
    folder: Path, content: str, name: str
) -> None:
    assert outcome(folder / name, content.encode(), "sequence_classification") in CODES


call = st.fixed_dictionaries({"function": st.fixed_dictionaries({"name": junk, "arguments": junk}) | junk}) | junk
part = st.fixed_dictionaries({"type": st.just("text") | junk, "text": junk}) | junk
said = st.text(max_size=8) | st.lists(part, max_size=2) | junk
turn = st.fixed_dictionaries(
    {},
    optional={
        "role": st.sampled_from(["user", "assistant", "tool", "system"]) | junk,
        "content": said,
        "from": st.sampled_from(["human", "gpt", "function_call", "observation"]) | junk,
        "value": said,
        "tool_calls": st.lists(call, max_size=2) | junk,
        "reasoning_content": junk,
        "weight": junk,
    },
)
turns = st.lists(turn, max_size=4) | junk
row = st.fixed_dictionaries(
    {},
    optional={
        "text": junk,
        "label": junk,
        "prompt": turns,
        "completion": turns,
        "messages": turns,
        "conversations": turns,
        "tools": st.lists(junk, max_size=2) | junk,
        "system": junk,
        "instruction": junk,
        "input": junk,
        "output": junk,
        "history": st.lists(st.lists(junk, min_size=2, max_size=2), max_size=2) | junk,
        "tokens": st.lists(st.text(max_size=5) | junk, max_size=4) | junk,
        "labels": st.lists(st.sampled_from(tiny.LABELS) | junk, max_size=4) | junk,
        "number": st.floats() | st.integers().map(str) | junk,
        "topics": st.lists(st.sampled_from(tiny.LABELS) | st.integers(-1, 3) | junk, max_size=4) | junk,
        "asked": turns,
        "chosen": turns,
        "rejected": turns,
    },
)


@given(strange=st.lists(row | junk, max_size=3), task=st.sampled_from(TASKS))
def test_rows_that_hold_anything_are_used_or_counted(folder: Path, strange: list[Any], task: str) -> None:
    lines = "".join(json.dumps(line) + "\n" for line in [*rows(3), *strange])
    assert outcome(folder / "a.jsonl", lines.encode(), task) in ("read", *CODES)


@given(strange=st.lists(turn, min_size=1, max_size=4), tools=junk, name=st.sampled_from(sorted(CHATS)))
def test_a_conversation_that_holds_anything_is_used_or_counted(
    folder: Path, strange: list[Any], tools: Any, name: str
) -> None:
    sound = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    odd = [{"messages": [*sound, *strange], "tools": tools}, {"prompt": strange, "completion": sound, "ward": SECRET}]
    lines = "".join(json.dumps(line) + "\n" for line in [*[{"messages": sound}] * 3, *odd])
    assert outcome(folder / "a.jsonl", lines.encode(), "causal_lm", CHATS[name]) == "read"


@given(
    labels=st.lists(junk, min_size=1, max_size=4),
    meant=st.dictionaries(st.text(max_size=4), st.sampled_from(tiny.LABELS), max_size=2),
)
def test_labels_that_are_anything_are_taken_or_counted(folder: Path, labels: list[Any], meant: dict[str, str]) -> None:
    lines = "".join(json.dumps({"text": SECRET, "label": label}) + "\n" for label in ["calm", "ILL ", *labels])
    assert outcome(folder / "a.jsonl", lines.encode(), "sequence_classification", labels=meant) == "read"
