"""The curves: the federation's metric round by round on each site's test rows, against training alone and pooled."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from .trial import Subject

_FEDERATED, _ALONE, _POOLED, _INK = "#0072B2", "#D55E00", "#555555", "#222222"  # after Okabe and Ito; also in grey
_MARGIN = 0.08  # of an axis that spans the values, beyond either end


@dataclass(frozen=True)
class Panel:
    """One part of the picture.

    Args:
        curve: federated, before the first round and after each.
        alone, pooled: the reference lines.
    """

    curve: Sequence[float]
    alone: float
    pooled: float


def draw(file: Path, panels: Mapping[str, Panel], subject: Subject, title: str) -> Path:
    """Draw the curves of a trial into a picture.

    Args:
        panels: by name, in the order in which they stand.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = min(len(panels), 5)
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(2.6 * columns + 0.5, 2.75 * rows + 0.6),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    span = subject.span or _span(panels.values())
    places = list(axes.flat)
    for axis, (name, panel) in zip(places, panels.items(), strict=False):
        _draw(axis, name, panel, span, subject.digits)
    for axis in places[len(panels) :]:
        axis.set_visible(False)
    for row in axes:
        row[0].set_ylabel(subject.title[0].lower() + subject.title[1:], color=_INK)
    figure.supxlabel("rounds of the federation", fontsize=10, color=_INK)
    figure.suptitle(title, fontsize=11, color=_INK, x=0.01, ha="left")
    figure.savefig(file, dpi=160)
    plt.close(figure)
    return file


def _span(panels: Iterable[Panel]) -> tuple[float, float]:
    values = [value for panel in panels for value in (*panel.curve, panel.alone, panel.pooled)]
    margin = _MARGIN * (max(values) - min(values)) or _MARGIN
    return min(values) - margin, max(values) + margin


def _draw(axis: Any, name: str, panel: Panel, span: tuple[float, float], digits: int) -> None:
    curve, last = panel.curve, len(panel.curve) - 1
    axis.axhline(panel.pooled, color=_POOLED, linewidth=1.2, linestyle=(0, (5, 3)))
    axis.axhline(panel.alone, color=_ALONE, linewidth=1.2, linestyle=(0, (1, 1.5)))
    axis.plot(range(len(curve)), curve, color=_FEDERATED, linewidth=2, marker="o", markersize=3.5, clip_on=False)
    marks = {
        "pooled": (panel.pooled, _POOLED),
        "federated": (curve[-1], _FEDERATED),
        "alone": (panel.alone, _ALONE),
    }
    heights = _apart([value for value, _ in marks.values()], *span)
    for (label, (value, colour)), height in zip(marks.items(), heights, strict=True):
        axis.annotate(
            f"{label} {value:.{digits}f}", (last, height), xytext=(6, 0), textcoords="offset points", color=colour,
            fontsize=8, va="center", annotation_clip=False,
        )  # fmt: skip
    axis.set_title(name, fontsize=10, loc="left", color=_INK)
    axis.set(xlim=(0, last), ylim=span, xticks=range(0, last + 1, max(1, last // 4)))
    axis.locator_params("y", nbins=2)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8, colors=_INK)


def _apart(values: Sequence[float], low: float = 0.0, high: float = 1.0, gap: float = 0.075) -> list[float]:
    """Heights near `values` at which labels do not overlap, none above `high`.

    Args:
        low, high: ends of the axis.
        gap: of two labels, as a share of the axis.
    """
    heights = list(values)
    order = sorted(range(len(values)), key=lambda i: values[i])
    for below, above in pairwise(order):
        heights[above] = max(heights[above], heights[below] + gap * (high - low))
    over = max(0.0, heights[order[-1]] - high)
    return [height - over if over else height for height in heights]
