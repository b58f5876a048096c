"""The curves: federated macro-F1 round by round on each site's test notes, against training alone and pooled."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from .baselines import Scores

_FEDERATED, _ALONE, _POOLED, _INK = "#0072B2", "#D55E00", "#555555", "#222222"  # after Okabe and Ito; also in grey


def draw(
    file: Path, curves: Mapping[str, Sequence[float]], alone: Mapping[str, float], pooled: Scores, title: str
) -> Path:
    """Draw the curves of a trial into a picture.

    Args:
        curves: panel → federated macro-F1 before the first round and after each; the panels stand in this order.
        alone, pooled: panel → the reference line.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = min(len(curves), 5)
    rows = -(-len(curves) // columns)
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(2.6 * columns + 0.5, 2.75 * rows + 0.6),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    panels = list(axes.flat)
    for axis, (name, curve) in zip(panels, curves.items(), strict=False):
        _panel(axis, name, curve, alone[name], pooled[name])
    for axis in panels[len(curves) :]:
        axis.set_visible(False)
    for row in axes:
        row[0].set_ylabel("macro-F1", color=_INK)
    figure.supxlabel("rounds of the federation", fontsize=10, color=_INK)
    figure.suptitle(title, fontsize=11, color=_INK, x=0.01, ha="left")
    figure.savefig(file, dpi=160)
    plt.close(figure)
    return file


def _panel(axis: Any, name: str, curve: Sequence[float], alone: float, pooled: float) -> None:
    last = len(curve) - 1
    axis.axhline(pooled, color=_POOLED, linewidth=1.2, linestyle=(0, (5, 3)))
    axis.axhline(alone, color=_ALONE, linewidth=1.2, linestyle=(0, (1, 1.5)))
    axis.plot(range(len(curve)), curve, color=_FEDERATED, linewidth=2, marker="o", markersize=3.5, clip_on=False)
    marks = {"pooled": (pooled, _POOLED), "federated": (curve[-1], _FEDERATED), "alone": (alone, _ALONE)}
    for (label, (value, colour)), height in zip(marks.items(), _apart([v for v, _ in marks.values()]), strict=True):
        axis.annotate(
            f"{label} {value:.2f}", (last, height), xytext=(6, 0), textcoords="offset points", color=colour, fontsize=8,
            va="center", annotation_clip=False,
        )  # fmt: skip
    axis.set_title(name, fontsize=10, loc="left", color=_INK)
    axis.set(xlim=(0, last), ylim=(0, 1), xticks=range(0, last + 1, max(1, last // 4)), yticks=(0, 0.5, 1))
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8, colors=_INK)


def _apart(values: Sequence[float], gap: float = 0.075) -> list[float]:
    """Heights near `values` at which labels do not overlap, none above 1."""
    heights = list(values)
    order = sorted(range(len(values)), key=lambda i: values[i])
    for below, above in pairwise(order):
        heights[above] = max(heights[above], heights[below] + gap)
    over = max(0.0, heights[order[-1]] - 1)
    return [height - over if over else height for height in heights]
