"""Rows: every format gives the same, bad ones are named by line, and no message repeats what a row says."""

import csv
import gzip
import logging
import os
import re
import tracemalloc
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from datasets import Dataset, DatasetDict
from hypothesis import given, settings
from hypothesis import strategies as st

from nvflare_fm.errors import DataError, PolicyError
from nvflare_fm.site.data import loading as data
from nvflare_fm.site.data.loading import SiteData
from nvflare_fm.site.data.rows import ROW_LIMIT
from nvflare_fm.site.offer.site_config import DataSource
from nvflare_fm.site.tasks import BadRow, registry
from tests.codes import refused
from tests.site import tiny

WORDS = tiny.tokenizer()
TASK = "sequence_classification"
ROWS = tiny.rows(TASK, 20)


def load(file: Path, asked: Mapping[str, Any] = MappingProxyType({}), **more: Any) -> SiteData:
    task = registry["sequence_classification"]
    source = DataSource.model_validate({"train": str(file), **more})
    return data.load(source, tiny.plan("sequence_classification", **asked), task, WORDS)


def numbered(count: int) -> list[dict[str, Any]]:
    """Rows of which no two are the same."""
    return [{"text": f"{i} {row['text']}", "label": row["label"]} for i, row in enumerate(tiny.rows(TASK, count))]


def same(one: SiteData, other: SiteData) -> None:
    assert list(one.train) == list(other.train)
    assert list(one.validation) == list(other.validation)


def test_every_format_gives_the_same_rows(tmp_path: Path) -> None:
    expected = load(tiny.jsonl(tmp_path / "a.jsonl", ROWS))
    with (tmp_path / "a.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["text", "label"])
        writer.writeheader()
        writer.writerows(ROWS)
    Dataset.from_list(ROWS).to_parquet(tmp_path / "a.parquet")
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "folder")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    for name in ("a.csv", "a.parquet", "folder", "b.jsonl.gz"):
        same(load(tmp_path / name), expected)


def test_a_saved_folder_of_splits_is_read_by_split(tmp_path: Path) -> None:
    splits = {"train": Dataset.from_list(ROWS[:15]), "validation": Dataset.from_list(ROWS[15:])}
    DatasetDict(splits).save_to_disk(tmp_path / "folder")
    found = load(tmp_path / "folder", validation=str(tmp_path / "folder"))
    assert (len(found.train), len(found.validation)) == (15, 5)


def test_columns_are_taken_by_the_sites_names(tmp_path: Path) -> None:
    renamed = [{"note": row["text"], "code": row["label"]} for row in ROWS]
    found = load(tiny.jsonl(tmp_path / "b.jsonl", renamed), columns={"text": "note", "label": "code"})
    same(found, load(tiny.jsonl(tmp_path / "a.jsonl", ROWS)))


def test_a_column_that_no_row_has_is_named_with_the_nearest_and_the_usual_ones_for_the_site_alone(
    tmp_path: Path,
) -> None:
    file = tiny.jsonl(tmp_path / "b.jsonl", [{"SECRET_note": row["text"], "category": row["label"]} for row in ROWS])
    renamed = tiny.jsonl(tmp_path / "c.jsonl", [{"sentence": row["text"], "category": row["label"]} for row in ROWS])
    for rows, columns, local in (
        (
            file,
            {"text": "SECRET_notes"},
            "no column 'SECRET_notes', did you mean \"SECRET_note\"? found: 'category', 1 more",
        ),
        (renamed, {}, 'perhaps: columns: {"text": "sentence", "label": "category"}'),
    ):
        with pytest.raises(DataError) as caught:
            load(rows, columns=columns)
        assert caught.value.code == "column_missing"
        assert "SECRET" not in caught.value.message
        assert local in caught.value.local


def test_a_file_without_a_header_does_not_have_its_first_row_in_the_log(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("SECRET is ill,calm\nshe is calm,calm\n")
    with pytest.raises(DataError) as caught:
        load(tmp_path / "a.csv")
    assert caught.value.code == "column_missing"
    assert "SECRET" not in str(caught.value)


def test_how_a_file_is_read_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = "".join(f"{row['text']};{row['label']}\n" for row in ROWS)
    (tmp_path / "a.csv").write_bytes(f"text;label\n{rows}".replace("€", "é").encode("cp1252"))
    with caplog.at_level(logging.INFO):
        assert load(tmp_path / "a.csv").bad_rows == 0
    assert "is read as csv, encoding cp1252, delimiter ';' (guessed: encoding, delimiter)" in caplog.text


def test_a_tenth_is_held_out_and_always_the_same(tmp_path: Path) -> None:
    found = load(tiny.jsonl(tmp_path / "a.jsonl", ROWS))
    assert (len(found.train), len(found.validation)) == (18, 2)
    same(found, load(tmp_path / "a.jsonl"))


@settings(max_examples=20)
@given(drawn=st.lists(st.sampled_from(range(60)), min_size=2, max_size=40), more=st.integers(60, 90))
def test_under_privacy_one_row_more_leaves_all_others_where_they_were(
    drawn: list[int], more: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The accountants compare data sets that differ by one record, so nothing else may change with it."""
    rows, folder = numbered(100), tmp_path_factory.mktemp("rows")
    private = {"privacy": {"epsilon": 8.0, "delta": 1e-3}}
    few, many = (
        load(tiny.jsonl(folder / f"{len(chosen)}.jsonl", [rows[i] for i in chosen]), private)
        for chosen in (drawn, [more, *drawn])
    )
    split = [[Counter(map(repr, part)) for part in (found.train, found.validation)] for found in (few, many)]
    changed = [after - before for before, after in zip(*split, strict=True)]
    assert sum(part.total() for part in changed) == 1
    assert not any(before - after for before, after in zip(*split, strict=True))


def test_under_privacy_about_a_tenth_is_held_out_and_of_few_rows_perhaps_none(tmp_path: Path) -> None:
    rows, private = numbered(400), {"privacy": {"epsilon": 8.0, "delta": 1e-4}}
    assert 25 <= len(load(tiny.jsonl(tmp_path / "a.jsonl", rows), private).validation) <= 60
    counts = [
        len(load(tiny.jsonl(tmp_path / f"{i}.jsonl", rows[5 * i : 5 * i + 5]), private).contents[1]) for i in range(9)
    ]
    assert min(counts) == 0 < max(counts)


@pytest.mark.parametrize("named", [True, False])
def test_a_part_of_the_rows_to_measure_on_has_every_label_of_a_sorted_file(named: bool, tmp_path: Path) -> None:
    file = tiny.jsonl(tmp_path / "a.jsonl", sorted(tiny.rows("sequence_classification", 400), key=lambda r: r["label"]))
    found = load(file, **({"validation": str(file)} if named else {}))
    part = found.measured(len(found.validation) // 2, 1)
    assert {*found.validation.select(range(part))["labels"]} == {0, 1, 2}
    assert data.contents_of(found.validation, found.validation_rows) == found.contents[1]


def test_bad_rows_are_counted_and_named_by_line_without_their_content(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tiny.jsonl(tmp_path / "a.jsonl", ROWS)
    lines = file.read_text().splitlines()
    lines[2], lines[6] = '{"text": "SECRET", "label": "SECRET"}', "SECRET {"
    file.write_text("\n\n".join(lines))
    with caplog.at_level(logging.WARNING):
        found = load(file, max_bad_rows=0.2)
    assert found.bad_rows == 2
    assert len(found.train) + len(found.validation) == 18
    assert "line 5: 'label' is not among the plan's labels; line 13: the line is not JSON" in caplog.text
    assert "SECRET" not in caplog.text


def test_a_line_of_csv_is_counted_where_it_starts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lines = ["text,label", '"two\nlines",calm', "short", "one,well", *(f"t{i},ill" for i in range(9))]
    (tmp_path / "a.csv").write_text("\n".join(lines) + "\n")
    with caplog.at_level(logging.WARNING):
        assert load(tmp_path / "a.csv", max_bad_rows=0.5).bad_rows == 1
    assert "line 4: the line has more or fewer fields than the header" in caplog.text


def test_too_many_bad_rows_stop_the_site_and_only_its_own_log_counts_them(tmp_path: Path) -> None:
    file = tiny.jsonl(tmp_path / "a.jsonl", ROWS[:10] + [{"text": "SECRET", "label": "no"}] * 7)
    with refused("bad_rows", DataError, "'notes' (train)", "7 of 17", "line 11: 'label'", "…") as caught:
        load(file)
    assert "SECRET" not in str(caught.value)
    assert str(tmp_path) not in caught.value.message
    assert not re.search(r"\d", caught.value.message)


@given(count=st.integers(1, 300), asked=st.integers(0, 400), least=st.integers(1, 40))
def test_rows_are_measured_so_that_no_two_answers_differ_by_a_few(count: int, asked: int, least: int) -> None:
    """A floor for the rows of each answer, for those left out of it, and for those between it and any other."""
    taken = data.measured(count, asked, least)
    assert taken == count or (taken <= asked and taken % least == 0 and count - taken >= least)
    assert data.measured(count, 0, least) == data.measured(count, count, least) == count
    assert least > 1 or taken == min(count, asked or count)
    answers = {data.measured(count, each, least) for each in range(count + 1)}
    assert all(abs(one - other) >= least for one in answers for other in answers - {one})


def test_rows_are_told_apart_by_what_is_learned_of_them(tmp_path: Path) -> None:
    rows = [ROWS[0], ROWS[1], ROWS[0], ROWS[0] | {"label": "well"}, ROWS[0] | {"ward": "7"}, ROWS[3]]
    train, _ = load(tiny.jsonl(tmp_path / "a.jsonl", rows), validation=str(tmp_path / "a.jsonl")).contents
    assert [train.index(row) for row in train] == [0, 1, 0, 3, 0, 5]


@pytest.mark.parametrize(
    ("name", "content", "code"),
    [
        ("a.jsonl", b"", "no_rows"),
        ("a.jsonl", b"\n\n", "no_rows"),
        ("a.jsonl", b"[]\n", "bad_rows"),
        ("a.csv", b"text,label\n", "no_rows"),
        ("a.jsonl", b"\xff\xfe\x00", "bad_rows"),
        ("a.parquet", b"PAR1", "data_unreadable"),
        ("a.jsonl.gz", b"not gzip", "data_unreadable"),
        ("a.docx", b"", "data_format_unknown"),
    ],
)
def test_a_file_without_a_usable_row_stops_the_site(tmp_path: Path, name: str, content: bytes, code: str) -> None:
    (tmp_path / name).write_bytes(content)
    with refused(code, DataError) as caught:
        load(tmp_path / name)
    assert str(tmp_path) not in caught.value.message


def code_of(file: Path, **more: Any) -> str:
    """The code under which `file` is refused."""
    with pytest.raises((DataError, PolicyError)) as caught:
        load(file, **more)
    assert str(file.parent) not in caught.value.message
    return caught.value.code


@pytest.mark.timeout(20)
def test_what_is_no_file_of_rows_is_an_error_and_nobody_waits_for_it(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for format in ("jsonl", "csv", "parquet"):
        os.mkfifo(tmp_path / f"pipe.{format}")
        (tmp_path / f"device.{format}").symlink_to("/dev/zero")
        (tmp_path / f"circle.{format}").symlink_to(f"circle.{format}")
        (tmp_path / f"gone.{format}").symlink_to(f"nothing.{format}")
        (tmp_path / f"other.{format}").write_bytes(b"\x1f\x8b\x08\x00PAR1" * 9)
        assert code_of(tmp_path / f"pipe.{format}") == "data_unreadable"
        assert {code_of(tmp_path / f"{name}.{format}") for name in ("circle", "gone")} == {"data_link_broken"}
        assert code_of(tmp_path / f"other.{format}") in ("data_unreadable", "bad_rows", "no_rows")
        assert code_of(tmp_path / "empty", format=format) == "data_unreadable"
        assert code_of(tmp_path / f"device.{format}", folder="/") == "data_unreadable"
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "folder")
    os.mkfifo(tmp_path / "folder" / "pipe")
    assert code_of(tmp_path / "folder") == "data_unreadable"


BAD = {
    "10,000 brackets": b"[" * 10_000,
    "10,000 objects": b'{"text":' * 10_000,
    "a byte that is not UTF-8": b'{"text": "a\xffb", "label": "calm"}',
    "NUL": b'{"text": "a\x00b", "label": "calm"}',
    "a longer line than a row may be": b'{"text": "' + b"x" * ROW_LIMIT + b'"}',
    "half a surrogate": b'{"text": "a\\ud800b", "label": "calm"}',
    "a number of 5,000 digits": b'{"text": "a", "label": ' + b"9" * 5_000 + b"}",
    "no number": b'{"text": NaN, "label": Infinity}',
    "a nested text": b'{"text": [[["a"]]], "label": {"calm": 1}}',
}


@pytest.mark.parametrize("line", BAD.values(), ids=BAD)
def test_one_bad_line_costs_that_line_alone(tmp_path: Path, line: bytes) -> None:
    file = tiny.jsonl(tmp_path / "a.jsonl", ROWS)
    lines = file.read_bytes().splitlines()
    file.write_bytes(b"\n".join([*lines[:7], line, *lines[7:]]))
    found = load(file)
    assert found.bad_rows == 1
    assert len(found.train) + len(found.validation) == len(ROWS)


def test_a_bad_record_of_csv_costs_that_record_alone(tmp_path: Path) -> None:
    lines = [b"text,label", *(f"{row['text']},{row['label']}".encode() for row in ROWS)]
    for bad in (b"caf\xe9,calm", b"a\x00b,none", b"a,b,c", b"a"):
        (tmp_path / "a.csv").write_bytes(b"\n".join([*lines[:9], bad, *lines[9:]]))
        assert load(tmp_path / "a.csv").bad_rows == 1


def test_a_long_field_of_csv_is_read(tmp_path: Path) -> None:
    rows = [*ROWS, {"text": "word " * 50_000, "label": "calm"}]  # Python's own limit is 131,072 characters
    with (tmp_path / "a.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["text", "label"])
        writer.writeheader()
        writer.writerows(rows)
    assert load(tmp_path / "a.csv").bad_rows == 0


@pytest.mark.parametrize(
    "bad",
    [b'"a quote that nobody closes,calm', b'"a "quote" inside",calm', b"x" * 2 * ROW_LIMIT, b'"' + b"x" * ROW_LIMIT],
    ids=["open", "inside", "long", "long and open"],
)
def test_a_stray_quote_or_an_endless_line_of_csv_costs_that_line_alone(
    tmp_path: Path, bad: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    lines = [b"text,label", *(f"{row['text']},{row['label']}".encode() for row in ROWS)]
    for place in (1, 9, len(lines)):
        (tmp_path / "a.csv").write_bytes(b"\n".join([*lines[:place], bad, *lines[place:], b'"two\nlines",calm']))
        with caplog.at_level(logging.WARNING):
            found = load(tmp_path / "a.csv")
        assert found.bad_rows == 1
        assert len(found.train) + len(found.validation) == len(ROWS) + 1
        assert f"line {place + 1}: " in caplog.text


def test_a_quote_that_another_record_closes_does_not_take_in_those_between(tmp_path: Path) -> None:
    """To the csv module it is one long field in quotes: the lines in it tell that they are records."""
    rows = [*ROWS, *ROWS]
    lines = ["text,label", *(f"{row['text']},{row['label']}" for row in rows), 'said 5",calm', "last,ill"]
    lines.insert(9, '"stray,calm')
    (tmp_path / "a.csv").write_text("\n".join(lines))
    found = load(tmp_path / "a.csv")
    assert found.bad_rows == 1
    assert len(found.train) + len(found.validation) == len(rows) + 2


def test_a_text_of_many_lines_is_one_field(tmp_path: Path) -> None:
    text = "\n".join(f"line {i}, and more, of it" if i % 2 else "a line" for i in range(500))
    rows = [*ROWS, {"text": text, "label": "calm"}]
    with (tmp_path / "a.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["text", "label"])
        writer.writeheader()
        writer.writerows(rows)
    same(load(tmp_path / "a.csv"), load(tiny.jsonl(tmp_path / "a.jsonl", rows)))


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.csv.gz"])
@pytest.mark.parametrize("unit", [b"x", b" " * 1023 + b"\n"], ids=["one line", "many"])
def test_a_file_that_unpacks_to_a_thousand_times_its_size_is_not_unpacked(
    tmp_path: Path, name: str, unit: bytes
) -> None:
    block = unit * (2**20 // len(unit))
    with gzip.open(tmp_path / name, "wb", compresslevel=9) as file:
        for _ in range(100):
            file.write(block)
    tracemalloc.start()
    try:
        assert code_of(tmp_path / name, max_bad_rows=0.99) == "data_unreadable"
        assert tracemalloc.get_traced_memory()[1] < 30 * 2**20
    finally:
        tracemalloc.stop()


def test_a_gzip_that_ends_too_early_or_is_damaged_is_an_error(tmp_path: Path) -> None:
    whole = gzip.compress(tiny.jsonl(tmp_path / "a.jsonl", ROWS).read_bytes())
    for content in (whole[:-12], whole[:30] + b"\xff" * 9 + whole[39:]):
        (tmp_path / "b.jsonl.gz").write_bytes(content)
        assert code_of(tmp_path / "b.jsonl.gz") == "data_unreadable"


def test_more_rows_than_a_site_can_hold_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nvflare_fm.site.data.rows.ROWS_LIMIT", 20)
    assert len(load(tiny.jsonl(tmp_path / "a.jsonl", ROWS)).train) == 18
    assert code_of(tiny.jsonl(tmp_path / "a.jsonl", [*ROWS, ROWS[0]])) == "data_unreadable"


def test_a_long_row_of_a_format_without_lines_costs_that_row_alone(tmp_path: Path) -> None:
    Dataset.from_list([*ROWS, {"text": "x" * (ROW_LIMIT + 1), "label": "calm"}]).to_parquet(tmp_path / "a.parquet")
    assert load(tmp_path / "a.parquet").bad_rows == 1


def test_a_saved_folder_with_offsets_that_point_elsewhere_is_an_error(tmp_path: Path) -> None:
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "folder")
    (arrow,) = (tmp_path / "folder").glob("*.arrow")
    content = bytearray(arrow.read_bytes())
    offsets = content.index(b"\x00\x00\x00\x00" + len(ROWS[0]["text"].encode()).to_bytes(4, "little"))
    content[offsets + 4 : offsets + 8] = (2**30).to_bytes(4, "little")
    arrow.write_bytes(content)
    assert code_of(tmp_path / "folder") == "data_unreadable"


def test_a_conversation_of_more_turns_than_can_be_told_apart_in_time_is_a_bad_row() -> None:
    turn = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    task = registry["causal_lm"]
    task.encode({"messages": turn * 100}, WORDS, tiny.plan("causal_lm", max_length=4096))
    with pytest.raises(BadRow):
        task.encode({"messages": turn * 101}, WORDS, tiny.plan("causal_lm", max_length=4096))


def test_a_missing_file_and_a_missing_split_stop_the_site(tmp_path: Path) -> None:
    with refused("data_unreadable", DataError) as caught:
        load(tmp_path / "none.jsonl")
    assert "train" in caught.value.message
    DatasetDict({"train": Dataset.from_list(ROWS)}).save_to_disk(tmp_path / "folder")
    with refused("data_unreadable", DataError) as caught:
        load(tmp_path / "folder", validation=str(tmp_path / "folder"))
    assert "validation" in caught.value.message


def test_one_row_cannot_be_both_trained_on_and_held_out(tmp_path: Path) -> None:
    with refused("no_validation_rows", DataError):
        load(tiny.jsonl(tmp_path / "a.jsonl", ROWS[:1]))


def test_a_pickle_among_the_data_is_not_opened(tmp_path: Path) -> None:
    (tmp_path / "a.pkl").write_bytes(b"\x80\x04.")
    with refused("data_format_unknown", DataError):
        load(tmp_path / "a.pkl")
