"""What runs of a study say: final scores, worst sites, the way to a target, paired differences, and pictures."""

import statistics
from dataclasses import dataclass
from functools import cached_property
from itertools import cycle
from pathlib import Path
from typing import Any

from rich.table import Table

from .bench import overall
from .methods import (
    ALONE,
    AT_BYTES_OF_OURS,
    AT_HOME,
    FEWER_BYTES,
    METHODS,
    OURS,
    PEERS,
    WITH_HEAD_RATE,
    WITH_OUR_HEAD,
    is_lone,
)
from .run import read_lines
from .study import RANKS, Study

TARGET = "FedIT, rank 4"  # what this one ends with is the score to reach


def spread(values: list[float], digits: int = 3) -> str:
    """Write a mean ± standard deviation; one value alone, and – for none."""
    if len(values) < 2:
        return f"{values[0]:.{digits}f}" if values else "–"
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


@dataclass(frozen=True)
class Results:
    """All runs of a study."""

    study: Study

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """The lines that can be compared with each other: of those that the last line was measured like."""
        found = read_lines(self.study.results())
        return [row for row in found if row.get("setup") == found[-1].get("setup")]

    @cached_property
    def sizes(self) -> dict[int, dict[str, dict[str, int]]]:
        """seed → split → site → rows. Where the split is drawn, each seed has its own."""
        seeds = {row["seed"]: self.study.at_seed(row["seed"]) for row in self.rows}
        return {
            seed: {split: {site: len(at.rows(site, split)) for site in at.names} for split in ("train", "test")}
            for seed, at in seeds.items()
        }

    def scored(self, seed: int) -> dict[str, int]:
        """site → test rows that its score is measured on."""
        return {site: min(self.study.test_rows, rows) or rows for site, rows in self.sizes[seed]["test"].items()}

    @property
    def sign(self) -> int:
        return -1 if self.study.lower_is_better else 1

    @cached_property
    def final(self) -> dict[str, dict[int, dict[str, Any]]]:
        """method → seed → the last line; the best method first.

        The sites' models of a lone baseline make two: each at home, and all of them, in the mean, on all sites' rows.
        """
        found: dict[str, dict[int, dict[str, Any]]] = {}
        lone: dict[tuple[str, int], dict[str, dict[str, Any]]] = {}
        for row in self.rows:
            if is_lone(row["method"]):
                lone.setdefault((row["method"], row["seed"]), {})[row["trained_at"]] = row
            else:
                found.setdefault(row["method"], {})[row["seed"]] = row
        for (method, seed), models in lone.items():
            at_home = {site: row["scores"][site] for site, row in models.items()}
            measured = next(iter(models.values()))["scores"]
            everywhere = {site: statistics.mean(row["scores"][site] for row in models.values()) for site in measured}
            for where, scores in (("at home", at_home), ("everywhere", everywhere)):
                line = next(iter(models.values())) | {"scores": scores, "score": overall(scores, self.scored(seed))}
                found.setdefault(f"{method}, {where}", {})[seed] = line
        return dict(sorted(found.items(), key=lambda item: -self.sign * self._mean(item[1])))

    def _mean(self, by_seed: dict[int, dict[str, Any]]) -> float:
        return statistics.mean(row["score"] for row in by_seed.values())

    def worst(self, method: str) -> list[float]:
        pick = max if self.study.lower_is_better else min
        return [pick(row["scores"].values()) for row in self.final[method].values()]

    def by_rows(self, method: str) -> list[float]:
        """The score where a site counts by all its test rows, not by those that were looked at."""
        return [overall(row["scores"], self.sizes[seed]["test"]) for seed, row in self.final[method].items()]

    def to_target(self, method: str) -> list[tuple[int, int]]:
        """(round, bytes) at which each seed first reaches the target, of the seeds that do."""
        reached: dict[int, tuple[int, int]] = {}
        for row in self.rows if TARGET in self.final and method in METHODS else []:
            good = self.sign * (row["score"] - self._mean(self.final[TARGET])) >= 0
            if row["method"] == method and good:
                reached.setdefault(row["seed"], (row["round"], row["bytes_up"] + row["bytes_down"]))
        return list(reached.values())

    def paired(self, method: str, against: str) -> list[float]:
        """How much better a method is than another, seed by seed."""
        ours, theirs = self.final.get(against, {}), self.final[method]
        return [self.sign * (theirs[seed]["score"] - ours[seed]["score"]) for seed in theirs if seed in ours]


def verdict(differences: list[float]) -> str:
    """A tie unless Student's 95 % interval of the paired differences leaves out 0."""
    if len(differences) < 2:
        return "?"
    mean = statistics.mean(differences)
    if len({*differences}) == 1:
        return "tie" if mean == 0 else "better" if mean > 0 else "worse"
    from scipy.stats import ttest_1samp

    if ttest_1samp(differences, 0.0).pvalue >= 0.05:
        return "tie"
    return "better" if mean > 0 else "worse"


def overview(studies: list[Study]) -> Table:
    """A method a row, a study a column: its score, and whether it is told apart from ours. Every method that has been
    measured in one of the studies.
    """
    marks = {"tie": " (tie)", "better": " (better)", "worse": "", "?": ""}
    table = Table("method", *(f"{study.name}, {study.metric}" for study in studies))
    found = [Results(study) for study in studies]
    asked = (*WITH_OUR_HEAD, *WITH_HEAD_RATE, *AT_BYTES_OF_OURS, *FEWER_BYTES)
    besides = [method for method in asked if any(method in results.final for results in found)]
    for method in (OURS, *PEERS, ALONE, "pooled", *besides):
        cells = []
        for results in found:
            scores = [row["score"] for row in results.final.get(method, {}).values()]
            told = marks[verdict(results.paired(method, OURS))] if scores and method != OURS else ""
            cells.append(spread(scores) + told)
        table.add_row(method, *cells)
    return table


def compared(results: Results, against: str = OURS) -> Table:
    """Make the table of a study's methods, each compared with `against`."""
    table = Table(
        *("method", "rate", "rank sum", "MB up", "MB down", "seeds", results.study.metric, "worst site", "by rows"),
        *("to target: rounds", "MB", f"better than {against} by", ""),
        title=results.study.name,
    )
    for method, by_seed in results.final.items():
        reached, paired = results.to_target(method), results.paired(method, against)
        table.add_row(
            method,
            setting(next(iter(by_seed.values()))),
            *budget([*by_seed.values()]),
            str(len(by_seed)),
            spread([row["score"] for row in by_seed.values()]),
            spread(results.worst(method)),
            spread(results.by_rows(method)),
            f"{spread([float(r) for r, _ in reached], 0)}" + (f" ({len(reached)} seeds)" if reached else ""),
            spread([b / 1e6 for _, b in reached], 1),
            *(("", "") if method == against else (spread(paired), verdict(paired))),
        )
    return table


def setting(line: dict[str, Any]) -> str:
    """Write what a method was tuned to."""
    head = f", head × {line['head']:g}" if line.get("head", 1) != 1 else ""
    return f"{line['rate']:g}{head}" + (" (at the bounds)" if line.get("at_end") else "")


def budget(lines: list[dict[str, Any]]) -> tuple[str, str, str]:
    """Write the sum of the sites' ranks, and the MB that all of them send and receive in a run; – where nothing is sent
    in rounds.
    """
    ways = [[line[way] / 1e6 for line in lines if way in line] for way in ("bytes_up", "bytes_down")]
    up, down = (f"{statistics.mean(way):.1f}" if way else "–" for way in ways)
    return str(lines[0].get("rank_sum") or "–"), up, down


def homes(results: Results) -> Table:
    """Each site alone against the federation, at home and on all sites' rows, the smallest site first. Where each seed
    has its own split, sites are known by their place in that order, and their rows are a mean.
    """
    order = {
        seed: sorted(sizes["train"], key=lambda site: sizes["train"][site]) for seed, sizes in results.sizes.items()
    }
    alone = {(row["seed"], row["trained_at"]): row["score"] for row in results.rows if row["method"] == "alone"}
    heads = (ALONE, f"{OURS}, at home", AT_HOME, "alone, everywhere")
    table = Table("site", "training rows", *heads, title=results.study.name)
    for place in range(max(map(len, order.values()), default=0)):
        sites = {seed: names[place] for seed, names in order.items() if place < len(names)}
        rows = statistics.mean(results.sizes[seed]["train"][site] for seed, site in sites.items())
        scores = [
            [row["scores"][sites[seed]] for seed, row in results.final.get(method, {}).items() if seed in sites]
            for method in (ALONE, OURS, AT_HOME)
        ]
        table.add_row(
            *({*sites.values()} if len({*sites.values()}) == 1 else [f"smallest {place + 1}"]),
            f"{rows:.0f}",
            *map(spread, scores),
            spread([alone[at] for at in sites.items() if at in alone]),
        )
    return table


def markdown(table: Table) -> str:
    """Write a table in Markdown."""
    heads, cells = [str(c.header) for c in table.columns], zip(*(c.cells for c in table.columns), strict=True)
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in (heads, ["---"] * len(heads), *cells))


def curve(rows: list[dict[str, Any]], method: str, what: str) -> dict[int, list[float]]:
    """round → a value a seed."""
    found: dict[int, list[float]] = {}
    for row in rows:
        if row["method"] == method and row.get(what) is not None:
            found.setdefault(row["round"], []).append(row[what])
    return found


def picture(study: Study) -> Path:
    """Score and energy of the high directions by round; our default in front."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(12, 4), layout="constrained")
    results = Results(study)
    drawn = [m for m in results.final if m in (OURS, *PEERS)]
    shades = plt.get_cmap("tab20").colors  # a strong and a pale one in turn
    colors = cycle(shades[::2] + shades[1::2])
    for method, color in zip(drawn, colors, strict=False):
        for axis, what in zip(axes, ("score", "above"), strict=True):
            points = curve(results.rows, method, what)
            style = {"lw": 2.5, "color": "black", "zorder": 3} if method == OURS else {"lw": 1, "color": color}
            axis.plot(list(points), [statistics.mean(p) for p in points.values()], label=method, marker=".", **style)
    axes[0].set(xlabel="round", ylabel=f"{study.metric}, all sites' test rows", title=study.name)
    axes[1].set(xlabel="round", ylabel=f"energy above rank {min(RANKS)}", title="do high directions live?")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    file = study.workspace.root / f"{study.name}.png"
    figure.savefig(file, dpi=90)
    plt.close(figure)
    return file
