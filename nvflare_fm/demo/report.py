"""What the demo says: the sites, each round as it ends, and the table at the end."""

from collections.abc import Mapping, Sequence
from statistics import mean

from rich.table import Table

from ..cli.terminal import add_row
from ..record.round import Round
from .baselines import Scores
from .trial import METRIC, Trial

MEAN, WORST = "mean", "worst site"


def with_summary(scores: Scores) -> Scores:
    """Add the mean over the sites and the worst site to their scores."""
    return {**scores, MEAN: mean(scores.values()), WORST: min(scores.values())}


def scores_of(line: Round) -> Scores:
    """Each site's macro-F1 of the adapter it was sent, measured by the site on its own test notes."""
    return {site: said.before[METRIC] for site, said in sorted(line.sites.items())}


def sites_table(trial: Trial) -> Table:
    """Make the table of the sites: rows, rank, and what their notes are about."""
    table = Table(title="The sites", title_justify="left", title_style="bold")
    for column in ("site", "training notes", "rank", "mostly about"):
        table.add_column(column, justify="right" if column in ("training notes", "rank") else "left")
    for site in trial.sites:
        labels = [row["label"] for row in site.rows("train")]
        often = sorted({*labels}, key=lambda label: (-labels.count(label), label))[:2]
        about = ", ".join(f"{label} {labels.count(label) / len(labels):.0%}" for label in often)
        add_row(table, (site.name, len(labels), site.rank, about))
    return table


def header(trial: Trial) -> str:
    """Write the heads of the columns that `round_line` fills."""
    names = [*sorted(site.name for site in trial.sites), MEAN, WORST]
    return "  ".join(["round", *(f"{name:>5}" for name in names), "training loss"])


def round_line(line: Round) -> str:
    """The adapter after so many rounds, measured by each site, and the loss of the round that starts from it."""
    cells = [f"{value:>{max(5, len(name))}.2f}" for name, value in with_summary(scores_of(line)).items()]
    return "  ".join([f"{line.round:>5}", *cells, "" if line.loss is None else f"{line.loss:>13.2f}"])


def final_table(trial: Trial, alone: Mapping[str, Scores], federated: Scores, pooled: Scores) -> Table:
    """Make the table that compares each site alone, the federation and pooled training."""
    kind = "SYNTHETIC notes" if trial.synthetic else "your files"
    table = Table(title=f"Macro-F1 on each site's own test notes ({kind})", title_justify="left", title_style="bold")
    table.add_column("trained on")
    columns = list(with_summary(federated))
    for name in columns:
        table.add_column(name, justify="right")
    for site, scores in alone.items():
        add_row(table, (f"{site} alone", *_cells(scores, columns)))
    table.add_section()
    add_row(table, ("federated", *_cells(federated, columns)), style="bold")
    add_row(table, ("pooled", *_cells(pooled, columns)), style="dim")
    return table


def _cells(scores: Scores, columns: Sequence[str]) -> list[str]:
    return [f"{with_summary(scores)[name]:.2f}" for name in columns]


def traffic(lines: Sequence[Round]) -> dict[str, int]:
    """Bytes of tensors over the whole federation: what the server sent to all sites, and what they sent back."""
    return {
        "down": sum(line.bytes_down * len(line.asked) for line in lines),
        "up": sum(said.bytes_up for line in lines for said in line.sites.values()),
    }
