"""Names of columns: those a task reads, those a file has, and which of the one a file's own may stand for."""

import json
import re
from collections.abc import Collection, Mapping
from typing import Any

from ..errors import DataError
from ..registry import nearest

_MOST = 200  # names that are kept: rows of JSON may each have others
NER_TAGS = "ner_tags"  # what Hugging Face data sets call the labels of words
READ: dict[str, tuple[tuple[str, ...], ...]] = {  # by task: columns of which one group is enough
    "causal_lm": (
        ("messages",),
        ("prompt", "completion"),
        ("text",),
        ("conversations",),
        ("instruction", "output"),
    ),
    "sequence_classification": (("text", "label"),),
    "token_classification": (("tokens", "labels"),),
}
_OFTEN = {  # by column: what others call it
    "text": "sentence utterance content body note question query document input review message dialogue description",
    "label": "category class intent target topic sentiment tag code department diagnosis final_decision section_header",
    "tokens": "words token form sentence",
    "labels": "ner_tags tags ner label ner_tag upos",
    "prompt": "question instruction input dialogue source query context user article",
    "completion": "answer response output target summary note section_text assistant highlights long_answer",
}


def mapped(row: Mapping[str, Any], columns: Mapping[str, str]) -> Mapping[str, Any]:
    """A row under the names that tasks read.

    Args:
        columns: the name that tasks read → the name in the file.
    """
    labels = {"labels": row[NER_TAGS]} if NER_TAGS in row and "labels" not in row else {}
    return {**labels, **row, **{ours: row.get(theirs) for ours, theirs in columns.items()}}


class Found:
    """The names of a file's columns, as its rows tell them one by one."""

    def __init__(self) -> None:
        self.names: dict[str, None] = {}

    def add(self, row: Mapping[str, Any]) -> None:
        if len(self.names) < _MOST and not row.keys() <= self.names.keys():
            self.names |= dict.fromkeys(list(row)[:_MOST])

    def check(self, columns: Mapping[str, str], task: str, where: str, is_used: bool) -> None:
        """
        Args:
            columns: as in `mapped`.
            task: what the rows were read for.
            where: the data, in words that may leave the site.
            is_used: some row could be used, so the task's columns are there.
        Raises:
            DataError: a column is in no row. Its `local` part names it, the nearest and all those found.
        """
        if not self.names or len(self.names) >= _MOST:
            return
        found = list(self.names)
        if absent := [theirs for theirs in columns.values() if theirs not in self.names]:
            told = "; ".join(f"no column {name!r}, {nearest(name, found)}" for name in absent)
            raise DataError(
                f"{where}: no row has a column that the site file names under columns; the site's log has those found",
                f"{where}: {told}found: {found}",
                code="column_missing",
            )
        if is_used or readable(task, mapped(self.names, columns)):
            return
        wanted = " or ".join(" and ".join(map(repr, group)) for group in READ[task])
        remedy = f"; perhaps: columns: {written(proposal)}" if (proposal := proposed(task, found)) else ""
        raise DataError(
            f"{where} has not the columns that the task reads, {wanted}; the site file names others under columns",
            f"{where}: found: {found}{remedy}",
            code="column_missing",
        )


def readable(task: str, names: Collection[str]) -> bool:
    """Whether columns of these names are enough for a task."""
    return task not in READ or any(set(group) <= set(names) for group in READ[task])


def proposed(task: str, names: Collection[str]) -> dict[str, str]:
    """What `columns` could say for a file whose columns have these names: nothing where it need not, or none fits."""
    for group in () if readable(task, names) else READ[task]:
        found = {ours: called(ours, names) for ours in group}
        if all(found.values()):
            return {ours: theirs for ours, theirs in found.items() if theirs and ours != theirs}
    return {}


def called(ours: str, names: Collection[str]) -> str:
    """The name under which a file may have the column that a task calls `ours`; empty where none fits."""
    folded = {re.sub(r"\W+", "_", name.strip().lower()): name for name in reversed(list(names))}
    return next((folded[name] for name in (ours, *_OFTEN.get(ours, "").split()) if name in folded), "")


def written(columns: Mapping[str, str]) -> str:
    """As YAML has it, on one line."""
    return json.dumps(dict(columns), ensure_ascii=False)
