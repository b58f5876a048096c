"""Files of rows as people write them: the same rows come out, whatever the format, the encoding and the layout."""

import csv
import gzip
import io
import json
import re
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import openpyxl
import pyarrow.csv
import pyarrow.json
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from datasets import Sequence as Many
from hypothesis import given
from hypothesis import strategies as st

from nvflare_fm.errors import ConfigError, DataError
from nvflare_fm.files import MIB
from nvflare_fm.site.data.rows import ROW_LIMIT, how_to_read, rows
from nvflare_fm.site.data.rows.text import guess_encoding
from nvflare_fm.site.offer.site_config import DataSource
from nvflare_fm.site.tasks import BadRow
from tests.fuzz.mutations import junk

Rows = list[dict[str, Any]]
TEXTS = ['Übelkeit; "stark"', "eine Zeile,\nund noch | eine", "tab\tand 5' comma,", "plain", "naïve café – 20 €", " x "]
ROWS: Rows = [{"text": text, "label": label} for text, label in zip(TEXTS * 2, ["a", "b", "c"] * 4, strict=True)]


def told(file: Path, split: str = "train", **more: Any) -> list[tuple[int, Any]]:
    """Rows as they are read, the reason in place of a bad one."""
    found = rows(how_to_read(file, DataSource.model_validate({"train": str(file), **more}), split))
    return [(line, str(row) if isinstance(row, BadRow) else dict(row)) for line, row in found]


def read(file: Path, split: str = "train", **more: Any) -> Rows:
    return [row for _, row in told(file, split, **more)]


def code_of(file: Path, **more: Any) -> tuple[str, str]:
    """The code under which a file is refused, and what the site's own log has."""
    with pytest.raises(DataError) as caught:
        read(file, **more)
    assert str(file.parent) not in caught.value.message
    return caught.value.code, caught.value.local


def table(delimiter: str, records: Rows = ROWS, **how: Any) -> str:
    written = io.StringIO(newline="")
    writer = csv.DictWriter(written, list(records[0]), delimiter=delimiter, **how)
    writer.writeheader()
    writer.writerows(records)
    return written.getvalue()


def columns(records: Rows) -> dict[str, list[Any]]:
    return {name: [row[name] for row in records] for name in records[0]}


JSON: dict[str, Callable[[Rows], str]] = {
    "lines": lambda rows: "".join(json.dumps(row) + "\n" for row in rows),
    "list on one line": json.dumps,
    "list": lambda rows: json.dumps(rows, indent=2, ensure_ascii=False),
    "list without indents": lambda rows: json.dumps(rows, indent=0),
    "list of lines": lambda rows: "[" + ",\n".join(map(json.dumps, rows)) + "]",
    "data": lambda rows: json.dumps({"version": "1.1", "info": {"by": ["us"]}, "data": rows}, indent=4),
    "splits": lambda rows: json.dumps({"test": rows[:1], "train": rows}),
    "objects by name": lambda rows: json.dumps({f"id-{i}": row for i, row in enumerate(rows)}),
    "objects by name, indented": lambda rows: json.dumps({str(i): row for i, row in enumerate(rows)}, indent=1),
    "columns": lambda rows: json.dumps(columns(rows)),
    "columns as pandas writes them": lambda rows: json.dumps(
        {name: {str(i): value for i, value in enumerate(values)} for name, values in columns(rows).items()}
    ),
    "objects one after another": lambda rows: "\n".join(json.dumps(row, indent=2) for row in rows),
}


@pytest.mark.parametrize("name", ["a.json", "a.json.gz"])
@pytest.mark.parametrize("written", JSON.values(), ids=JSON)
def test_json_is_read_however_it_holds_rows(tmp_path: Path, name: str, written: Callable[[Rows], str]) -> None:
    content = written(ROWS).encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    assert read(tmp_path / name) == ROWS


@pytest.mark.parametrize("written", ["list on one line", "list", "lines"])
def test_a_list_called_jsonl_is_read_too(tmp_path: Path, written: str) -> None:
    (tmp_path / "a.jsonl").write_text(JSON[written](ROWS))
    assert read(tmp_path / "a.jsonl") == ROWS


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rows")


value = junk.filter(lambda value: "\\ud800" not in json.dumps(value) and "NaN" not in json.dumps(value))
record = st.dictionaries(st.text(max_size=5).filter(lambda name: "\ud800" not in name), value, max_size=3)


@given(
    records=st.lists(record, min_size=1, max_size=5),
    indent=st.sampled_from([None, 0, 1, 2, "\t"]),
    ascii=st.booleans(),
    around=st.sampled_from(["", " ", "\n\n", "\r\n"]),
)
def test_any_list_of_objects_is_read_as_json_reads_it(
    place: Path, records: Rows, indent: Any, ascii: bool, around: str
) -> None:
    text = around + json.dumps(records, indent=indent, ensure_ascii=ascii) + around
    (place / "a.json").write_text(text, encoding="utf-8")
    assert read(place / "a.json", format="json", encoding="utf-8") == json.loads(text)


@pytest.mark.parametrize("place", [0, 5, 11])
@pytest.mark.parametrize(
    ("odd", "why"), [('"text"', "not a JSON object"), ('{"text": "' + "x" * ROW_LIMIT + '"}', "longer than")]
)
def test_what_is_no_row_in_a_list_costs_that_row_alone(tmp_path: Path, odd: str, why: str, place: int) -> None:
    rows = [*map(json.dumps, ROWS)]
    (tmp_path / "a.json").write_text("[\n" + ",\n".join([*rows[:place], odd, *rows[place:]]) + "\n]\n")
    found = told(tmp_path / "a.json")
    assert [row for _, row in found if isinstance(row, dict)] == ROWS
    [(number, reason)] = [(number, row) for number, row in found if isinstance(row, str)]
    assert number == place + 1
    assert why in reason


FAULTS = {
    "a quote that is missing": '{"text": "a, "label": "b"}',
    "a quote too many": '{"text": "a"b", "label": "b"}',
    "a bracket that is missing": '{"text": "a", "label": "b"',
    "a bracket too many": '{"text": "a"]}, "label": "b"}',
    "no JSON": '{"text": None}',
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_text_that_is_no_json_is_an_error_that_names_the_line_and_repeats_nothing(tmp_path: Path, fault: str) -> None:
    rows = [*map(json.dumps, ROWS)]
    (tmp_path / "a.json").write_text("[\n" + ",\n".join([*rows[:5], fault, *rows[5:]]) + "\n]\n")
    code, local = code_of(tmp_path / "a.json")
    assert code == "data_unreadable"
    assert re.search("line [78] column", local)
    assert "text" not in local.partition("a.json")[2]


def test_ten_thousand_brackets_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[{"a": ' + "[" * 10_000)
    code, local = code_of(tmp_path / "a.json")
    assert (code, "nested too deeply" in local) == ("data_unreadable", True)


def test_a_line_that_is_too_long_is_no_row_even_where_its_beginning_is_one(tmp_path: Path) -> None:
    lines = [json.dumps(ROWS[0]), json.dumps(ROWS[1]) + " " * ROW_LIMIT, json.dumps(ROWS[2])]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    assert read(tmp_path / "a.jsonl") == [ROWS[0], f"the line is longer than {ROW_LIMIT} characters", ROWS[2]]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (json.dumps(ROWS, indent=2)[:-300], "line 3[0-9]"),
        ('[{"a": "b}, {"a": "c"}]', "line 1"),
        ('{"data": [{"a": 1}], \n "x" 1}', "line 2"),
        ('{"a": [{"b": 1}], "c": [{"b": 1}]}', "several lists"),
        ('{"text": ["a", "b"], "label": ["c"]}', "shorter"),
    ],
)
def test_a_json_text_that_ends_too_early_or_is_no_rows_is_an_error(tmp_path: Path, text: str, line: str) -> None:
    (tmp_path / "a.json").write_text(text)
    code, local = code_of(tmp_path / "a.json")
    assert code == "data_unreadable"
    assert re.search(line, local)


ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "cp1252")


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_a_table_is_read_in_any_encoding_and_with_any_delimiter(tmp_path: Path, encoding: str, delimiter: str) -> None:
    """Nothing is set in the site file: both are guessed, and the guess is told."""
    (tmp_path / "a.csv").write_bytes(table(delimiter).encode(encoding))
    found = how_to_read(tmp_path / "a.csv", DataSource(train="a.csv"), "train")
    assert [row for _, row in rows(found)] == ROWS
    assert str(found) == (
        f"csv, encoding {encoding.removesuffix('-sig')}, delimiter {delimiter!r} (guessed: encoding, delimiter)"
    )
    (tmp_path / "b.txt").write_bytes(f"sep={delimiter}\r\n{table(delimiter)}".encode(encoding))
    assert read(tmp_path / "b.txt", format="csv") == ROWS


def test_encoding_and_delimiter_are_what_the_site_says(tmp_path: Path) -> None:
    words = [{"text": "привет, как дела", "label": "a"}, {"text": "спасибо ~ большое", "label": "b"}]
    (tmp_path / "a.csv").write_bytes(table("~", words).encode("cp1251"))
    assert "set its encoding" in code_of(tmp_path / "a.csv")[1]
    assert read(tmp_path / "a.csv", encoding="windows-1251", delimiter="~") == words
    (tmp_path / "a.tsv").write_bytes(table("\t", words).encode("koi8-r"))
    assert read(tmp_path / "a.tsv", encoding="koi8-r", delimiter="tab") == words


@pytest.mark.parametrize("wrong", [{"encoding": "zip"}, {"encoding": "idna"}, {"delimiter": '"'}, {"delimiter": "ab"}])
def test_what_is_no_encoding_of_texts_and_no_delimiter_is_refused(wrong: dict[str, str]) -> None:
    with pytest.raises(ConfigError) as caught:
        DataSource.read({"train": "a.csv", **wrong}, "test")
    assert caught.value.code == "wrong_setting"


def test_other_readers_give_nothing_of_a_file_with_one_bad_row(tmp_path: Path) -> None:
    """Why JSON and CSV are read line by line here. Where this fails, pyarrow has learnt it."""
    records = [{"text": f"note {i}", "label": "ab"[i % 2]} for i in range(10_000)]
    lines = [json.dumps(row) for row in records]
    for name, content in {
        "a.jsonl": [*lines[:5000], lines[5000][:20], *lines[5001:]],
        "fields.csv": [*table(",", records).splitlines()[:-1], "a,b,c"],
        "quote.csv": [*table(",", records).splitlines()[:-1], '"a,b'],
    }.items():
        (tmp_path / name).write_text("\n".join(content) + "\n")
        reader = pyarrow.csv.read_csv if name.endswith("csv") else pyarrow.json.read_json
        with pytest.raises(pyarrow.ArrowInvalid):
            reader(tmp_path / name)
        assert [isinstance(row, str) for row in read(tmp_path / name)].count(True) == 1


@given(text=st.text(st.characters(exclude_characters="\x00", exclude_categories=["Cs"])))
def test_what_is_utf_8_is_never_taken_for_anything_else(place: Path, text: str) -> None:
    (place / "a.txt").write_bytes(text.encode())
    assert guess_encoding(place / "a.txt") == "utf-8"


def test_a_character_that_two_blocks_share_is_one_character(place: Path) -> None:
    for before in range(2**16 - 4, 2**16 + 1):
        (place / "a.txt").write_bytes(b"a" * before + "€".encode() + b"a" * 100)
        assert guess_encoding(place / "a.txt") == "utf-8"


def test_one_byte_that_is_no_utf_8_among_letters_that_are_costs_its_line(tmp_path: Path) -> None:
    lines = table(",").encode().replace(b"plain", b"pl\xe4in", 1)
    (tmp_path / "a.csv").write_bytes(lines)
    bad = [row for row in read(tmp_path / "a.csv") if isinstance(row, str)]
    assert bad == ["the line is not UTF-8"]


@pytest.mark.parametrize("written", JSON.values(), ids=JSON)
def test_a_byte_that_is_no_text_costs_its_row_of_json(tmp_path: Path, written: Callable[[Rows], str]) -> None:
    (tmp_path / "a.json").write_bytes(written(ROWS).encode().replace(b"plain", b"pl\xffain", 1))
    found = read(tmp_path / "a.json")
    assert [row for row in found if isinstance(row, dict)] == [*ROWS[:3], *ROWS[4:]]
    assert "is not UTF-8" in found[3]


def test_what_excel_leaves_below_a_table_is_no_row(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(table(";") + ";\r\n\r\n;\r\n")
    assert read(tmp_path / "a.csv") == ROWS


def test_quotes_behind_a_backslash_and_blanks_behind_commas_are_read(tmp_path: Path) -> None:
    """As MySQL exports, and as people type."""
    lines = ['"he said \\"no\\", and left",a', '"ends \\"so\\"",b', "C:\\notes,c", '"two\nlines \\"here\\"",d']
    (tmp_path / "a.csv").write_text("\n".join(["text,label", *lines]))
    texts = ['he said "no", and left', 'ends "so"', "C:\\notes", 'two\nlines "here"']
    assert read(tmp_path / "a.csv") == [{"text": t, "label": k} for t, k in zip(texts, "abcd", strict=True)]
    (tmp_path / "b.csv").write_text('label, text\na, "one, two"\nb, three\n')
    assert read(tmp_path / "b.csv") == [{"label": "a", "text": "one, two"}, {"label": "b", "text": "three"}]


def test_a_table_of_one_column_is_read_whole(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text\nno, comma; or | divides this\nnor, this\nend\n")
    assert read(tmp_path / "a.csv") == [{"text": text} for text in ("no, comma; or | divides this", "nor, this", "end")]


SENTENCE = {"tokens": ["Frau", "O'Neil", ",", "#", "5"], "labels": ["O", "B-PER", "O", "O", "B-NUM"]}
OTHER = {"tokens": ["Bonn"], "labels": ["B-LOC"]}


def conll(line: Callable[[int, str, str], str], sentences: Sequence[dict[str, list[str]]], before: str = "") -> str:
    told = [
        "".join(line(i, *pair) + "\n" for i, pair in enumerate(zip(s["tokens"], s["labels"], strict=True), start=1))
        for s in sentences
    ]
    return before + "\n".join(told)


LAYOUTS: dict[str, tuple[str, str]] = {
    "two columns": ("a.txt", conll(lambda i, w, t: f"{w} {t}", [SENTENCE, OTHER])),
    "two columns, tabs, called tsv": ("a.tsv", conll(lambda i, w, t: f"{w}\t{t}", [SENTENCE, OTHER])),
    "CoNLL-2003": (
        "a.conll",
        conll(lambda i, w, t: f"{w} NN B-NP {t}", [SENTENCE, OTHER], "-DOCSTART- -X- O O\n\n"),
    ),
    "CoNLL-2003, called txt": ("train.txt", conll(lambda i, w, t: f"{w} NN I-NP {t}", [SENTENCE, OTHER])),
    "CoNLL-2002": ("a.bio", conll(lambda i, w, t: f"{w} NP {t}", [SENTENCE, OTHER])),
    "MultiCoNER": ("a.conll", conll(lambda i, w, t: f"{w} _ _ {t}", [SENTENCE, OTHER], "# id 5\tdomain=en\n")),
    "GermEval": ("a.tsv", conll(lambda i, w, t: f"{i}\t{w}\t{t}\tO", [SENTENCE, OTHER], "#\thttp://a [2009]\n")),
    "label first": ("a.bio", conll(lambda i, w, t: f"{t}\t{w}", [SENTENCE, OTHER])),
    "CoNLL-U Plus": (
        "a.conllup",
        conll(lambda i, w, t: f"{i}\t{w}\t{t}", [SENTENCE, OTHER], "# global.columns = ID FORM NER\n# text = a b\n"),
    ),
}


@pytest.mark.parametrize(("name", "text"), LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_words_with_labels_are_sentences_in_every_layout(tmp_path: Path, name: str, text: str, end: str) -> None:
    (tmp_path / name).write_bytes(text.replace("\n", end).encode())
    found = read(tmp_path / name)
    assert [{"tokens": row["tokens"], "labels": row["labels"]} for row in found] == [SENTENCE, OTHER]


def test_universal_dependencies_give_words_and_their_kinds(tmp_path: Path) -> None:
    words = ["1-2\tzum\t_\t_\t_\t_\t_\t_\t_\t_", *(f"{i}\t{w}\tx\t{k}\t_\t_\t0\troot\t_\t_" for i, w, k in UNIVERSAL)]
    (tmp_path / "a.conllu").write_text("# sent_id = 1\n# text = zum Arzt\n" + "\n".join(words) + "\n\n")
    (row,) = read(tmp_path / "a.conllu")
    assert (row["tokens"], row["labels"]) == (["zu", "dem", "Arzt"], ["ADP", "DET", "NOUN"])
    assert row["deprel"] == ["root"] * 3  # `columns` may choose any


UNIVERSAL = [(1, "zu", "ADP"), (2, "dem", "DET"), (3, "Arzt", "NOUN")]


def test_a_word_without_label_costs_its_sentence(tmp_path: Path) -> None:
    text = conll(lambda i, w, t: f"{w}\t{t}", [SENTENCE, OTHER, SENTENCE]).replace("Bonn\tB-LOC", "Bonn")
    (tmp_path / "a.conll").write_text(text)
    assert [row if isinstance(row, str) else line for line, row in told(tmp_path / "a.conll")] == [
        1,
        "line 7 has not the columns that the other lines have",
        9,
    ]


CLASSES = Features({"tokens": Many(Value("string")), "ner_tags": Many(ClassLabel(names=["O", "B-PER"]))})
TAGGED = Dataset.from_dict({"tokens": [["a", "b"], ["c"]], "ner_tags": [[0, 1], [1]]}, features=CLASSES)
NAMED = [{"tokens": ["a", "b"], "ner_tags": ["O", "B-PER"]}, {"tokens": ["c"], "ner_tags": ["B-PER"]}]


def test_numbers_of_classes_are_read_as_their_names(tmp_path: Path) -> None:
    TAGGED.save_to_disk(tmp_path / "saved")
    TAGGED.to_parquet(tmp_path / "a.parquet")
    DatasetDict({"train": TAGGED, "test": TAGGED}).save_to_disk(tmp_path / "splits")
    kinds = Features({"text": Value("string"), "label": ClassLabel(names=["x", "y"])})
    texts = Dataset.from_dict({"text": ["a", "b"], "label": [1, -1]}, features=kinds)
    texts.save_to_disk(tmp_path / "texts")
    assert read(tmp_path / "saved") == read(tmp_path / "a.parquet") == read(tmp_path / "splits") == NAMED
    assert read(tmp_path / "splits" / "test") == NAMED
    assert read(tmp_path / "texts") == [{"text": "a", "label": "y"}, {"text": "b", "label": None}]


def test_a_folder_as_on_the_hub_is_read_by_split(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "README.md").write_text("---\n---\n")
    (tmp_path / "dataset_infos.json").write_text("{}")
    for i in range(2):
        Dataset.from_list(ROWS[6 * i : 6 * i + 6]).to_parquet(tmp_path / "data" / f"train-0000{i}-of-00002.parquet")
    (tmp_path / "data" / "dev.csv").write_text(table(";", ROWS[:3]))
    assert read(tmp_path) == ROWS
    assert [line for line, _ in told(tmp_path)] == [*range(1, 13)]
    assert read(tmp_path, split="validation") == ROWS[:3]
    assert "only after ['train', 'validation']" in code_of(tmp_path, split="test")[1]


def workbook(file: Path, sheets: dict[str, list[list[Any]]]) -> Path:
    book = openpyxl.Workbook()
    book.remove(book.active)
    for name, cells in sheets.items():
        sheet = book.create_sheet(name)
        for row in cells:
            sheet.append(row)
    book.save(file)
    return file


CELLS = [["text", " label ", None], *([row["text"], row["label"], None] for row in ROWS)]


def test_a_workbook_is_read_by_its_header(tmp_path: Path) -> None:
    file = workbook(tmp_path / "a.xlsx", {"notes": [[], *CELLS[:3], [None, " "], *CELLS[3:]]})
    assert read(file) == ROWS
    assert [line for line, _ in told(file)] == [3, 4, *range(6, 16)]
    assert read(workbook(tmp_path / "b.xlsx", {"a": [["My notes"], [], *CELLS]})) == ROWS
    assert read(workbook(tmp_path / "c.xlsx", {"a": [["text"], ["a"], ["b"]]})) == [{"text": "a"}, {"text": "b"}]


def test_of_several_sheets_the_one_named_after_the_split_is_read_and_it_is_told(tmp_path: Path) -> None:
    file = workbook(tmp_path / "a.xlsx", {"about": [["text", "label"], ["a", "b"]], "train": CELLS})
    assert read(file) == ROWS
    assert read(file, split="validation") == [{"text": "a", "label": "b"}]
    reading = how_to_read(file, DataSource(train="a"), "validation")
    assert str(reading) == "excel; sheet 'about', one of 2"


def test_a_formula_is_not_computed_and_numbers_are_numbers(tmp_path: Path) -> None:
    file = workbook(tmp_path / "a.xlsx", {"a": [["text", "label"], ["=1+1", 3], ['=WEBSERVICE("http://a")', 2.5]]})
    assert read(file) == [{"text": None, "label": 3}, {"text": None, "label": 2.5}]


def repacked(file: Path, part: str, change: Callable[[bytes], bytes]) -> Path:
    """The workbook with one of its parts changed."""
    with zipfile.ZipFile(file) as packed:
        parts = {name: packed.read(name) for name in packed.namelist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, content in parts.items():
            packed.writestr(name, change(content) if name == part else content)
    return file


SHEET = "xl/worksheets/sheet1.xml"
ENTITY = b'<!DOCTYPE a [<!ENTITY b "cccccccccc"><!ENTITY d "&b;&b;&b;">]>'


@pytest.mark.timeout(30)
@pytest.mark.parametrize(
    "change",
    [
        lambda xml: xml + b" " * 80 * MIB,
        lambda xml: xml.replace(b"<worksheet", ENTITY + b"<worksheet", 1),
        lambda xml: xml.replace(b'<row r="2"', b'<row r="999999999"', 1),
        lambda xml: xml[:300],
    ],
    ids=["it unpacks to 80 MiB", "entities", "row 999,999,999", "cut off"],
)
def test_a_workbook_that_would_fill_the_memory_is_an_error(tmp_path: Path, change: Callable[[bytes], bytes]) -> None:
    file = repacked(workbook(tmp_path / "a.xlsx", {"a": CELLS}), SHEET, change)
    assert code_of(file)[0] == "data_unreadable"
