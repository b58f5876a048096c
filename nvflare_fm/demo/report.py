"""What a demo says of its trial: each round as it ends, and the table and the curves at the end."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from rich.table import Table

from ..cli.terminal import add_row
from ..record.round import Round
from .baselines import Scores
from .picture import Panel
from .trial import Trial

MEAN, WORST = "mean", "worst site"


@dataclass(frozen=True)
class Results:
    """The scores of a trial.

    Args:
        alone: site → its own adapter's.
        federated: the shared adapter's before the first round and after each.
        pooled: those of training on all rows in one place.
    """

    alone: Mapping[str, Scores]
    federated: Sequence[Scores]
    pooled: Scores

    @property
    def alone_on_average(self) -> float:
        """The mean of the sites' own adapters over all test sets."""
        return mean(mean(scores.values()) for scores in self.alone.values())


def title(trial: Trial) -> str:
    """Name the metric, and say which end of it is better where that is the lower one."""
    return trial.subject.title + (" (lower is better)" if trial.better == "min" else "")


def with_summary(trial: Trial, scores: Scores) -> Scores:
    """Add the mean over the sites and the worst site to their scores."""
    worst = max if trial.better == "min" else min
    return {**scores, MEAN: mean(scores.values()), WORST: worst(scores.values())}


def scores_of(trial: Trial, line: Round) -> Scores:
    """Each site's score of the adapter it was sent, measured by the site on its own test rows."""
    return {site: said.before[trial.subject.metric] for site, said in sorted(line.sites.items())}


def header(trial: Trial) -> str:
    """Write the heads of the columns that `round_line` fills."""
    names = [*sorted(site.name for site in trial.sites), MEAN, WORST]
    return "  ".join(["round", *(f"{name:>5}" for name in names), "training loss"])


def round_line(trial: Trial, line: Round) -> str:
    """The adapter after so many rounds, measured by each site, and the loss of the round that starts from it."""
    scores = with_summary(trial, scores_of(trial, line))
    cells = [f"{value:>{max(5, len(name))}.{trial.subject.digits}f}" for name, value in scores.items()]
    return "  ".join([f"{line.round:>5}", *cells, "" if line.loss is None else f"{line.loss:>13.2f}"])


def by_origin(trial: Trial, results: Results) -> dict[str, Any]:
    """Arrange the scores by what the adapter was trained on, as results.json has them."""
    trained = {"alone": results.alone, "federated": results.federated[-1], "pooled": results.pooled}
    return {"base": results.federated[0], **trained} if trial.works_untrained else trained


def final_table(trial: Trial, results: Results) -> Table:
    """Make the table that compares each site alone, the federation and pooled training."""
    said = f"{title(trial)} on each site's own test {trial.subject.rows} ({trial.source})"
    table = Table(title=said, title_justify="left", title_style="bold")
    table.add_column("trained on")
    for name in with_summary(trial, results.federated[-1]):
        table.add_column(name, justify="right")
    if trial.works_untrained:
        add_row(table, ("nothing (base model)", *_cells(trial, results.federated[0])), style="dim")
    for site, scores in results.alone.items():
        add_row(table, (f"{site} alone", *_cells(trial, scores)))
    table.add_section()
    add_row(table, ("federated", *_cells(trial, results.federated[-1])), style="bold")
    add_row(table, ("pooled", *_cells(trial, results.pooled)), style="dim")
    return table


def _cells(trial: Trial, scores: Scores) -> list[str]:
    return [f"{value:.{trial.subject.digits}f}" for value in with_summary(trial, dict(sorted(scores.items()))).values()]


def panels(trial: Trial, results: Results) -> dict[str, Panel]:
    """What the picture shows: the mean over all sites first, then each site."""
    curves = [with_summary(trial, scores) for scores in results.federated]
    pooled = with_summary(trial, results.pooled)
    alone = {MEAN: results.alone_on_average, **{name: scores[name] for name, scores in results.alone.items()}}
    return {name: Panel([curve[name] for curve in curves], alone[name], pooled[name]) for name in alone}


def traffic(lines: Sequence[Round]) -> dict[str, int]:
    """Bytes of tensors over the whole federation: what the server sent to all sites, and what they sent back."""
    return {
        "down": sum(line.bytes_down * len(line.asked) for line in lines),
        "up": sum(said.bytes_up for line in lines for said in line.sites.values()),
    }
