"""SYNTHETIC clinical-looking notes for the demo: no patient, no hospital and no model wrote any of them.

Sentences are drawn from `vocabulary.csv`, ten findings for each of six departments in three wordings. The label is the
department the note is for; its history speaks of another department, so single words do not give the answer away.
"""

import csv
import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path

FOLDER = "synthetic_notes"  # said wherever the notes are kept
Note = dict[str, str]  # {"text": …, "label": …}


@dataclass(frozen=True)
class Style:
    """How one made-up hospital writes, and whom it sees.

    Args:
        wordings: columns of the vocabulary it draws from.
        frames: sentences with gaps for two findings of the department, one of another, and small talk.
        often: departments that make up most of its training notes.
        examples: training notes.
        rank: of the adapter its machine trains.
    """

    wordings: tuple[str, ...]
    frames: tuple[str, ...]
    often: tuple[str, ...]
    examples: int
    rank: int


STYLES: Mapping[str, Style] = {
    "letters": Style(
        wordings=("formal",),
        frames=(
            "Dear colleague, please see this {age}-year-old {job} with {one} for {n} weeks, and lately {two}. "
            "{talk}. The past history includes {past}. With kind regards",
            "Dear doctor, I reviewed this {age}-year-old {job}, known for {past}, which is stable. {talk}. "
            "There is now {one}, and {two}. Yours sincerely",
        ),
        often=("cardiology", "neurology"),
        examples=240,
        rank=16,
    ),
    "shorthand": Style(
        wordings=("short",),
        frames=(
            "{age}{sex} {one}, {two} x{n}/7. PMH {past}. NKDA. {code}. Ref pls.",
            "PMH {past}. PC: {one}. o/e {two}. {age}{sex}. {code}. Plan r/v.",
        ),
        often=("respiratory", "orthopaedics"),
        examples=180,
        rank=8,
    ),
    "triage": Style(
        wordings=("lay",),
        frames=(
            "Caller says {one}. Also {two}. Going on for {n} days. Once had this too: {past}. {talk}.",
            "Mother of {n}, {age}. Years back {past}, that was sorted. {talk}. Now {one}, and {two}.",
        ),
        often=("gastroenterology", "neurology"),
        examples=120,
        rank=4,
    ),
    "forms": Style(
        wordings=("formal", "short"),
        frames=(
            "AGE {age} / SEX {sex} / HISTORY {past} / REASON {one}; {two} / DAYS {n} / CODE {code}",
            "REASON {one} / FINDING {two} / AGE {age} / SEX {sex} / HISTORY {past} / CODE {code}",
        ),
        often=("nephrology", "cardiology"),
        examples=90,
        rank=2,
    ),
}

_OFTEN = 0.72  # share of a site's training notes that are for its `often` departments
_TEST_PER_LABEL = 10  # tomorrow's patients come with anything: test sets hold every department equally
_JOBS = ("retired teacher", "baker", "bus driver", "gardener", "nurse", "violinist", "farmer", "student")
_CODES = ("routine", "soon", "urgent", "obs stable", "afebrile", "lives alone", "GCS 15", "no meds")
_TALK = (
    "There is no known allergy", "The daughter came along", "Sleep has been poor", "The patient lives alone",
    "Appetite is fair", "No recent travel", "The patient is worried", "Work has been stressful",
)  # fmt: skip


@cache
def findings() -> dict[str, list[dict[str, str]]]:
    """Department → its findings, each in every wording."""
    by_department: dict[str, list[dict[str, str]]] = {}
    with files(__package__).joinpath("vocabulary.csv").open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            by_department.setdefault(row.pop("department"), []).append(row)
    return by_department


def generate(root: Path, seed: int = 0) -> Path:
    """Writes `<root>/synthetic_notes/<site>/{train,test}.jsonl`; the same seed writes the same bytes."""
    folder = root / FOLDER
    for site, style in STYLES.items():
        (folder / site).mkdir(parents=True, exist_ok=True)
        draw = random.Random(f"{seed}/{site}")
        for split, notes in (("test", _test(style, draw)), ("train", _train(style, draw))):
            lines = [json.dumps(note) + "\n" for note in notes]
            (folder / site / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


def _test(style: Style, draw: random.Random) -> list[Note]:
    return [_note(style, label, draw) for label in sorted(findings()) for _ in range(_TEST_PER_LABEL)]


def _train(style: Style, draw: random.Random) -> list[Note]:
    return [_note(style, label, draw) for label in _labels(style, draw)]


def _labels(style: Style, draw: random.Random) -> Iterator[str]:
    seldom = sorted(set(findings()) - set(style.often))
    for _ in range(style.examples):
        yield draw.choice(style.often if draw.random() < _OFTEN else seldom)


def _note(style: Style, label: str, draw: random.Random) -> Note:
    by_department = findings()
    other = draw.choice(sorted(set(by_department) - {label}))
    one, two = draw.sample(by_department[label], 2)
    past = draw.choice(by_department[other])
    text = draw.choice(style.frames).format(
        one=one[draw.choice(style.wordings)],
        two=two[draw.choice(style.wordings)],
        past=past[draw.choice(style.wordings)],
        age=draw.randint(19, 93),
        sex=draw.choice("MF"),
        n=draw.randint(2, 9),
        job=draw.choice(_JOBS),
        talk=draw.choice(_TALK),
        code=draw.choice(_CODES),
    )
    return {"text": text, "label": label}
