"""A site's rows as token ids. A bad row is never dropped in silence: it is counted and logged.

The rule: rows that cannot be used are left out, counted in the site's report and listed in its log by line and reason.
More than `max_bad_rows` of a file, or no good row at all, stops the site. Messages never repeat a row's content.
"""

import logging
import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..config import RoundPlan
from ..errors import DataError
from .rows import rows
from .site_config import DataSource, held_in
from .tasks import BadRow, Task

log = logging.getLogger(__name__)
_SHOWN = 5
_HELD_OUT = 0.1


@dataclass(frozen=True)
class SiteData:
    """Tokenized rows of one alias."""

    train: Dataset
    validation: Dataset
    bad_rows: int


def load(source: DataSource, plan: RoundPlan, task: Task, tokenizer: PreTrainedTokenizerBase) -> SiteData:
    """Reads and tokenizes the site's files. Where the site names no validation file, a tenth of the rows is held out.

    The rows held out depend on their place in the file alone, so no later job trains on what an earlier one measured.

    Raises:
        DataError: a file cannot be read, holds no usable row, or too many bad ones.
    """
    train, bad = _read(source, source.train, "train", plan, task, tokenizer)
    if source.validation:
        validation, more = _read(source, source.validation, "validation", plan, task, tokenizer)
        return SiteData(Dataset.from_list(train), Dataset.from_list(validation), bad + more)
    if len(train) < 2:
        raise DataError(
            f"data {plan.data!r} has one row and no validation file; add rows or name a validation file",
            code="data_one_row",
        )
    held = set(random.Random(0).sample(range(len(train)), max(1, round(_HELD_OUT * len(train)))))
    return SiteData(
        Dataset.from_list([row for i, row in enumerate(train) if i not in held]),
        Dataset.from_list([row for i, row in enumerate(train) if i in held]),
        bad,
    )


def _read(
    source: DataSource, file: str, split: str, plan: RoundPlan, task: Task, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[dict[str, Any]], int]:
    good: list[dict[str, Any]] = []
    bad = _BadRows()
    for line, row in rows(held_in(Path(file), source.folder), source.format, split):
        try:
            if isinstance(row, BadRow):
                raise row
            good.append(task.encode(_mapped(row, source.columns), tokenizer, plan))
        except BadRow as reason:
            bad.add(line, str(reason))
        except MemoryError:
            raise
        except Exception as error:  # a tokenizer raises what it likes, and may repeat the row
            log.debug("line %d", line, exc_info=True)
            bad.add(line, f"the row cannot be tokenized ({type(error).__name__})")
    _report(f"data {plan.data!r} ({split})", len(good), bad, source.max_bad_rows)
    return good, bad.count


def _mapped(row: Mapping[str, Any], columns: Mapping[str, str]) -> Mapping[str, Any]:
    return {**row, **{ours: row.get(theirs) for ours, theirs in columns.items()}}


@dataclass
class _BadRows:
    """How many rows cannot be used and why, and the first of them: a file can hold millions."""

    first: list[str] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)

    @property
    def count(self) -> int:
        return self.reasons.total()

    def add(self, line: int, reason: str) -> None:
        self.reasons[reason] += 1
        if len(self.first) < _SHOWN:
            self.first.append(f"line {line}: {reason}")


def _report(where: str, good: int, bad: _BadRows, limit: float) -> None:
    if not good and not bad.count:
        raise DataError(f"{where} is empty; add rows", code="data_empty")
    if not bad.count:
        return
    listed = "; ".join(bad.first) + ("; …" if bad.count > _SHOWN else "")
    said = f"{where}: {bad.count} of {good + bad.count} rows cannot be used: {listed}"
    if not good or bad.count > limit * (good + bad.count):
        raise DataError(
            f"{said}. Mend them, or raise the site's max_bad_rows ({limit:g}) if that is as it should be",
            code="data_bad_rows",
        )
    reasons = ", ".join(f"{count} × {reason}" for reason, count in bad.reasons.most_common())
    log.warning("%s (in all: %s)", said, reasons)
