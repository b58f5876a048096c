"""A row's label among the plan's: by name, by place where no label is a number, or as the one label that differs in
nothing but blanks, capitals, `-` and `_`. What is not taken as written is told, naming the plan's label alone.
"""

import re
import unicodedata
from difflib import get_close_matches
from functools import lru_cache
from typing import Any

from . import BadRow

_WHOLE, _FRACTION = re.compile(r"\s*(\d{1,9})\s*", re.ASCII), re.compile(r"\s*[+-]?\d+[.,]\d+\s*", re.ASCII)
_LONGEST = 100  # characters of a label that is compared with the plan's


def find(label: Any, labels: tuple[str, ...]) -> tuple[int, str]:
    """The place of a row's label among the plan's.

    Args:
        label: a text, or a whole number.
        labels: the plan's.
    Returns:
        The place, and a remark where the label is not taken as it is written; it repeats the plan's label alone.
    Raises:
        BadRow: it is none of them, or it is a list or a number with a fraction, which are for other tasks.
    """
    places, folded, numbered = _known(labels)
    if isinstance(label, str) and label in places:
        return places[label], ""
    _check_kind(label)
    text = str(label)
    if text in places:
        return places[text], ""
    whole = _WHOLE.fullmatch(text)
    if whole and not numbered:
        return _by_place(int(whole[1]), labels)
    if is_fraction(text):
        raise _regression()
    place = folded.get(_folded(text), -1)
    if place >= 0:
        return place, f"a label is taken as the plan's {labels[place]!r}, from which blanks, capitals, - or _ differ"
    raise BadRow("'label' is not among the plan's labels", code="unknown_label", hint=lambda: _nearest(text, labels))


def is_fraction(label: str) -> bool:
    """Whether a label is a number that is not whole: a value to predict, not a class."""
    return bool(_FRACTION.fullmatch(label))


def _check_kind(label: Any) -> None:
    if label is None or (isinstance(label, str) and not label.strip()) or label != label:  # NaN alone differs
        raise BadRow("'label' is missing", code="value_missing")
    if isinstance(label, list | tuple) or (isinstance(label, str) and label.startswith("[") and label.endswith("]")):
        raise several()
    if isinstance(label, float):
        raise _regression()
    if not isinstance(label, str | int):
        raise BadRow("'label' is neither a text nor a whole number", code="label_type")


def several() -> BadRow:
    """What is said of a row with a list of labels for one text or word."""
    return BadRow(
        "'label' is a list: several labels for one text are the task multi_label; give each row one label, or ask for "
        "that task",
        code="multi_label",
        tells_job=True,
    )


def _regression() -> BadRow:
    return BadRow(
        "'label' is a number with a fraction: to predict a number is the task regression; give each row one of the "
        "plan's labels, or ask for that task",
        code="regression",
        tells_job=True,
    )


def _by_place(place: int, labels: tuple[str, ...]) -> tuple[int, str]:
    if place >= len(labels):
        raise BadRow(
            "'label' is a number beyond the places of the plan's labels, which are counted from 0", code="unknown_label"
        )
    return place, f"the number {place} is taken as the place of the plan's label {labels[place]!r}"


@lru_cache(maxsize=8)
def _known(labels: tuple[str, ...]) -> tuple[dict[str, int], dict[str, int], bool]:
    """Places by name, places by folded name (-1: several labels have it), and whether any label is a number."""
    folded: dict[str, int] = {}
    for place, label in enumerate(labels):
        folded[_folded(label)] = -1 if _folded(label) in folded else place
    numbered = any(_WHOLE.fullmatch(label) for label in labels)
    return {label: place for place, label in enumerate(labels)}, folded, numbered


@lru_cache(maxsize=4096)
def _folded(text: str) -> str:
    return re.sub(r"[\s_-]+", " ", unicodedata.normalize("NFKC", text[: 4 * _LONGEST]).casefold()).strip()


def _nearest(text: str, labels: tuple[str, ...]) -> str:
    """Which of the plan's labels is spelled most like `text`, for the site's own log."""
    by_fold = {_folded(label): label for label in labels}
    alike = get_close_matches(_folded(text)[:_LONGEST], by_fold, n=1)
    return f"the nearest is {by_fold[alike[0]]!r}" if alike else ""
