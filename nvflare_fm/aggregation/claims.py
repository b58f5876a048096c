"""What a site says of itself and is weighed by, held against what the other sites say."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import partial
from statistics import median

from ..adapter import AdapterUpdate, Report

FAR = 10.0  # times the median of the others; the most skewed public data we have (MedQuAD) reaches 6.6
FAR_LOSS = 3.0  # the same of a loss, and of the length of what a site holds: no site's own rows decide those so widely


def held(updates: Sequence[AdapterUpdate], used: Collection[str]) -> tuple[list[AdapterUpdate], dict[str, str]]:
    """The updates with no number far from the others': nobody can check it, so it must not decide alone.

    Args:
        used: what this round weighs by, of "examples", "loss" (of the adapter received), "skew" (of the labels) and
            "steps".

    Returns:
        The updates, in which a count is no more than ten times the median of the other sites', a loss no more than
        three times, steps no less than a tenth of it either, and a skew no less than the least that another site says;
        and what was changed so, by site.
    """
    updates, notes = list(updates), dict[str, list[str]]()
    for name in sorted(used):
        said = [_READ[name](u.report) for u in updates]
        counted = _COUNTED[name](said)
        for place, (one, other) in enumerate(zip(said, counted, strict=True)):
            if one != other:
                updates[place] = replace(updates[place], report=_with(updates[place].report, name, other))
                notes.setdefault(updates[place].site, []).append(f"{name} {one:g} counts as {other:g}")
    return updates, {site: f"{', '.join(found)}: too far from the others'" for site, found in notes.items()}


def at_most(values: Sequence[float], far: float = FAR) -> list[float]:
    """Each value, but no more than `far` times the median of the others, where that is above 0."""
    usual = [_usual(values, place) for place in range(len(values))]
    return [min(v, far * u) if u > 0 else v for v, u in zip(values, usual, strict=True)]


def shared(values: Sequence[float]) -> list[float]:
    """Each value, but no less than the least of the others: nobody is the only one whose value is that low."""
    lowest = sorted(values)[:2][-1] if values else 0.0
    return [max(value, lowest) for value in values]


def within(values: Sequence[float]) -> list[float]:
    """Each value, between a tenth of the median of the others and ten times it."""
    values = at_most(values)
    return [max(v, _usual(values, place) / FAR) for place, v in enumerate(values)]


def _usual(values: Sequence[float], place: int) -> float:
    others = [*values[:place], *values[place + 1 :]]
    return median(others) if others else 0.0


_READ: dict[str, Callable[[Report], float]] = {
    "examples": lambda report: float(report.examples or 0),
    "loss": lambda report: report.before.get("loss", 0.0),
    "skew": lambda report: report.label_skew or 0.0,
    "steps": lambda report: float(report.steps or 0),
}
_COUNTED: dict[str, Callable[[Sequence[float]], list[float]]] = {
    "examples": at_most,
    "loss": partial(at_most, far=FAR_LOSS),
    "skew": shared,
    "steps": within,
}


def _with(report: Report, name: str, value: float) -> Report:
    if name == "loss":
        return replace(report, before={**report.before, "loss": value})
    if name == "skew":
        return replace(report, label_skew=value)
    whole = max(1, round(value))
    return replace(report, examples=whole) if name == "examples" else replace(report, steps=whole)
