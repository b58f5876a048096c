"""What a file of rows is and what a task makes of it, found without a kit, a job or a model's weights.

For the user's own machine: it counts labels and shows letters of the texts.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ...config import LABELS, LENGTH, RoundPlan
from ..offer.site_config import AUTO, DataSource
from ..tasks import BadRow, Cut
from ..tasks import registry as tasks
from ..tasks.labels import is_fraction
from .columns import Found, called, mapped, names, proposed, readable
from .rows import Reading, ending_of, how_to_read, registry, rows

_KEPT = 200  # columns, and bad rows, that are told one by one
_VALUE = 200  # characters of a value that may be a label
_LETTERS = 40
_LISTS = ("tokens", "labels")  # columns that hold a list


@dataclass
class Column:
    """What a file's column holds."""

    kinds: Counter[str] = field(default_factory=Counter)
    values: Counter[str] = field(default_factory=Counter)  # short texts and numbers, alone or in a list
    characters: int = 0
    is_varied: bool = False  # there are more different values than labels can be; they are not counted then
    is_long: bool = False  # some values are too long for labels, and not counted
    longest: int = 0  # of its lists

    @property
    def is_listed(self) -> bool:
        """Whether most of its values are lists."""
        return self.kinds.most_common(1)[0][0] == "list"

    def add(self, value: Any) -> None:
        self.kinds[_kind(value)] += 1
        self.longest = max(self.longest, len(value) if isinstance(value, list) else 0)
        for each in value if isinstance(value, list) else [value]:
            text = str(each) if isinstance(each, str | int | float) else ""
            self.characters += len(text)
            if len(text) > _VALUE or not _is_text(text):
                self.is_long = True
            elif text and not self.is_varied:
                self.values[text] += 1
        if len(self.values) > LABELS:
            self.is_varied = True
            self.values.clear()


@dataclass
class Inspection:
    """What is found in a file.

    Args:
        columns: the name that tasks read → the file's.
        is_proposed: `columns` is a guess, as the file does not have the names that the task reads.
        labels: those of the task, with how often each occurs.
        lengths: how many rows are so long, in `unit`.
        cut: what is not learned because texts are longer than `max_length`; none without a tokenizer.
        bad: the first rows that cannot be used, by line, and why.
        remarks: what was taken otherwise than written, with how many rows it was.
    """

    reading: Reading
    task: str
    columns: dict[str, str]
    is_proposed: bool = False
    found: dict[str, Column] = field(default_factory=dict)
    letters: str = ""
    labels: Counter[str] = field(default_factory=Counter)
    unit: str = "characters"
    lengths: Counter[int] = field(default_factory=Counter)
    cut: Cut = field(default_factory=Cut)
    bad: list[tuple[int, str]] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)
    remarks: Counter[str] = field(default_factory=Counter)

    @property
    def read_as(self) -> dict[str, str]:
        """The file's name of a column → what the task reads it as; columns that it does not read are not there."""
        read = {name for group in tasks[self.task].columns for name in group}
        return {theirs: ours for ours, theirs in names(self.found, self.columns).items() if ours in read}

    @property
    def is_readable(self) -> bool:
        """Whether the task has the columns it reads."""
        return readable(tasks[self.task].columns, self.read_as.values())

    @property
    def good(self) -> int:
        return self.lengths.total()


def inspect(
    source: DataSource,
    task: str,
    labels: tuple[str, ...] = (),
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_length: int = 512,
) -> Inspection:
    """Read a file as a site would for a job.

    Args:
        source: the file, and what is known of it.
        labels: of the plan; none: those that the file has.
        tokenizer: of the base model; None: lengths are in characters, and no text is cut.
    Raises:
        FmError: the file cannot be read, or the task is none.
    """
    groups = tasks[task].columns
    reading = how_to_read(Path(source.train), source, "train")
    inspection = Inspection(reading, task, dict(source.columns))
    found = Found()
    letters: dict[str, None] = {}
    for _, row in rows(reading):
        if isinstance(row, BadRow):
            continue
        found.add(row)
        for name, value in row.items():
            if name in inspection.found or len(inspection.found) < _KEPT:
                inspection.found.setdefault(name, Column()).add(value)
        if len(letters) < _LETTERS:
            texts = (text for value in row.values() for text in _texts(value) if not text.isascii())
            letters |= dict.fromkeys(letter for text in texts for letter in text if letter > "\x7f")
    inspection.letters = "".join(sorted(letters)[:_LETTERS])
    found.check_named(source, reading.file.name)
    if not readable(groups, names(found.names, source.columns)):
        inspection.columns |= {**_by_content(task, inspection.found), **proposed(groups, inspection.found)}
        inspection.is_proposed = inspection.columns != dict(source.columns)
    source = source.model_copy(update={"columns": inspection.columns})
    if tasks[task].promises.classes and (column := _labels(inspection)):
        inspection.labels = column.values
    _try(inspection, source, labels, tokenizer, max_length)
    return inspection


def _labels(inspection: Inspection) -> Column | None:
    """The column of labels that the file has, or is to have, of those that the task reads."""
    known = names(inspection.found, inspection.columns)
    ours = [name for group in tasks[inspection.task].columns for name in group if name.startswith("label")]
    return next((inspection.found[known[name]] for name in ours if known.get(name) in inspection.found), None)


def _try(
    inspection: Inspection,
    source: DataSource,
    labels: tuple[str, ...],
    tokenizer: PreTrainedTokenizerBase | None,
    max_length: int,
) -> None:
    """Encode every row as a job would."""
    task = tasks[inspection.task]
    column, values = _labels(inspection), [each for each in sorted(inspection.labels) if not is_fraction(each)]
    asked = {
        "task": inspection.task,
        "labels": labels or task.guessed_labels(values[:LABELS], column.longest if column else 0),
    }
    plan = RoundPlan.read(asked | {"max_length": max_length if tokenizer else LENGTH}, "nvflare-fm data check")
    endless = plan.model_copy(update={"max_length": LENGTH})
    inspection.unit = "tokens" if tokenizer else "characters"
    words = tokenizer or word_tokenizer()
    for line, row in rows(inspection.reading):
        try:
            if isinstance(row, BadRow):
                raise row
            ours = mapped(row, source)
            encoded = task.encode(ours, words, plan)
            inspection.cut += encoded.cut
            inspection.remarks.update(encoded.remarks)
            whole = task.encode(ours, words, endless) if encoded.cut.tokens else encoded
            length = max(len(example["input_ids"]) for example in whole.examples)
            inspection.lengths[length if tokenizer else _characters(ours, inspection.task)] += 1
        except BadRow as reason:
            _add_bad(inspection, line, str(reason), reason.hint())
        except (MemoryError, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # as in a job: what a tokenizer raises costs the row
            _add_bad(inspection, line, f"the row cannot be tokenized ({type(error).__name__})")


def _add_bad(inspection: Inspection, line: int, reason: str, hint: str = "") -> None:
    inspection.reasons[reason] += 1
    if len(inspection.bad) < _KEPT:
        inspection.bad.append((line, f"{reason} ({hint})" if hint else reason))


def _by_content(task: str, found: Mapping[str, Column]) -> dict[str, str]:
    """Which columns a file's may stand for, as far as what they hold tells it: labels recur, texts are long."""
    classes = tasks[task].promises.classes
    for group in tasks[task].columns:
        if len(group) != 2 or not group[1].startswith("label"):
            continue
        fits = {
            ours: [name for name, column in found.items() if column.is_listed == (ours in _LISTS)] for ours in group
        }
        recur = [name for name in fits[group[1]] if 2 <= len(found[name].values) <= found[name].values.total() / 2]
        guessed = min(recur, key=lambda name: len(found[name].values), default="") if classes else ""
        label = called(group[1], fits[group[1]]) or guessed
        texts = {name: found[name].characters for name in fits[group[0]] if name != label}
        text = called(group[0], list(texts)) or max(texts, key=lambda name: texts[name], default="")
        if label and text:
            return {ours: theirs for ours, theirs in zip(group, (text, label), strict=True) if ours != theirs}
    return {}


def block(inspection: Inspection, source: DataSource) -> str:
    """What the site file says of this file, as YAML: what was guessed is written down, so that it stays."""
    reading = inspection.reading
    ambiguous = sum(ending_of(reading.file) in registry[name].endings for name in registry) > 1
    said: dict[str, Any] = {"train": str(reading.file.absolute())}
    if source.format != AUTO or ambiguous:
        said["format"] = reading.format
    if reading.encoding not in ("", "utf-8"):
        said["encoding"] = reading.encoding
    if reading.delimiter not in ("", ","):
        said["delimiter"] = reading.delimiter
    if inspection.columns:
        said["columns"] = inspection.columns
    return yaml.safe_dump({"data": {"notes": said}}, sort_keys=False, allow_unicode=True, width=10_000)


def word_tokenizer() -> PreTrainedTokenizerBase:
    """A stand-in that any base model's tokenizer could take the place of: a token for each word."""
    tokenizer = Tokenizer(models.WordLevel({"word": 0}, unk_token="word"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="word")
    fast.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.reasoning_content }} {{ m.content }} {{ m.tool_calls | string }} . "
        "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    return fast


def _kind(value: Any) -> str:
    kinds = {str: "text", bool: "yes or no", int: "number", float: "number", list: "list", dict: "group"}
    return "nothing" if value in (None, "") else kinds.get(type(value), type(value).__name__)


def _is_text(value: str) -> bool:
    """Whether it is whole: half an emoji is none."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _characters(row: Mapping[str, Any], task: str) -> int:
    read = next((group for group in tasks[task].columns if set(group) <= set(row)), tuple(row))
    names = [name for name in read if not name.startswith("label")]
    return sum(len(text) for name in names for text in _texts(row.get(name)))


def _texts(value: Any) -> Iterator[str]:
    """The texts in a value, wherever in it they are; a row is never deeply nested for long."""
    level = [value]
    while level:
        yield from (each for each in level if isinstance(each, str))
        level = [
            part
            for each in level
            for part in (each.values() if isinstance(each, Mapping) else each if isinstance(each, list) else ())
        ]
