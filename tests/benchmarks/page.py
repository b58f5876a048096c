"""Puts what was measured into docs/reference/comparison.md: every table between its marker and `<!-- end -->`.

python tests/benchmarks/page.py
"""

import re
import statistics
from collections.abc import Callable, Collection
from dataclasses import replace
from functools import cache
from pathlib import Path

from rich.table import Table

from nvflare_fm.compare.bench import POINTS
from nvflare_fm.compare.grid import GRID
from nvflare_fm.compare.methods import ALONE, AT_HOME, COMPARED, OURS, PEERS, SLOW, TOGETHER, is_lone
from nvflare_fm.compare.results import Results, compared, curve, homes, markdown, overview, spread, verdict
from nvflare_fm.compare.study import Study, Workspace
from nvflare_fm.compare.study import study as prepared

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "comparison.md"
WORKSPACE = Workspace(Path("runs/compare"), Path(__file__).parent / "results")
BLOCK = re.compile(r"(<!-- table: (.+?) -->\n).*?(<!-- end -->)", re.DOTALL)


@cache
def study(name: str) -> Study:
    """With the test rows, and the one split for all seeds, on which the lines in `results` were measured."""
    found = replace(prepared(name, WORKSPACE), source="")
    return found if found.test_rows else replace(found, test_rows=100)


def all_cells(metric: str) -> Table:
    return overview([found for found in map(study, GRID) if found.metric == metric])


def cell(name: str) -> Table:
    """The methods that the docs compare."""
    return _only(compared(Results(study(name))), [*COMPARED, ALONE])


def parts(name: str) -> Table:
    """What else was measured: ours with a part left out, on other bases, and others who train as ours do."""
    results = Results(study(name))
    others = {method for method in results.final if not is_lone(method)} - {*COMPARED, *SLOW, AT_HOME}
    return _only(compared(results), {OURS} | others)


UNKNOWN = (
    "rank sum",
    "MB up",
    "MB down",
)  # of the lines in `results`: they charge some peers for what they need not send


def _only(table: Table, methods: Collection[str]) -> Table:
    """The rows of `methods`, without the columns that are not known."""
    columns = [column for column in table.columns if column.header not in UNKNOWN]
    found = Table(*(column.header for column in columns))
    for row in zip(*(column.cells for column in columns), strict=True):
        if row[0] in methods:
            found.add_row(*row)
    return found


def at_home(name: str) -> Table:
    return homes(Results(study(name)))


def energy(*names: str) -> Table:
    """The share of the directions above the smallest rank, after each fifth of the rounds."""
    table = Table("study", "method", *(f"{place}/{POINTS} of the rounds" for place in range(1, POINTS + 1)))
    for name in names:
        for method in (OURS, *PEERS):
            points = curve(Results(study(name)).rows, method, "above")
            if points:
                table.add_row(name, method, *(f"{100 * statistics.mean(p):.2g} %" for p in points.values()))
    return table


def means(*names: str) -> Table:
    """A mean over the sites, each at home: alone, with the others, and finished at home."""
    heads = ("alone", OURS, AT_HOME, "finished better than alone by", "")
    table = Table("study", *heads)
    for name in names:
        results = Results(study(name))
        lone, ours, finished = (
            {seed: statistics.mean(row["scores"].values()) for seed, row in results.final.get(method, {}).items()}
            for method in (ALONE, OURS, AT_HOME)
        )
        gained = [results.sign * (finished[seed] - lone[seed]) for seed in finished if seed in lone]
        columns = [spread([*by_seed.values()]) for by_seed in (lone, ours, finished)]
        table.add_row(f"{name}, {results.study.metric}", *columns, spread(gained), verdict(gained))
    return table


def slow(*names: str) -> Table:
    """What becomes of three sites in ten that need three rounds for one, and whether their work is worth having."""
    dropped, late, _ = list(SLOW)[1:]
    table = Table("study", "none is slow", *SLOW, "late better than called off by", "")
    for name in names:
        results = Results(study(name))
        columns = [spread([row["score"] for row in results.final.get(m, {}).values()]) for m in (OURS, *SLOW)]
        gained = results.paired(late, dropped)
        table.add_row(f"{name}, {results.study.metric}", *columns, spread(gained), verdict(gained))
    return table


def starts(skewed: str, alike: str) -> Table:
    """Ours by round, from a pretrained base and from a random one."""
    rounds = curve(Results(study(skewed)).rows, OURS, "score")
    table = Table("base", "sites", *map(str, rounds), "pooled", TOGETHER)
    for base, tail in (("pretrained", ""), ("random", "@random")):
        for sites, name in (("skewed", skewed), ("alike", alike)):
            results = Results(study(f"{name}{tail}"))
            pooled = ([r["score"] for r in results.final.get(m, {}).values()] for m in ("pooled", TOGETHER))
            table.add_row(base, sites, *map(spread, (*curve(results.rows, OURS, "score").values(), *pooled)))
    return table


TABLES: dict[str, Callable[..., Table]] = {
    "all cells": all_cells,
    "cell": cell,
    "parts": parts,
    "at home": at_home,
    "energy": energy,
    "means": means,
    "slow": slow,
    "starts": starts,
}


def written(page: str) -> str:
    """The page with its tables as the results have them."""
    return BLOCK.sub(lambda found: f"{found[1]}\n{_table(found[2])}\n\n{found[3]}", page)


def _table(asked: str) -> str:
    """`kind of table: studies`."""
    kind, _, names = asked.partition(": ")
    return markdown(TABLES[kind](*names.split(", ")))


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text()))
