"""`make demo-answers`: four NIH institutes teach a small language model in 4 bits to answer patients' questions."""

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from ..cli.terminal import add_row, plain
from ..cli.terminal import console as terminal
from ..config import EvaluationSettings, RoundPlan, TrainingSettings
from ..errors import ConfigError
from . import medquad
from .samples import TOKENS, Sample, sample
from .show import command, show
from .trial import YOURS, Subject, Trial, read_sites

ANSWERS = Subject("answers", ("instruction", "output"), "bits_per_byte", "Bits per byte", digits=3)
RANK = 8
_ASKED = 2  # sites of which a question is shown
_SHOWN = 300  # characters of a site's own answer
console = terminal()


def demo(
    data: Annotated[
        Path | None,
        typer.Option(help="your own files: a folder per site with train.* and test.*; columns instruction and output"),
    ] = None,
    model: Annotated[Path, typer.Option(help="folder of the base model; make models brings the default")] = Path(
        "runs/models/smollm2-135m-instruct"
    ),
    rounds: Annotated[int, typer.Option(min=1, help="rounds of the federation")] = 5,
    steps: Annotated[int, typer.Option(min=1, help="training steps of each site in a round")] = 6,
    output: Annotated[Path, typer.Option(help="folder of all results; earlier ones are replaced")] = Path(
        "runs/demo-answers"
    ),
    seed: Annotated[int, typer.Option(min=0, help="seed of the order of the rows, and of the adapter")] = 0,
) -> None:
    """Fine-tune a language model at simulated sites, on answers of NIH institutes or on your own."""
    trial = prepare(data, model, output.resolve(), rounds, steps, seed)
    _introduce(trial)
    show(trial, lambda adapter: _ask(trial, adapter))


def prepare(data: Path | None, model: Path, output: Path, rounds: int, steps: int, seed: int) -> Trial:
    """Read the sites' files, or take MedQuAD's, and describe the trial.

    Raises:
        ConfigError: the model is not here.
        DataError: the files cannot be used, or MedQuAD is not here.
    """
    if not (model / "config.json").is_file():
        raise ConfigError(
            f"there is no model in {model}; bring it with make models, or name another's folder with --model",
            code="no_such_file",
        )
    stale = ["federation"] if data else ["federation", medquad.FOLDER]
    for folder in stale:
        shutil.rmtree(output / folder, ignore_errors=True)
    output.mkdir(parents=True, exist_ok=True)
    sites = read_sites(data or medquad.write(output), ANSWERS.columns, (RANK,))
    for site in sites:  # a faulty row is found before anything starts
        _ = site.rows("train"), site.rows("test")
    plan = RoundPlan(
        task="causal_lm",
        quantization="nf4",
        max_length=128,
        peft={"method": "lora", "rank": RANK},
        training=TrainingSettings(local_steps=steps, batch_size=4, learning_rate=5e-4, warmup_ratio=0.1),
        evaluation=EvaluationSettings(before=True, after=False, batch_size=8, max_examples=24),
        seed=seed,
    )
    return Trial(ANSWERS, sites, output, model.resolve(), plan, rounds, YOURS if data else "MedQuAD")


def sites_table(trial: Trial) -> Table:
    """Make the table of the sites: rows, rank, and a question for each."""
    table = Table(title="The sites", title_justify="left", title_style="bold")
    for column in ("site", "training answers", "rank", "one of the questions"):
        table.add_column(column, justify="right" if column in ("training answers", "rank") else "left")
    for site in trial.sites:
        found = site.rows("train")
        add_row(table, (site.name, len(found), site.rank, found[0]["instruction"]))
    return table


def _introduce(trial: Trial) -> None:
    console.print(sites_table(trial))
    console.print(
        f"Task: answer questions. Every site holds the same frozen language model ({trial.model.name}, NF4) "
        "and trains a LoRA adapter. The answers stay where they are; NVFlare carries the adapters.\n"
    )


def _ask(trial: Trial, adapter: Path) -> dict[str, Any]:
    """Ask the base model and the federation's the first test question of some sites, and show what they say."""
    rows = [(site.name, site.rows("test")[0]) for site in trial.sites[:_ASKED]]
    with console.status(plain("asking the base model and the federation's")):
        found = sample(trial.model, adapter, rows)
    about = f"The same question before and after (greedy, up to {TOKENS} tokens). Nobody should act on these answers"
    console.print(f"\n{about}", style="bold")
    for each in found:
        console.print(answers_table(each))
    return {"answers": [asdict(each) for each in found]}


def answers_table(found: Sample) -> Table:
    """Make the table of the answers to one question."""
    table = Table(title=plain(found.question), title_justify="left", show_header=False)
    expected = found.expected[:_SHOWN] + " …" * (len(found.expected) > _SHOWN)
    for who, said in (("before", found.before), ("after", found.after), (found.site, expected)):
        add_row(table, (who, said))
    return table


if __name__ == "__main__":
    command(demo)
