"""Runs a trial and shows it: the federation round by round, what it is compared with, table and picture."""

import json
import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ..cli.terminal import console as terminal
from ..cli.terminal import errors_shown, plain
from ..record.round import Round
from . import baselines, federation, report
from .picture import draw
from .trial import SYNTHETIC, Trial

if TYPE_CHECKING:
    from ..flare.simulation import Simulation

console = terminal()
Figures = dict[str, Any]  # as results.json holds them


def command(function: Callable[..., None]) -> None:
    """Run a demo as a command of its own; a user's mistake ends it in one line."""
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.command()(function)
    with errors_shown():
        app()


def show(trial: Trial, trained: Callable[[Path], Figures] = lambda _: {}) -> None:
    """Run a trial, and show and write what came out.

    Args:
        trained: gets the folder of the federation's adapter while what it is compared with still trains, and gives
            figures of its own.

    Raises:
        FmError: the federation, or what it is compared with, fails.
    """
    started = time.monotonic()
    spawn = multiprocessing.get_context("spawn")
    workers = min(len(os.sched_getaffinity(0)), len(trial.sites) + 1)
    with spawn.Pool(workers, baselines.courteous) as pool:  # leaving it ends its processes, whatever happened
        waiting = pool.apply_async(baselines.pooled, (trial,))
        waiting_alone = {site.name: pool.apply_async(baselines.alone, (trial, site)) for site in trial.sites}
        run = federation.simulation(trial)
        lines = _watch(trial, run)
        more = trained(federation.adapter_folder(run))
        with console.status(plain("the federation is done; what it is compared with is still training")):
            pooled = waiting.get()
            alone = {name: result.get() for name, result in waiting_alone.items()}
        pool.close()
        pool.join()  # they leave by themselves: told to end, they would complain on the terminal
    results = report.Results(alone, [report.scores_of(trial, line) for line in lines], pooled)
    _conclude(trial, run, lines, results, more, seconds=time.monotonic() - started)


def _watch(trial: Trial, run: "Simulation") -> list[Round]:
    lines: list[Round] = []
    subject = trial.subject
    about = f"{report.title(trial)} of the shared adapter after each round, on each site's own test {subject.rows}"
    console.print(about, style="bold")
    console.print(report.header(trial), style="dim")
    begins = plain("starting a server and the sites, each in a process of its own: about half a minute")
    with console.status(begins) as status:
        for line in federation.follow(run):
            lines.append(line)
            console.print(report.round_line(trial, line))
            status.update(plain(f"round {min(len(lines) + 1, trial.rounds)} of {trial.rounds}"))
    return lines


def _conclude(
    trial: Trial, run: "Simulation", lines: list[Round], results: report.Results, more: Figures, seconds: float
) -> None:
    sent = report.traffic(lines)
    console.print()
    console.print(report.final_table(trial, results))
    picture = draw(trial.output / "curves.png", report.panels(trial, results), trial.subject, _caption(trial))
    plan = trial.plan
    figures = {
        "seed": plan.seed,
        "synthetic": trial.source == SYNTHETIC,
        "rounds": trial.rounds,
        "steps": plan.training.local_steps,
        trial.subject.metric: report.by_origin(trial, results),
        "bytes": sent,
        **more,
        "seconds": round(seconds, 1),
    }
    written = trial.output / "results.json"
    written.write_text(json.dumps(figures, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    console.print(f"sent     {sent['down'] / 1e6:.1f} MB to the sites, {sent['up'] / 1e6:.1f} MB back")
    for name, path in (
        ("adapter", federation.adapter_folder(run)),
        ("picture", picture),
        ("figures", written),
        ("log", run.log),
    ):
        console.print(plain(f"{name:<8} {path}"), soft_wrap=True)
    console.print(f"took     {seconds:.0f} s")


def _caption(trial: Trial) -> str:
    lower = " Lower is better." if trial.better == "min" else ""
    return (
        f"One adapter for all sites, on each site's test {trial.subject.rows} ({trial.source}). Alone: the site's own "
        f"adapter; in the mean, the average of all.{lower}"
    )
