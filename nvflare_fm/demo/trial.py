"""What the demo runs: its sites, the plan they carry out, and where everything is written."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..config import EvaluationSettings, RoundPlan, TrainingSettings
from ..errors import DataError
from ..site.offer.site_config import DataSource, Limits, ModelSource, Privacy, SiteConfig
from .generator import STYLES

TASK, METRIC, JOB = "sequence_classification", "macro_f1", "demo"
_RANKS = (16, 8, 4, 2)  # of the user's own sites, in turn


@dataclass(frozen=True)
class Site:
    """One folder with files `train` and `test` of any format, such as train.csv; rows have a `text` and a `label`."""

    name: str
    folder: Path
    rank: int

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
        return [_checked(row, f"{where}, line {line}") for line, row in found]


def _checked(row: Mapping[str, Any] | Exception, where: str) -> Mapping[str, str]:
    if isinstance(row, Exception):
        raise DataError(f"{where}: {row}", code="bad_rows")
    if not all(isinstance(row.get(name), str) and row[name].strip() for name in ("text", "label")):
        raise DataError(f"{where} must have a 'text' and a 'label', two texts that are not empty", code="bad_rows")
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


def read_sites(folder: Path) -> tuple[Site, ...]:
    """Every sub-folder that does not start with a dot is a site.

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
    made_here = {f.name for f in folders} == set(STYLES)
    ranks = [STYLES[f.name].rank if made_here else _RANKS[i % len(_RANKS)] for i, f in enumerate(folders)]
    return tuple(Site(f.name, f.resolve(), rank) for f, rank in zip(folders, ranks, strict=True))


@dataclass(frozen=True)
class Trial:
    """A federation to run and to compare with: its sites, its base model, and how long it trains.

    Args:
        synthetic: the notes were made by `generator`.
        rounds, steps: of the federation, and of each site in a round.
        model: folder of the base model.
    """

    sites: tuple[Site, ...]
    output: Path
    model: Path
    synthetic: bool = True
    rounds: int = 8
    steps: int = 10
    seed: int = 0

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """All labels of the sites' rows, sorted.

        Raises:
            DataError: a row cannot be used, or there is but one label.
        """
        found = {row["label"] for site in self.sites for split in ("train", "test") for row in site.rows(split)}
        if len(found) < 2:
            raise DataError(
                f"all rows have the label {found.pop()!r}; a classifier needs at least two", code="one_label"
            )
        return tuple(sorted(found))

    @property
    def max_rank(self) -> int:
        return max(site.rank for site in self.sites)

    def plan(self) -> RoundPlan:
        return RoundPlan(
            task=TASK,
            labels=self.labels,
            quantization="nf4",
            max_length=64 if self.synthetic else 128,
            peft={"method": "lora", "rank": self.max_rank, "lora_alpha": 2, "use_rslora": True},
            training=TrainingSettings(local_steps=self.steps, batch_size=8, learning_rate=5e-3, warmup_ratio=0.1),
            evaluation=EvaluationSettings(before=True, after=False, batch_size=32),
            seed=self.seed,
        )

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
