"""A site's rows as token ids. A bad row is never dropped in silence: it is counted and logged.

The rule: rows that cannot be used are left out, counted, and listed in the site's log by line and reason. More than
`max_bad_rows` of a file, or no good row at all, stops the site. No message repeats a row's content, and what a job is
told has no number of rows and no line in it: with the labels that a job chooses, they would count the site's labels.
"""

import hashlib
import logging
import random
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..config import RoundPlan
from ..errors import DataError
from .columns import Found, mapped
from .rows import how_to_read, rows
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

    @cached_property
    def contents(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """What tells the rows to train on apart, and those to measure on: the same for the same tokens and labels."""
        return _contents(self.train), _contents(self.validation)


def load(
    source: DataSource, plan: RoundPlan, task: Task, tokenizer: PreTrainedTokenizerBase, vocabulary: int | None = None
) -> SiteData:
    """Reads and tokenizes the site's files. Where the site names no validation file, a tenth of the rows is held out.

    The rows held out depend on their place in the file alone, so no later job trains on what an earlier one measured.

    Args:
        vocabulary: how many tokens the base model has rows for.

    Raises:
        DataError: a file cannot be read, holds no usable row, or too many bad ones.
    """
    train, bad = _read(source, source.train, "train", plan, task, tokenizer, vocabulary)
    if source.validation:
        validation, more = _read(source, source.validation, "validation", plan, task, tokenizer, vocabulary)
        return SiteData(Dataset.from_list(train), Dataset.from_list(validation), bad + more)
    if len(train) < 2:
        raise DataError(
            f"data {plan.data!r} has no row to hold out and no validation file; add rows or name a validation file",
            code="no_rows",
        )
    held = set(random.Random(0).sample(range(len(train)), max(1, round(_HELD_OUT * len(train)))))
    return SiteData(
        Dataset.from_list([row for i, row in enumerate(train) if i not in held]),
        Dataset.from_list([row for i, row in enumerate(train) if i in held]),
        bad,
    )


def _contents(rows: Dataset) -> tuple[str, ...]:
    columns = zip(rows["input_ids"][:], rows["labels"][:], strict=True)
    return tuple(hashlib.blake2b(repr(row).encode(), digest_size=16).hexdigest() for row in columns)


def measured(count: int, asked: int, least: int) -> int:
    """How many of `count` validation rows are measured, where `asked` are asked for; 0: all.

    All, or a multiple of `least` that leaves no fewer than `least`: else two answers would differ by a few rows, and
    their difference would tell what the model makes of those.
    """
    part = min(asked, count - least) // least * least
    return part if 0 < asked < count and part > 0 else count


def _read(
    source: DataSource,
    file: str,
    split: str,
    plan: RoundPlan,
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    vocabulary: int | None,
) -> tuple[list[dict[str, Any]], int]:
    good: list[dict[str, Any]] = []
    bad, columns, where = _BadRows(), Found(), f"data {plan.data!r} ({split})"
    reading = how_to_read(held_in(Path(file), source.folder), source, split)
    log.info("%s is read as %s", where, reading)
    for line, row in rows(reading):
        try:
            if isinstance(row, BadRow):
                raise row
            columns.add(row)
            encoded = task.encode(mapped(row, source.columns), tokenizer, plan)
            if vocabulary is not None and max(encoded["input_ids"]) >= vocabulary:
                raise BadRow("it has a token that the base model has no row for")
            good.append(encoded)
        except BadRow as reason:
            bad.add(line, str(reason))
        except (MemoryError, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # half an emoji is enough, and what is written in Rust panics with no Exception
            log.debug("line %d", line, exc_info=True)  # its words may repeat the row
            bad.add(line, f"the row cannot be tokenized ({type(error).__name__})")
    columns.check(source.columns, plan.task, where, is_used=bool(good))
    _report(where, len(good), bad, source.max_bad_rows)
    return good, bad.count


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
        raise DataError(f"{where} is empty; add rows", code="no_rows")
    if not bad.count:
        return
    listed = "; ".join(bad.first) + ("; …" if bad.count > _SHOWN else "")
    said = f"{where}: {bad.count} of {good + bad.count} rows cannot be used: {listed}"
    if not good or bad.count > limit * (good + bad.count):
        raise DataError(
            f"{where} has more rows that cannot be used for this task and these labels than the site's max_bad_rows "
            "allows; the site's log lists them: mend them, or raise max_bad_rows if that is as it should be",
            said,
            code="bad_rows",
        )
    reasons = ", ".join(f"{count} × {reason}" for reason, count in bad.reasons.most_common())
    log.warning("%s (in all: %s)", said, reasons)
