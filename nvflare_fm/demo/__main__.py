"""`make demo`: four simulated sites fine-tune one 4-bit encoder together, and each on its own for comparison."""

from pathlib import Path
from typing import Annotated

import typer

from ..cli.terminal import console as terminal
from . import notes
from .show import command, show
from .trial import SYNTHETIC, Trial

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
    trial = notes.prepare(data, output.resolve(), rounds, steps, seed)
    _introduce(trial)
    show(trial)


def _introduce(trial: Trial) -> None:
    if trial.source == SYNTHETIC:
        console.print(SYNTHETIC, style="bold yellow", end="")
        console.print(
            f": made by this program, about nobody. Look at them in {trial.sites[0].folder.parent}", soft_wrap=True
        )
    console.print(notes.sites_table(trial.sites))
    console.print(
        f"Task: which of {len(trial.plan.labels)} labels is a note for? Every site holds the same frozen encoder "
        "(all-MiniLM-L6-v2, NF4) and trains a LoRA adapter of its own rank. The notes stay where they are; "
        "NVFlare carries the adapters.\n"
    )


if __name__ == "__main__":
    command(demo)
