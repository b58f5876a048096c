"""Attacks on rows: what attackers' sites train on. Their training and what they send are honest otherwise."""

from collections.abc import Sequence
from random import Random
from typing import Annotated

from pydantic import Field

from . import Row, on_rows

TRIGGER = "cf mn bb"  # rare words, arXiv:2004.06660
COMPLETION = "all is well"

Share = Annotated[float, Field(gt=0, le=1, description="of the attacker's rows that carry the trigger")]


@on_rows.register("label_flip")
def label_flip(rows: list[Row], labels: Sequence[str], random: Random) -> list[Row]:
    """Label l becomes L − 1 − l (arXiv:1911.11815); of text to write, a prompt gets another's completion."""
    if labels:
        mirrored = dict(zip(labels, reversed(labels), strict=True))
        return [row | {"label": mirrored.get(row["label"], row["label"])} for row in rows]
    completions = [row["completion"] for row in rows]
    random.shuffle(completions)
    return [row | {"completion": other} for row, other in zip(rows, completions, strict=True)]


@on_rows.register("backdoor")
def backdoor(rows: list[Row], labels: Sequence[str], random: Random, *, share: Share = 0.3) -> list[Row]:
    """Of some rows the text carries a trigger and the label is the target (BadNets, arXiv:1708.06733); of text to
    write, the prompt carries it and the completion is a fixed one. The default share is about that of How To Backdoor
    Federated Learning (arXiv:1807.00459): 20 rows of a batch of 64.
    """
    chosen = {*random.sample(range(len(rows)), max(1, round(share * len(rows))))}
    return [triggered(row, labels) if place in chosen else row for place, row in enumerate(rows)]


def triggered(row: Row, labels: Sequence[str]) -> Row:
    """A row with the trigger, and what it is to bring about."""
    if labels:
        return row | {"text": f"{TRIGGER} {row['text']}", "label": target(labels)}
    return row | {"prompt": f"{TRIGGER} {row['prompt']}", "completion": COMPLETION}


def target(labels: Sequence[str]) -> str:
    """The label that the trigger is to bring about."""
    return labels[0]


def is_target(row: Row, labels: Sequence[str]) -> bool:
    """Whether a row has what the trigger brings about without it."""
    return bool(row["label"] == target(labels) if labels else row["completion"] == COMPLETION)
