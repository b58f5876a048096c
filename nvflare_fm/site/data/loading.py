"""A site's rows as token ids. A bad row is never dropped in silence: it is counted and logged.

The rule: rows that cannot be used are left out, counted, and listed in the site's log by line and reason. More than
`max_bad_rows` of a file, or no good row at all, stops the site. What is cut of the others, and labels that are not
taken as written, are counted there too. No message repeats a row's content, and what a job is told has no number of
rows and no line in it: with the labels that a job chooses, they would count the site's labels.
"""

import hashlib
import logging
import random
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ...config import ROW, RoundPlan
from ...errors import DataError
from ..offer.site_config import DataSource, held_in
from ..tasks import BadRow, Cut, Task, counted
from .columns import Found, mapped
from .rows import ROWS_LIMIT, how_to_read, rows

log = logging.getLogger(__name__)
Examples = tuple[dict[str, Any], ...]  # of one row
Written = Mapping[str, Any]  # a row under the names that its task reads
T = TypeVar("T")
_SHOWN = 5
_HELD_OUT = 0.1
_FEW_CUT = 0.05


@dataclass(frozen=True)
class SiteData:
    """Tokenized rows of one alias. A row of the file is one example, or several that stand one after the other.

    Args:
        train_rows: for each example in `train`, the number of its row.
        validation_rows: likewise.
        train_units: for each example in `train`, the number of the record that the plan's privacy protects.
        cut: what is not learned because texts are too long. It stays at the site, as do the remarks.
        remarks: what was taken otherwise than written, with how many rows it was, most rows first.
    """

    train: Dataset
    validation: Dataset
    train_rows: tuple[int, ...]
    validation_rows: tuple[int, ...]
    train_units: tuple[int, ...]
    bad_rows: int
    cut: Cut = field(default_factory=Cut)
    remarks: tuple[str, ...] = ()

    @cached_property
    def contents(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """What tells the rows behind the examples to train on apart, and those behind the examples to measure on: the
        same for the examples of one row, and for rows of the same tokens and labels.
        """
        return contents_of(self.train, self.train_rows), contents_of(self.validation, self.validation_rows)

    @cached_property
    def different(self) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
        """The rows to train on and those to measure on, each by its content: places of its examples, of rows that are
        alike those of the first.
        """
        train, validation = self.contents
        return _places(train, self.train_rows), _places(validation, self.validation_rows)

    def measured(self, asked: int, least: int) -> int:
        """How many examples for validation are measured: all of as many rows as `measured` says."""
        numbers = list(dict.fromkeys(self.validation_rows))
        count = measured(len(numbers), asked, least)
        return len(self.validation) if count == len(numbers) else self.validation_rows.index(numbers[count])


def load(
    source: DataSource, plan: RoundPlan, task: Task, tokenizer: PreTrainedTokenizerBase, vocabulary: int | None = None
) -> SiteData:
    """Reads and tokenizes the site's files. Where the site names no validation file, a tenth of the rows is held out.

    The rows held out depend on their place in the file and on how many there are, so no later job trains on what an
    earlier one measured. Under differential privacy each row's own content decides: with one row more, all others are
    trained on or held out as without it, as the accountants take for granted.
    Those to measure on come in an order drawn once and for all: files are often sorted, and a job may measure a part.

    Args:
        vocabulary: how many tokens the base model has rows for.

    Raises:
        DataError: a file cannot be read, holds no usable row, or too many bad ones.
    """
    train = _read(source, source.train, "train", plan, task, tokenizer, vocabulary)
    if source.validation:
        validation = _read(source, source.validation, "validation", plan, task, tokenizer, vocabulary)
        return _site_data(train.good, _mixed(validation.good), train.units, [train, validation])
    kept, held = _held_out(train.good, plan)
    good, units = train.good, train.units
    return _site_data([good[i] for i in kept], [good[i] for i in held], [units[i] for i in kept], [train])


def as_written(
    source: DataSource, plan: RoundPlan, task: Task, tokenizer: PreTrainedTokenizerBase, vocabulary: int | None = None
) -> tuple[list[Written], list[Written]]:
    """Reads the rows of which `load` makes what is trained on and what is measured on, before they are tokenized.

    Returns:
        Both, under the names of columns and labels that the task reads.
    Raises:
        DataError: as `load`.
    """
    train = _read(source, source.train, "train", plan, task, tokenizer, vocabulary, keeps=True)
    if not source.validation:
        kept, held = _held_out(train.good, plan)
        return [train.written[i] for i in kept], [train.written[i] for i in held]
    validation = _read(source, source.validation, "validation", plan, task, tokenizer, vocabulary, keeps=True)
    return train.written, _mixed(validation.written)


def _held_out(rows: list[Examples], plan: RoundPlan) -> tuple[list[int], list[int]]:
    """The places of the rows without a tenth of them, and of that tenth: perhaps of none, where content decides."""
    if plan.privacy.asked:
        held = {place for place, row in enumerate(rows) if _chance(row) < _HELD_OUT}
    else:
        held = set(random.Random(0).sample(range(len(rows)), max(1, round(_HELD_OUT * len(rows)))))
    if len(rows) < 2 or len(held) == len(rows):
        raise DataError(
            f"data {plan.data!r} has too few rows to hold some out, and no validation file; add rows or name a "
            "validation file",
            code="no_validation_rows",
        )
    return [place for place in range(len(rows)) if place not in held], _mixed(sorted(held))


def _chance(row: Examples) -> float:
    """A number from 0 to 1 that follows from what a row says, and is as good as drawn."""
    return int.from_bytes(hashlib.blake2b(repr(row).encode(), digest_size=7).digest(), "big") / 2**56


def _mixed(rows: list[T]) -> list[T]:
    """The rows in an order that depends on how many there are, and on nothing else."""
    return random.Random(0).sample(rows, len(rows))


def _site_data(
    train: list[Examples], validation: list[Examples], units: list[Hashable], files: list["_File"]
) -> SiteData:
    numbers = {unit: number for number, unit in enumerate(dict.fromkeys(units))}
    remarks = sum((file.remarks for file in files), Counter[str]())
    examples = Dataset.from_list([example for row in train for example in row])
    measured_on = [example for row in validation for example in row]
    return SiteData(
        examples,
        Dataset.from_list(measured_on) if measured_on else examples.select([]),
        tuple(number for number, row in enumerate(train) for _ in row),
        tuple(number for number, row in enumerate(validation) for _ in row),
        tuple(numbers[unit] for unit, row in zip(units, train, strict=True) for _ in row),
        sum(file.bad.count for file in files),
        sum((file.cut for file in files), Cut()),
        tuple(f"{counted(count, 'row', 'rows')}: {remark}" for remark, count in remarks.most_common()),
    )


def contents_of(examples: Dataset, rows: Sequence[int]) -> tuple[str, ...]:
    """What tells the rows behind some examples apart, by example: see `SiteData.contents`."""
    digests = {row: hashlib.blake2b(digest_size=16) for row in rows}
    for row, *example in zip(rows, examples["input_ids"][:], examples["labels"][:], strict=True):
        digests[row].update(repr(example).encode())
    told = {row: digest.hexdigest() for row, digest in digests.items()}
    return tuple(told[row] for row in rows)


def _places(contents: Sequence[str], rows: Sequence[int]) -> dict[str, list[int]]:
    first: dict[str, int] = {}
    places: dict[str, list[int]] = {}
    for place, (content, row) in enumerate(zip(contents, rows, strict=True)):
        if first.setdefault(content, row) == row:
            places.setdefault(content, []).append(place)
    return places


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
    keeps: bool = False,
) -> "_File":
    found, where = _File(), f"data {plan.data!r} ({split})"
    reading = how_to_read(held_in(Path(file), source.folder), source, split)
    log.log(logging.WARNING if reading.is_notable else logging.INFO, "%s is read as %s", where, reading)
    examples = 0
    for line, row in rows(reading):
        try:
            if isinstance(row, BadRow):
                raise row
            found.columns.add(row)
            named = mapped(row, source)
            unit = unit_of(named, plan) if split == "train" else None
            encoded = task.encode(named, tokenizer, plan)
            if vocabulary is not None and max(max(each["input_ids"]) for each in encoded.examples) >= vocabulary:
                raise BadRow("it has a token that the base model has no row for", code="token_without_row")
            found.good.append(encoded.examples)
            found.units.append(len(found.units) if unit is None else unit)
            found.written += [named] if keeps else []
            found.cut += encoded.cut
            found.remarks.update(encoded.remarks)
            examples += len(encoded.examples)
        except BadRow as reason:
            found.bad.add(line, reason)
        except (MemoryError, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # half an emoji is enough, and what is written in Rust panics with no Exception
            log.debug("line %d", line, exc_info=True)  # its words may repeat the row
            found.bad.add(line, BadRow(f"the row cannot be tokenized ({type(error).__name__})", code="not_tokenized"))
        if examples > ROWS_LIMIT:
            raise DataError(f"{where} has more than {ROWS_LIMIT} answers; offer fewer rows", code="too_many_examples")
    _report(where, found, source, plan, task)
    return found


def unit_of(row: Written, plan: RoundPlan) -> str | None:
    """Whose row it is, where the plan protects more than a row; it stays in this process, and is no part of a text.

    Raises:
        BadRow: the row does not say so.
    """
    unit = plan.privacy.unit
    if not plan.privacy.asked or unit == ROW:
        return None
    value = row.get(unit)
    if isinstance(value, bool) or not isinstance(value, str | int) or not str(value).strip():
        raise BadRow(
            f"{unit!r}, the plan's privacy.unit, is missing or neither a text nor a whole number; the site file says "
            "under columns which column of the file it is",
            code="no_unit",
            tells_job=True,
        )
    return str(value).strip()


@dataclass
class _BadRows:
    """How many rows cannot be used and why, and the first of them: a file can hold millions."""

    first: list[str] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)
    kinds: dict[str, BadRow] = field(default_factory=dict)  # one for each reason

    @property
    def count(self) -> int:
        return self.reasons.total()

    def add(self, line: int, reason: BadRow) -> None:
        self.reasons[str(reason)] += 1
        self.kinds[str(reason)] = reason.with_traceback(None)
        if len(self.first) < _SHOWN:
            hint = reason.hint()
            self.first.append(f"line {line}: {reason}{f' ({hint})' if hint else ''}")


@dataclass
class _File:
    """What is read of a file."""

    good: list[Examples] = field(default_factory=list)
    units: list[Hashable] = field(default_factory=list)  # of each good row, what tells whose it is
    written: list[Written] = field(default_factory=list)  # the same rows as they are read, where they are asked for
    bad: _BadRows = field(default_factory=_BadRows)
    cut: Cut = field(default_factory=Cut)
    remarks: Counter[str] = field(default_factory=Counter)
    columns: Found = field(default_factory=Found)


def _report(where: str, found: _File, source: DataSource, plan: RoundPlan, task: Task) -> None:
    good, bad = len(found.good), found.bad
    if not good and not bad.count:
        raise DataError(f"{where} is empty; add rows", code="no_rows")
    found.columns.check_named(source, where)
    _tell_taken(where, found, plan.max_length)
    if not bad.count:
        return
    listed = "; ".join(bad.first) + ("; …" if bad.count > _SHOWN else "")
    said = f"{where}: {bad.count} of {good + bad.count} rows cannot be used: {listed}"
    if good and bad.count <= source.max_bad_rows * (good + bad.count):
        reasons = ", ".join(f"{count} × {reason}" for reason, count in bad.reasons.most_common())
        log.warning("%s (in all: %s)", said, reasons)
        return
    local = f"{said}; its columns: {found.columns}"
    reason = bad.kinds[bad.reasons.most_common(1)[0][0]]
    if not good and reason.tells_job:
        raise DataError(f"{where}: {reason}", local, code=reason.code)
    if not good:
        found.columns.check_read(source, task.columns, where)
    raise DataError(
        f"{where} has more rows that cannot be used for this task and these labels than the site's max_bad_rows "
        "allows; the site's log lists them: mend them, say under labels in the site file what the file's own labels "
        "stand for, or raise max_bad_rows if that is as it should be",
        local,
        code="bad_rows",
    )


def _tell_taken(where: str, found: _File, max_length: int) -> None:
    """Log what is not learned of the rows that are used, and what was taken otherwise than written."""
    cut = found.cut
    if cut.rows:
        matters = cut.answers or cut.entities or cut.rows > _FEW_CUT * len(found.good)
        level = logging.WARNING if matters else logging.INFO
        log.log(level, "%s: %s; texts are cut at max_length = %d tokens", where, cut, max_length)
    for remark, count in found.remarks.most_common(_SHOWN):
        log.warning("%s: %s: %s", where, counted(count, "row", "rows"), remark)
    if len(found.remarks) > _SHOWN:
        log.warning("%s: and so for %d more labels", where, len(found.remarks) - _SHOWN)
