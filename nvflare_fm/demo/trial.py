"""What a demo runs: its sites, the plan they carry out, how it is scored, and where everything is written."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import RoundPlan
from ..errors import DataError
from ..job.tasks import Better, promises
from ..site.offer.site_config import DataSource, Limits, ModelSource, Privacy, SiteConfig

JOB = "demo"
SYNTHETIC, YOURS = "SYNTHETIC notes", "your files"


@dataclass(frozen=True)
class Subject:
    """What a demo is about: the rows that it reads, the metric that scores it, and what people call both.

    Args:
        rows: the rows' name.
        columns: what each of them must have, as texts that are not empty.
        metric: as the sites report it.
        title: the metric's name.
        digits: of the metric, behind the point.
        span: ends of its axis in pictures; None: those of the values.
    """

    rows: str
    columns: tuple[str, str]
    metric: str
    title: str
    digits: int
    span: tuple[float, float] | None = None


@dataclass(frozen=True)
class Site:
    """One folder with files `train` and `test` of any format, such as train.csv.

    Args:
        rank: of the adapter that the site trains.
        columns: what each row must have.
    """

    name: str
    folder: Path
    rank: int
    columns: tuple[str, str]

    def rows(self, split: str) -> list[Mapping[str, str]]:
        """Every row, read as a site reads it in a job.

        Raises:
            DataError: names the site, the file and the line.
        """
        from ..site.data.rows import how_to_read, rows  # with it come transformers, which take seconds to load

        file = file_of(self.folder, split)
        where = f"site {self.name!r}, {file.name}"
        try:
            found = list(rows(how_to_read(file, DataSource(train=str(file)), split)))
        except DataError as error:
            raise DataError(f"{where}: {error.text}", error.local, code=error.code) from None
        if not found:
            raise DataError(f"{where} is empty; add rows", str(file), code="no_rows")
        return [self._checked(row, f"{where}, line {line}") for line, row in found]

    def _checked(self, row: Mapping[str, Any] | Exception, where: str) -> Mapping[str, str]:
        if isinstance(row, Exception):
            raise DataError(f"{where}: {row}", code="bad_rows")
        if not all(isinstance(row.get(name), str) and row[name].strip() for name in self.columns):
            names = " and ".join(map(repr, self.columns))
            raise DataError(f"{where} must have {names}, two texts that are not empty", code="bad_rows")
        return row


def file_of(folder: Path, split: str) -> Path:
    """The one file in `folder` that is called `split`, whatever its ending.

    Raises:
        DataError: there is none, or several.
    """
    found = sorted(file for file in folder.iterdir() if file.name.partition(".")[0] == split)
    if len(found) != 1:
        there = f"there are {len(found)}: {', '.join(file.name for file in found)}" if found else "there is none"
        raise DataError(
            f"site {folder.name!r} needs one file called {split}, such as {split}.jsonl or {split}.csv; {there}",
            str(folder),
            code="no_data",
        )
    return found[0]


def read_sites(folder: Path, columns: tuple[str, str], ranks: Sequence[int]) -> tuple[Site, ...]:
    """Every sub-folder that does not start with a dot is a site.

    Args:
        columns: what each of their rows must have.
        ranks: of the sites in the order of their names; if there are more sites, from the first rank again.

    Raises:
        DataError: there are fewer than two, or a name NVFlare cannot use.
    """
    if not folder.is_dir():
        raise DataError("--data must name a folder with one folder per site", str(folder), code="no_sites")
    folders = sorted(f for f in folder.iterdir() if f.is_dir() and not f.name.startswith("."))
    for name in (f.name for f in folders):
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name) or name == "server":
            raise DataError(
                f"site {name!r} needs a name of letters, digits, - and _ that is not 'server'; rename it",
                code="site_name",
            )
    if len(folders) < 2:
        raise DataError(
            f"a federation needs at least two sites, {len(folders)} found", str(folder), code="too_few_sites"
        )
    return tuple(Site(f.name, f.resolve(), ranks[i % len(ranks)], columns) for i, f in enumerate(folders))


@dataclass(frozen=True)
class Trial:
    """A federation to run and to compare with.

    Args:
        output: folder of all results.
        model: folder of the base model.
        plan: what every site is asked to do in a round.
        source: where the rows come from.
    """

    subject: Subject
    sites: tuple[Site, ...]
    output: Path
    model: Path
    plan: RoundPlan
    rounds: int
    source: str

    @property
    def better(self) -> Better:
        """Which end of the metric is better."""
        return promises(self.plan.task).metrics[self.subject.metric]

    @property
    def works_untrained(self) -> bool:
        """Whether the base model can do the task as it is, because it writes text; a new head cannot."""
        return promises(self.plan.task).learns_text

    def offer(self, folder: Path, tested_on: Path | None = None) -> SiteConfig:
        """What a site with these files would write into its `fm_site.yaml`."""
        train, test = file_of(folder, "train"), file_of(tested_on or folder, "test")
        data = DataSource(train=str(train), validation=str(test))
        return SiteConfig(
            models={"base": ModelSource(path=str(self.model))},
            data={"notes": data},
            limits=Limits(threads=1),
            privacy=Privacy(min_examples=1, min_update_rows=1, min_metric_rows=1),  # all sites are on this machine
        )
