"""A study: sites' rows, a base model, and the plan that every method shares."""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import ConfigError, DataError
from . import data_sets

RATES = (5e-3, 1e-2, 2e-2)  # what every method tries first
RANKS = (2, 2, 2, 4, 4, 8, 8, 16, 16, 32)  # of ten sites, in the order of their names; of others, as widely spread
_PUBLIC_MAX_LENGTHS = {
    "banking77": 24,
    "banking77lm": 48,
    "banking77-two": 24,
    "banking77-disjoint": 24,
    "medquad-types": 24,
    "medquad-two": 24,
    "medquad-three": 24,
    "pubmedqa-years": 64,
    "medquad-lm": 96,
    "mts": 48,
    "mtslm": 96,
}


@dataclass(frozen=True)
class Usual:
    """How studies of a task are measured unless one says otherwise.

    Args:
        column: by which its rows are known.
        test_rows: of each site, that a score is measured on; 0: all.
        max_length: tokens, of data of one's own.
    """

    task: str
    column: str
    metric: str
    lower_is_better: bool
    rounds: int
    test_rows: int
    max_length: int


CLASSIFYING = Usual("sequence_classification", "label", "accuracy", False, 20, 0, 64)
WRITING = Usual("causal_lm", "prompt", "bits_per_byte", True, 10, 50, 128)
TASKS = {usual.task: usual for usual in (CLASSIFYING, WRITING)}


@dataclass(frozen=True)
class Workspace:
    """Where data sets, models and results are kept.

    Args:
        root: holds `data`, `models`, `held_out` and `pooled`.
        results: one file of JSON lines a study, and one of its tuning.
    """

    root: Path
    results: Path

    @classmethod
    def at(cls, root: Path) -> "Workspace":
        return cls(root, root / "results")


@dataclass(frozen=True)
class Study:
    """One folder per site with `train.jsonl` and `test.jsonl`, a base model and a plan.

    Args:
        rounds: of every federation.
        test_rows: of each site, drawn once and for all, that a score is measured on; 0: all.
        rates: learning rates that every method tries first.
        source: the public data set that the rows are of; empty: one's own rows.
    """

    name: str
    folder: Path
    model: Path
    plan: dict[str, Any]
    metric: str
    workspace: Workspace
    rounds: int
    test_rows: int
    rates: tuple[float, ...] = RATES
    lower_is_better: bool = False
    source: str = ""

    def at_seed(self, seed: int) -> "Study":
        """The study as runs from `seed` see it. A split over sites that is drawn by chance is drawn anew for each seed,
        so that scores spread as much as they do over splits.
        """
        if not data_sets.is_drawn(self.source):
            return self
        folder = self.workspace.root / "data" / f"{self.source}-seed-{seed}"
        return replace(self, folder=data_sets.write(self.source, folder, seed=seed))

    @cached_property
    def setup(self) -> str:
        """Which lines of results can be compared with each other: a digest of all that is the same for all methods and
        seeds, in hexadecimal.
        """
        parts = [self.plan, self.rounds, self.test_rows, self.model.name, self.source or self.digest]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    @cached_property
    def names(self) -> list[str]:
        """The sites' names, in order."""
        return sorted(p.parent.name for p in self.folder.glob("*/train.jsonl"))

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all rows, in hexadecimal."""
        found = hashlib.sha256()
        for file in sorted(self.folder.glob("*/*.jsonl")):
            found.update(f"{file.relative_to(self.folder)}\0".encode())
            found.update(file.read_bytes())
        return found.hexdigest()

    def rows(self, site: str, split: str) -> list[str]:
        """The lines of a site's file."""
        return (self.folder / site / f"{split}.jsonl").read_text().splitlines()

    def scored_rows(self, file: Path) -> int:
        """How many rows of a test file a score is measured on."""
        rows = len(file.read_text().splitlines())
        return min(self.test_rows, rows) or rows

    def results(self, tuning_of: str = "") -> Path:
        """The file of the study's results, or of the rates tried in `tuning_of`."""
        return self.workspace.results / (f"{tuning_of}-tuning.jsonl" if tuning_of else f"{self.name}.jsonl")


def study(
    name: str,
    workspace: Workspace,
    folder: Path | None = None,
    model: Path | None = None,
    task: str = "",
    max_length: int = 0,
    rounds: int = 0,
    test_rows: int = 0,
    rates: Sequence[float] = (),
) -> Study:
    """Prepare a study.

    Args:
        name: of the results' file; without `folder`, a public data set of `data_sets`, and behind an `@`, `random` for
            a base model whose weights are random, or `full` for all layers of MiniLM.
        folder: one's own rows, a folder per site.
        model: folder of the base model; unset: the first two layers of MiniLM, or stories260k.
        task: empty: classification where rows have a label, else causal_lm.
        workspace: where data sets, models and results are kept.
        max_length: tokens at which a text is cut; 0: as for the figures of the documentation.
        rounds: of every federation; 0: as for the figures of the documentation.
        test_rows: of each site, that a score is measured on; 0: as for the figures of the documentation.
        rates: learning rates that every method tries first; empty: as for the figures of the documentation.
    Raises:
        ConfigError: `unknown_name`: nothing compares methods on this task; `ambiguous_task`: rows have both a label and
            a prompt, and `task` is empty.
        DataError: `no_study_data`: `folder` has no site with both files; `unreadable_row`: a row is no JSON object, or
            has no label where others have one; `no_shared_folder`: no public data here.
    """
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.@-]*", name):
        raise ConfigError(
            f"{name!r} cannot name a study; use letters, digits, dots, dashes and underscores", code="study_name"
        )
    if task and task not in TASKS:
        raise ConfigError(f"--task {task!r} is not compared; known: {', '.join(TASKS)}", code="unknown_name")
    source, _, start = name.partition("@")
    root = folder or data_sets.write(source, workspace.root / "data" / source)
    first = _first_row(root)
    usual = TASKS[task] if task else _usual(first)
    length = max_length or _PUBLIC_MAX_LENGTHS.get(_kind(source) if not folder else "", usual.max_length)
    rows = 4 if usual is WRITING and length > 64 else 8
    plan: dict[str, Any] = {
        "task": usual.task,
        "max_length": length,
        "training": {"local_steps": 5, "batch_size": rows, "lr_scheduler_type": "cosine"},
    }
    if usual is CLASSIFYING:
        plan["labels"] = _labels(root)
    return Study(
        name,
        root,
        model or _model(usual, start, workspace),
        plan,
        usual.metric,
        workspace,
        rounds or usual.rounds,
        test_rows or usual.test_rows,
        tuple(rates) or RATES,
        usual.lower_is_better,
        "" if folder else source,
    )


def _first_row(root: Path) -> dict[str, Any]:
    files = sorted(root.glob("*/train.jsonl"))
    if not files or not all(file.with_name("test.jsonl").exists() for file in files):
        raise DataError(
            "a study needs one folder per site, each with train.jsonl and test.jsonl", str(root), code="no_study_data"
        )
    return next(json_lines(files[0]), {})


def json_lines(file: Path) -> Iterator[dict[str, Any]]:
    """Read a file of JSON objects, one a line.

    Raises:
        DataError: `unreadable_row`: names the file and the line.
    """
    with file.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if not isinstance(row, dict):
                raise DataError(
                    f"{file.parent.name}/{file.name}, line {number} is no JSON object; mend it, or delete the line",
                    str(file),
                    code="unreadable_row",
                )
            yield row


def _labels(root: Path) -> list[str]:
    found = set()
    for file in sorted(root.glob("*/*.jsonl")):
        for number, row in enumerate(json_lines(file), 1):
            if not isinstance(row.get("label"), str):
                raise DataError(
                    f"{file.parent.name}/{file.name}, line {number} has no label; see nvflare-fm data check",
                    str(file),
                    code="unreadable_row",
                )
            found.add(row["label"])
    return sorted(found)


def _usual(first: dict[str, Any]) -> Usual:
    fits = [usual for usual in TASKS.values() if usual.column in first]
    if len(fits) == 1:
        return fits[0]
    if fits:
        raise ConfigError(
            "the rows have both a label and a prompt; say which task to compare on: --task sequence_classification "
            "or --task causal_lm",
            code="ambiguous_task",
        )
    raise DataError("the first row has neither a label nor a prompt; see nvflare-fm data check", code="unreadable_row")


def _model(usual: Usual, start: str, workspace: Workspace) -> Path:
    if usual is WRITING:
        return data_sets.stories260k()
    if start == "full":
        return data_sets.minilm()
    base = data_sets.first_layers(data_sets.minilm(), 2, workspace.root / "models" / "minilm-2")
    return data_sets.randomized(base, workspace.root / "models" / f"{base.name}-random") if start == "random" else base


def _kind(source: str) -> str:
    return source if source in _PUBLIC_MAX_LENGTHS else source.rpartition("-")[0]
