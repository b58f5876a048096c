"""Real data as one folder per site: `<site>/train.jsonl` and `<site>/test.jsonl`, the layout every benchmark reads.

    python tests/benchmarks/sites.py medquad-lm OUT
    python tests/benchmarks/sites.py medquad-types OUT

MedQuAD is split by disease, never by row, because 612 diseases occur at more than one NIH institute: a disease is in
the test set of all sites or of none.
"""

import gzip
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import typer

SHARED = Path(os.environ.get("NVFLARE_FM_SHARED", Path(__file__).parents[3] / "shared"))
MODELS = {"stories260k": SHARED / "models" / "stories260k"}
CUT = 1000  # characters of an answer; every benchmark reads fewer tokens than that
Row = dict[str, Any]


def fraction(key: str) -> float:
    """A number in [0, 1) that depends on `key` alone."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:6], "big") / 2**48


def medquad() -> Iterator[Row]:
    with gzip.open(SHARED / "data" / "medquad" / "medquad.jsonl.gz", "rt") as lines:
        yield from map(json.loads, lines)


def question_and_answer(row: Row) -> Row:
    return {"prompt": row["question"].strip() + "\n", "completion": row["answer"].strip()[:CUT]}


def answer_and_type(row: Row) -> Row:
    return {"text": row["answer"].strip()[:CUT], "label": row["qtype"]}


SETS: dict[str, Callable[[Row], Row]] = {"medquad-lm": question_and_answer, "medquad-types": answer_and_type}


def write(name: str, out: Path, test_share: float = 0.2) -> Path:
    """Writes the named data set to `out`, once. Rows keep their order in the source."""
    if (out / "labels.json").exists():
        return out
    files: dict[Path, list[str]] = {}
    labels = set()
    for row in medquad():
        split = "test" if fraction(row["focus"].lower()) < test_share else "train"
        record = SETS[name](row)
        labels.add(record.get("label"))
        files.setdefault(out / row["site"] / f"{split}.jsonl", []).append(json.dumps(record))
    for file, lines in files.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("\n".join(lines) + "\n")
    (out / "labels.json").write_text(json.dumps(sorted(filter(None, labels))))
    return out


if __name__ == "__main__":
    typer.run(write)
