"""Patients' questions and four NIH institutes' answers, from MedQuAD: the rows of `make demo-answers`.

Rows are split by disease: a disease that is asked about in one institute's test rows is in nobody's training rows.
"""

import json
from pathlib import Path

from ..compare.data_sets import CUT, RawRow, fraction, medquad

INSTITUTES = ("cancergov", "nhlbi", "niddk", "seniorhealth")  # NCI; heart, lung and blood; diabetes, kidney; aging
FOLDER = "medquad"
_TEST_SHARE = 0.2  # of the diseases
_ROWS = {"train": 200, "test": 24}  # of each institute: what a demo has time for


def write(root: Path) -> Path:
    """Write `<root>/medquad/<institute>/{train,test}.jsonl`, always the same rows.

    Returns:
        The folder of the institutes.
    Raises:
        DataError: `no_shared_folder`: MedQuAD is not on this machine.
    """
    found: dict[tuple[str, str], list[RawRow]] = {}
    for row in medquad():
        split = "test" if fraction(row["focus"].lower()) < _TEST_SHARE else "train"
        found.setdefault((row["site"], split), []).append(row)
    for site in INSTITUTES:
        (root / FOLDER / site).mkdir(parents=True, exist_ok=True)
        for split, count in _ROWS.items():
            drawn = sorted(found[site, split], key=lambda row: fraction(row["question"] + row["answer"]))
            lines = [json.dumps(question_and_answer(row)) + "\n" for row in drawn[:count]]
            (root / FOLDER / site / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    return root / FOLDER


def question_and_answer(row: RawRow) -> dict[str, str]:
    """Make a row of MedQuAD one from which a model learns to answer in its own chat template."""
    return {"instruction": row["question"].strip(), "output": row["answer"].strip()[:CUT]}
