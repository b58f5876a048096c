"""The demo: its notes are made from a seed, its errors name site, file and line, and its picture can be read."""

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import pytest

from nvflare_fm.demo import notes, report
from nvflare_fm.demo.answers import ANSWERS
from nvflare_fm.demo.generator import FOLDER, STYLES, findings, generate
from nvflare_fm.demo.notes import NOTES
from nvflare_fm.demo.picture import Panel, _apart, _span, draw
from nvflare_fm.demo.trial import Subject, Trial, read_sites
from nvflare_fm.errors import DataError
from nvflare_fm.record.round import Round
from tests.codes import refused

GOOD = [{"text": "a note", "label": "one"}, {"text": "another", "label": "two"}]


def rows(file: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def folder(root: Path, sites: Mapping[str, Sequence[object]]) -> Path:
    for site, lines in sites.items():
        (root / site).mkdir(parents=True)
        for split in ("train", "test"):
            text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
            (root / site / f"{split}.jsonl").write_text(text, encoding="utf-8")
    return root


def trial(root: Path) -> Trial:
    return notes.prepare(root, root / ".out", rounds=1, steps=1, seed=0)


def test_the_same_seed_makes_the_same_notes_and_another_seed_others(tmp_path: Path) -> None:
    first, again, other = (generate(tmp_path / str(i), seed) for i, seed in enumerate((0, 0, 1)))
    for site in STYLES:
        for split in ("train.jsonl", "test.jsonl"):
            assert (first / site / split).read_bytes() == (again / site / split).read_bytes()
            assert (first / site / split).read_bytes() != (other / site / split).read_bytes()


def test_the_notes_are_called_synthetic_where_they_are_kept(tmp_path: Path) -> None:
    assert "synthetic" in FOLDER
    assert generate(tmp_path).name == FOLDER


def test_each_site_mostly_sees_its_own_departments_and_is_tested_on_all_equally(tmp_path: Path) -> None:
    notes = generate(tmp_path)
    for site, style in STYLES.items():
        labels = [row["label"] for row in rows(notes / site / "train.jsonl")]
        assert len(labels) == style.examples
        assert sum(label in style.often for label in labels) > 0.6 * len(labels)
        tested = [row["label"] for row in rows(notes / site / "test.jsonl")]
        assert {tested.count(label) for label in findings()} == {len(tested) // len(findings())}


def test_no_test_note_is_a_training_note(tmp_path: Path) -> None:
    notes = generate(tmp_path)
    for site in STYLES:
        train, test = ({row["text"] for row in rows(notes / site / f"{split}.jsonl")} for split in ("train", "test"))
        assert not train & test


def test_the_history_of_a_note_never_speaks_of_its_own_department() -> None:
    wordings = [{phrase for row in found for phrase in row.values()} for found in findings().values()]
    assert sum(map(len, wordings)) == len(set().union(*wordings)), "two departments share a phrase"


def test_every_finding_has_every_wording() -> None:
    for found in findings().values():
        assert len(found) == 10
        assert all(row.keys() == {"formal", "short", "lay"} and all(row.values()) for row in found)


@pytest.mark.parametrize(
    ("lines", "code"),
    [
        ([*GOOD, "not json"], "bad_rows"),
        ([*GOOD, {"text": "a note"}], "bad_rows"),
        ([*GOOD, {"text": " ", "label": "one"}], "bad_rows"),
        ([*GOOD, ["a note", "one"]], "bad_rows"),
        ([], "no_rows"),
    ],
)
def test_a_row_that_cannot_be_used_is_named_by_site_file_and_line(
    tmp_path: Path, lines: list[object], code: str
) -> None:
    with refused(code, DataError) as error:
        trial(folder(tmp_path, {"north": list(GOOD), "south": lines}))
    where = ["'south'", "train.jsonl", *(["line 3"] if lines else [])]
    assert all(name in error.value.message for name in where), error.value.message
    assert error.value.message.count(f"[{code}]") == 1


def test_a_missing_file_says_what_a_site_needs(tmp_path: Path) -> None:
    sites = folder(tmp_path, {"north": list(GOOD), "south": list(GOOD)})
    (sites / "south" / "test.jsonl").unlink()
    with refused("no_data", DataError) as error:
        trial(sites)
    assert "'south'" in error.value.message


def test_files_are_read_as_a_site_reads_them(tmp_path: Path) -> None:
    sites = folder(tmp_path, {"north": list(GOOD), "south": list(GOOD)})
    (sites / "south" / "train.jsonl").unlink()
    (sites / "south" / "train.csv").write_bytes("text;label\nÜbung;one\nanother;two\n".encode("cp1252"))
    south = trial(sites).sites[1]
    assert south.rows("train") == [{"text": "Übung", "label": "one"}, {"text": "another", "label": "two"}]
    assert trial(sites).offer(south.folder).data_set("notes").train.endswith("train.csv")
    (sites / "south" / "train.json").write_text("[]")
    with refused("no_data", DataError):
        south.rows("train")


@pytest.mark.parametrize(
    ("sites", "code"),
    [(["only"], "too_few_sites"), (["north", "so uth"], "site_name"), (["a", "server"], "site_name")],
)
def test_folders_that_cannot_be_a_federation_are_refused(tmp_path: Path, sites: list[str], code: str) -> None:
    with refused(code, DataError):
        read_sites(folder(tmp_path, {site: list(GOOD) for site in sites}), NOTES.columns, (1,))


def test_one_label_is_nothing_to_learn(tmp_path: Path) -> None:
    with refused("one_label", DataError):
        trial(folder(tmp_path, {"north": [GOOD[0]], "south": [GOOD[0]]}))


def test_the_sites_have_different_ranks(tmp_path: Path) -> None:
    made_here = notes.prepare(None, tmp_path, rounds=1, steps=1, seed=0)
    ranks = {site.name: site.rank for site in made_here.sites}
    assert ranks == {"letters": 16, "shorthand": 8, "triage": 4, "forms": 2}
    assert made_here.plan.rank == 16
    theirs = read_sites(folder(tmp_path / ".mine", dict.fromkeys("abcde", GOOD)), NOTES.columns, notes.RANKS)
    assert [site.rank for site in theirs] == [16, 8, 4, 2, 16]


def test_bytes_are_counted_to_every_site_and_back() -> None:
    first, second = {"a": {"bytes_up": 2}, "b": {"bytes_up": 3}}, {"a": {}, "b": {}}
    lines = [
        Round(round=number, total_rounds=2, bytes_down=down, asked=("a", "b"), sites=sites)
        for number, (down, sites) in enumerate([(5, first), (7, second)])
    ]
    assert report.traffic(lines) == {"down": 24, "up": 5}


@pytest.mark.parametrize("values", [(0.5, 0.5, 0.5), (1.0, 0.99, 0.98), (0.0, 0.01, 0.9), (0.9, 0.1, 0.5)])
@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.65, 0.85), (-2.0, 40.0)])
def test_labels_of_the_curves_do_not_overlap_and_stay_in_the_picture(
    values: tuple[float, ...], low: float, high: float
) -> None:
    heights = sorted(_apart([low + value * (high - low) for value in values], low, high))
    assert all(above - below > 0.07 * (high - low) for below, above in pairwise(heights))
    assert heights[0] >= low
    assert heights[-1] <= high + 1e-4


@pytest.mark.parametrize("subject", [NOTES, ANSWERS], ids=lambda subject: subject.rows)
def test_the_picture_is_drawn(tmp_path: Path, subject: Subject) -> None:
    panels = dict.fromkeys(("mean", "north", "south"), Panel([0.1, 0.5, 0.8], alone=0.4, pooled=0.4))
    assert draw(tmp_path / "curves.png", panels, subject, "a title").stat().st_size > 10_000


def test_an_axis_holds_all_values_of_its_panels() -> None:
    assert _span([Panel([0.7, 0.6], 0.5, 0.65), Panel([0.9], 0.8, 0.8)]) == pytest.approx((0.468, 0.932))
    low, high = _span([Panel([0.7, 0.7], 0.7, 0.7)])
    assert low < 0.7 < high
