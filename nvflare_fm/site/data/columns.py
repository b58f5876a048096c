"""Names of columns: those a task reads, those a file has, and which of the one a file's own may stand for."""

import json
import re
from collections.abc import Collection, Mapping
from functools import cache
from itertools import islice
from typing import Any

from ...errors import DataError
from ...registry import nearest
from ..offer.site_config import DataSource
from ..tasks import Groups
from ..tasks import registry as tasks

_MOST = 200  # names that are kept: rows of JSON may each have others
NER_TAGS = "ner_tags"  # what Hugging Face data sets call the labels of words
_OFTEN = {  # by column: what others call it
    "text": "sentence utterance content body note question query document input review message dialogue description",
    "label": "category class intent target topic sentiment tag code department diagnosis final_decision section_header",
    "tokens": "words token form sentence",
    "labels": "ner_tags tags ner label ner_tag upos codes categories topics",
    "chosen": "preferred accepted better",
    "rejected": "dispreferred worse",
    "instruction": "question prompt input dialogue source query user article",
    "output": "answer response completion target summary note section_text assistant highlights long_answer",
}


@cache
def _usual() -> frozenset[str]:
    """Names that columns usually have, so that a log may hold them."""
    read = {name for task in tasks for group in tasks[task].columns for name in group}
    return frozenset({*read, *" ".join(_OFTEN.values()).split()})


def names(found: Collection[str], columns: Mapping[str, str]) -> dict[str, str]:
    """The name that tasks read → the name in the file.

    Args:
        found: the names in the file.
        columns: what the site file says under that name.
    """
    tags = {"labels": NER_TAGS} if NER_TAGS in found else {}
    return {**tags, **{name: name for name in found}, **columns}


def mapped(row: Mapping[str, Any], source: DataSource) -> Mapping[str, Any]:
    """A row under the names of columns and labels that tasks and plans have."""
    named = {ours: row.get(theirs) for ours, theirs in names(row, source.columns).items()}
    if source.labels:
        named["label"] = _label(named.get("label"), source.labels)
        if isinstance(labels := named.get("labels"), list):
            named["labels"] = [_label(label, source.labels) for label in labels]
    return named


def _label(label: Any, ours: Mapping[str, str]) -> Any:
    return ours.get(str(label), label) if isinstance(label, str | int) else label


class Found:
    """The names of a file's columns, as its rows tell them one by one."""

    def __init__(self) -> None:
        self.names: dict[str, None] = {}

    def add(self, row: Mapping[str, Any]) -> None:
        if len(self.names) < _MOST and not row.keys() <= self.names.keys():
            self.names |= dict.fromkeys(islice(row, _MOST))

    def __str__(self) -> str:
        """The names that are usual. A file without a header has a row in its place, which no log may hold."""
        usual = [name for name in self.names if _folded(name) in _usual()]
        others = len(self.names) - len(usual)
        more = [f"{others} more, which nvflare-fm data check shows"] if others else []
        return ", ".join([*map(repr, usual), *more])

    def check_named(self, source: DataSource, where: str) -> None:
        """Hold the columns that the site file names against those found.

        Args:
            where: the data, in words that may leave the site.
        Raises:
            DataError: a column that `source` names is in no row. Its `local` part has the nearest and usual ones.
        """
        absent = [theirs for theirs in source.columns.values() if theirs not in self.names]
        if absent and 0 < len(self.names) < _MOST:
            told = "; ".join(f"no column {name!r}, {nearest(name, list(self.names))}" for name in absent)
            raise DataError(
                f"{where}: no row has a column that the site file names under columns; the site's log has the nearest",
                f"{where}: {told}found: {self}",
                code="column_missing",
            )

    def check_read(self, source: DataSource, groups: Groups, where: str) -> None:
        """Hold the columns that a task reads against those found.

        Raises:
            DataError: the file lacks columns that the task reads. Its `local` part proposes which to take for them.
        """
        if not 0 < len(self.names) < _MOST or readable(groups, names(self.names, source.columns)):
            return
        proposal = json.dumps(proposed(groups, self.names), ensure_ascii=False)
        raise DataError(
            f"{where} lacks the columns that the task reads, {wanted(groups)}; the site file names others under "
            "columns",
            f"{where}: found: {self}; perhaps: columns: {proposal}",
            code="column_missing",
        )


def readable(groups: Groups, known: Collection[str]) -> bool:
    """Whether columns of these names are enough for a task."""
    return any(set(group) <= set(known) for group in groups)


def wanted(groups: Groups) -> str:
    """The columns that a task reads, in words."""
    return " or ".join(" and ".join(map(repr, group)) for group in groups)


def proposed(groups: Groups, found: Collection[str]) -> dict[str, str]:
    """What `columns` could say for a file whose columns have these names: nothing where it need not, or none fits."""
    for group in () if readable(groups, found) else groups:
        meant = {ours: called(ours, found) for ours in group}
        if all(meant.values()):
            return {ours: theirs for ours, theirs in meant.items() if ours != theirs}
    return {}


def called(ours: str, found: Collection[str]) -> str:
    """The name under which a file may have the column that a task calls `ours`; empty where none fits."""
    folded = {_folded(name): name for name in reversed(list(found))}
    return next((folded[name] for name in (ours, *_OFTEN.get(ours, "").split()) if name in folded), "")


def _folded(name: str) -> str:
    return re.sub(r"\W+", "_", name.strip().lower())
