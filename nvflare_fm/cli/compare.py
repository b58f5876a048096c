"""`nvflare-fm compare`: which configuration to use where sites differ, measured on public data or on yours."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import ConfigError
from .terminal import console

if TYPE_CHECKING:
    from ..compare.study import Study, Workspace

compare = typer.Typer(no_args_is_help=True, help="Compare aggregation rules and settings on sites that differ.")

Output = Annotated[Path, typer.Option("--output", "-o", help="folder for data sets, models and results")]
Folder = Annotated[Path | None, typer.Option(help="your data: one folder per site with train.jsonl and test.jsonl")]
Model = Annotated[Path | None, typer.Option(help="folder of the base model; unset: a small public one")]
TaskName = Annotated[str, typer.Option("--task", help="where rows have both a label and a prompt: "
                                       "sequence_classification or causal_lm")]  # fmt: skip
MaxLength = Annotated[int, typer.Option(min=0, help="tokens at which a text is cut; 0: 64 (labels) or 128 (text)")]
Rounds = Annotated[int, typer.Option(min=0, max=1000, help="of every federation; 0: 20 for labels, 10 for text")]
TestRows = Annotated[int, typer.Option(min=0, help="rows of each site's test file that are scored; 0: 100 or 50")]
Rates = Annotated[str, typer.Option(help="learning rates that every method tries first, separated by commas")]
Methods = Annotated[str, typer.Option(help="names, separated by semicolons; empty: all that the docs compare")]
Seeds = Annotated[int, typer.Option(min=1, max=1000, help="runs of each method")]
Cores = Annotated[int, typer.Option(min=1, max=1024, help="runs at a time, one core each")]
HERE = Path("runs/compare")


@compare.command()
def run(
    name: Annotated[str, typer.Argument(help="a public data set, or a name of your choice with --folder")],
    folder: Folder = None,
    model: Model = None,
    task: TaskName = "",
    max_length: MaxLength = 0,
    rounds: Rounds = 0,
    test_rows: TestRows = 0,
    rates: Rates = "",
    methods: Methods = "",
    seeds: Seeds = 3,
    first_seed: Annotated[int, typer.Option(min=0, help="seeds are counted on from it")] = 0,
    cores: Cores = 2,
    output: Output = HERE,
) -> None:
    """Finds each method's learning rate, runs it from each seed, and reports. Goes on where it was stopped.

    Public data sets: medquad-types, medquad-lm, and banking77-A, banking77lm-A, mts-A, mtslm-A, where A is the
    parameter of the Dirichlet law (0: sites are alike). `@random` behind a name: a base model with random weights.
    """
    from ..compare.grid import runs
    from ..compare.methods import COMPARED, named
    from ..compare.run import carry_out_all
    from ..compare.study import Workspace
    from ..compare.tuning import MOST_RATES, tune_all, tuned_on

    workspace = Workspace.at(output)
    asked = named([part.strip() for part in methods.split(";") if part.strip()] or COMPARED)
    options = (folder, model, task, max_length, rounds, test_rows, rates)
    data = _study(name, workspace, *options)
    tuning_of = name if folder else tuned_on(name)
    tuned_with = data if tuning_of == name else _study(tuning_of, workspace, *options)
    once = data.rounds * len(data.names)
    typer.echo(
        f"{name}: {len(data.names)} sites, {len(asked)} methods. To tune: {len(data.rates)} to {MOST_RATES} rates "
        f"each; then {seeds} seeds: {once * len(asked) * (len(data.rates) + seeds)} rounds of a site or more. "
        "The bar tells how long they take."
    )
    tune_all(tuned_with, tuning_of, asked, cores)
    carry_out_all(runs(data, tuning_of, asked, range(first_seed, first_seed + seeds)), cores)
    _show(data)


@compare.command()
def report(
    name: Annotated[str, typer.Argument(help="a study that has been run")],
    folder: Folder = None,
    model: Model = None,
    task: TaskName = "",
    against: Annotated[str, typer.Option(help="the method that others are compared with")] = "ours",
    output: Output = HERE,
) -> None:
    """Prints tables of what has been run, and draws its curves."""
    from ..compare.methods import named
    from ..compare.study import Workspace

    _show(_study(name, Workspace.at(output), folder, model, task), *named([against]))


@compare.command()
def grid(seeds: Seeds = 3, cores: Cores = 2, output: Output = HERE) -> None:
    """Runs the comparison of the documentation, the most skewed data first: hours."""
    from ..compare.grid import cells, run_all
    from ..compare.study import Workspace

    run_all(cells(), Workspace.at(output), range(seeds), cores)


@compare.command()
def parts(seeds: Seeds = 3, cores: Cores = 2, output: Output = HERE) -> None:
    """Runs our default with one part changed, peers with our head, and slow sites."""
    from ..compare.grid import PARTS, run_all
    from ..compare.study import Workspace

    run_all(PARTS, Workspace.at(output), range(seeds), cores)


@compare.command()
def data(
    name: Annotated[str, typer.Argument(help="a public data set, as for run")],
    output: Annotated[Path, typer.Argument(help="folder to write; one folder per site")],
) -> None:
    """Writes a public data set as one folder per site, to look at or to train on."""
    from ..compare.data_sets import write

    typer.echo(f"wrote {write(name, output)}")


@compare.command()
def overview(output: Output = HERE) -> None:
    """Prints what the grid found, a study a column."""
    from ..compare.grid import GRID
    from ..compare.results import overview as table
    from ..compare.study import Workspace, study

    found = [study(name, Workspace.at(output)) for name in GRID]
    for lower in (False, True):  # what was classified, then what was written
        console(width=200).print(table([each for each in found if each.lower_is_better == lower]))


def _study(
    name: str,
    workspace: "Workspace",
    folder: Path | None,
    model: Path | None,
    task: str = "",
    max_length: int = 0,
    rounds: int = 0,
    test_rows: int = 0,
    rates: str = "",
) -> "Study":
    from ..compare.study import study

    try:
        numbers = [float(rate) for rate in rates.split(",") if rate.strip()]
    except ValueError:
        numbers = [-1.0]
    if not all(0 < rate <= 10 for rate in numbers):
        raise ConfigError("--rates takes numbers between 0 and 10, separated by commas: 0.005,0.01", code="wrong_rates")
    return study(name, workspace, folder, model, task, max_length, rounds, test_rows, numbers)


def _show(data: "Study", against: str = "ours") -> None:
    from ..compare.results import Results, compared, homes, picture

    results, wide = Results(data), console(width=200)
    wide.print(compared(results, against))
    if any(row["method"] == "alone" for row in results.rows):
        wide.print(homes(results))
    typer.echo(f"figure: {picture(data)}")
