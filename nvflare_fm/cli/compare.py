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
TaskName = Annotated[str, typer.Option("--task", help="needed if rows have both a label and a prompt: "
                                       "sequence_classification or causal_lm")]  # fmt: skip
MaxLength = Annotated[int, typer.Option(min=0, help="tokens at which a text is cut; 0: 64 (labels) or 128 (text)")]
Rounds = Annotated[int, typer.Option(min=0, max=1000, help="rounds of every federation; 0: 20 (labels) or 10 (text)")]
TestRows = Annotated[int, typer.Option(min=0, help="test rows scored at each site; 0: all (labels) or 50 (text)")]
Rates = Annotated[str, typer.Option(help="learning rates that every method tries first, separated by commas; one alone "
                                         "is taken as it is")]  # fmt: skip
Methods = Annotated[str, typer.Option(help="methods, separated by semicolons; unset: all that the docs compare")]
Seeds = Annotated[int, typer.Option(min=1, max=1000, help="number of runs of each method, each with its own seed "
                                    "and, of public data split by chance, its own split")]  # fmt: skip
Cores = Annotated[int, typer.Option(min=1, max=1024, help="number of runs at a time, one core each")]
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
    seeds: Seeds = 5,
    first_seed: Annotated[int, typer.Option(min=0, help="the first seed; the others follow it")] = 0,
    cores: Cores = 2,
    output: Output = HERE,
) -> None:
    """Compare methods on one data set.

    The command says how long it takes, finds a learning rate for each method, runs the method from each seed, and
    prints the tables. If you stop it, the next call continues.

    Public data sets: medquad-types, medquad-lm, and banking77-A, banking77lm-A, mts-A, mtslm-A, where A is the
    parameter of the Dirichlet distribution of labels over sites (0: sites are alike). With two or three labels that all
    sites share, and other topics, institutes or years at each: banking77-two, medquad-two, medquad-three and
    pubmedqa-years. With labels that no two sites share: banking77-disjoint. Add `@random` to a name to use a base model
    with random weights, `@full` for all six layers of MiniLM.
    """
    from ..compare.grid import runs, work
    from ..compare.methods import compared, methods_named
    from ..compare.run import carry_out_all, duration
    from ..compare.study import Workspace
    from ..compare.tuning import tune_all, tuned_on

    workspace = Workspace.at(output)
    options = (folder, model, task, max_length, rounds, test_rows, rates)
    named = methods_named(_listed(methods))
    data = _study(name, workspace, *options)
    asked = named or compared(data.plan["task"])
    tuning_of = name if folder else tuned_on(name)
    tuned_with = data if tuning_of == name else _study(tuning_of, workspace, *options)
    numbers = range(first_seed, first_seed + seeds)
    typer.echo(f"{name}: {len(data.names)} sites, {len(asked)} methods, {seeds} seeds. Timing a round of one site ...")
    trials, left, seconds = work(tuned_with, {name: data}, {name: asked}, numbers)
    typer.echo(
        f"About {trials} trials to tune and {left} runs: {duration(seconds / cores)} on {cores} cores, "
        "longer where a search goes on."
    )
    tune_all(tuned_with, asked, cores)
    carry_out_all(runs(data, tuned_with, asked, numbers), cores)
    _show(data)


@compare.command()
def robustness(
    names: Annotated[list[str] | None, typer.Argument(help="public data sets, as for run; unset: those of the "
                                                           "docs")] = None,
    attacks: Annotated[str, typer.Option(help="separated by semicolons; unset: all")] = "",
    guards: Annotated[str, typer.Option(help="separated by semicolons; unset: all, and peers")] = "",
    sites: Annotated[int, typer.Option(min=0, max=1024, help="sites to make of the data set's; 0: its own")] = 5,
    attackers: Annotated[int, typer.Option(min=1, max=1024, help="how many of them attack")] = 1,
    rounds: Annotated[int, typer.Option(min=1, max=1000, help="rounds of every federation")] = 12,
    steps: Annotated[int, typer.Option(min=1, max=1000, help="steps of a site in a round")] = 5,
    rate: Annotated[float, typer.Option(min=0, max=10, help="learning rate; 0: the one tuned for a published data set, "
                                                            "or 0.01")] = 0,
    seeds: Seeds = 3,
    first_seed: Annotated[int, typer.Option(min=0, help="the first seed; the others follow it")] = 0,
    cores: Cores = 2,
    folder: Folder = None,
    model: Model = None,
    task: TaskName = "",
    max_length: MaxLength = 0,
    table_only: Annotated[bool, typer.Option("--table-only", help="run nothing; print what there is")] = False,
    output: Output = HERE,
) -> None:  # fmt: skip
    """Measure what attacks of dishonest sites cost under each guard.

    Every attack runs on every guard from each seed; the seed draws who attacks. If you stop the command, the next call
    continues. The tables are Markdown.

    An attack or guard is a name, several joined by +, or JSON with settings: '[{"rule": "sign_flip", "far": 1}]'. The
    attack `none` has honest sites alone, and `absent` leaves out those that would attack. The guard `none` is no guard,
    and `default` is that of a job that names none; `default, head from features` has `head_start = features` as well,
    and a learning rate of 0.001. A JSON object without `rule` sets other settings of the aggregation:
    '{"merge": "freeze_a"}'.
    """
    from ..compare import robustness as study_of
    from ..compare.results import markdown
    from ..compare.run import carry_out_all, read_lines
    from ..compare.study import Workspace

    if folder and len(names or ()) != 1:
        raise ConfigError("with --folder give one name, for the file of the results", code="one_name")
    cells, found = names or [*study_of.CELLS], []
    asked = _listed(attacks) or study_of.default_attacks()
    against = _listed(guards) or [*study_of.guards_there_are(), *study_of.PEERS]
    for name in cells:
        data = _study(name, Workspace.at(output), folder, model, task, max_length)
        data = study_of.prepared(data, sites, rounds, steps)
        rates = (rate or study_of.CELLS.get(name, 1e-2)), (rate or study_of.PEER_RATES.get(name, 1e-2))
        numbers = range(first_seed, first_seed + seeds)
        found.append((data, study_of.runs(data, asked, against, numbers, attackers, rates)))
    if not table_only:
        carry_out_all([run for _, runs in found for run in runs], cores)
    for data, runs in found:
        if runs[0].file.exists():
            mine = {run.digest for run in runs}
            lines = [line for line in read_lines(runs[0].file) if line["digest"] in mine]
            typer.echo(f"\n{data.name}: {attackers} of {len(data.names)} sites attack\n")
            typer.echo(markdown(study_of.table(data, lines)))


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(";") if part.strip()]


@compare.command()
def report(
    name: Annotated[str, typer.Argument(help="a study that compare run has run")],
    folder: Folder = None,
    model: Model = None,
    task: TaskName = "",
    against: Annotated[str, typer.Option(help="method that the others are compared with")] = "ours",
    output: Output = HERE,
) -> None:
    """Print the tables of a study and draw its curves."""
    from ..compare.methods import methods_named
    from ..compare.study import Workspace

    _show(_study(name, Workspace.at(output), folder, model, task), *methods_named([against]))


@compare.command()
def grid(seeds: Seeds = 5, cores: Cores = 2, output: Output = HERE) -> None:
    """Run the documentation's comparison: hours.

    The most skewed data come first.
    """
    from ..compare.grid import cells, run_all
    from ..compare.study import Workspace

    run_all(cells(), Workspace.at(output), range(seeds), cores)


@compare.command()
def parts(seeds: Seeds = 5, cores: Cores = 2, output: Output = HERE) -> None:
    """Run variants of our default, and slow sites.

    The variants change one part of the default, or train another method as the default does.
    """
    from ..compare.grid import PARTS, run_all
    from ..compare.study import Workspace

    run_all(PARTS, Workspace.at(output), range(seeds), cores)


@compare.command()
def data(
    name: Annotated[str, typer.Argument(help="a public data set, as for run")],
    output: Annotated[Path, typer.Argument(help="folder to write; one folder per site")],
) -> None:
    """Write a public data set as one folder per site."""
    from ..compare.data_sets import write

    typer.echo(f"wrote {write(name, output)}")


@compare.command()
def overview(output: Output = HERE) -> None:
    """Print the results of grid, one study a column."""
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
