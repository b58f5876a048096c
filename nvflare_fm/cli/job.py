"""`nvflare-fm templates`, `new` and `plan`: what a data scientist does before a job is submitted; `resume` after."""

import json
import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from ..errors import ConfigError
from ..job import templates as job_templates
from ..untrusted import one_line
from .terminal import add_row, console, plain

if TYPE_CHECKING:
    from ..flare.jobs.forecast import Forecast

WantsHelp = Annotated[
    bool, typer.Option("--help", help="show this message, and all settings of TEMPLATE if it is named")
]


def templates() -> None:
    """List the job templates."""
    for name in job_templates.names():
        typer.echo(f"{name:28}{job_templates.load(name).description}")


def new(
    context: typer.Context,
    template: Annotated[str, typer.Argument(help="a name that nvflare-fm templates lists")] = "",
    settings: Annotated[
        list[str], typer.Argument(metavar="key=value …", help="settings that differ from the template")
    ] = [],  # noqa: B006
    output: Annotated[Path | None, typer.Option("--output", "-o", help="folder of the job; must not exist yet")] = None,
    wants_help: WantsHelp = False,
) -> None:
    """Make a job from a template.

    Example: `nvflare-fm new lora_text_classification -o my_job labels=a,b`

    Use the shortest unambiguous name of a setting as key. With adapter=FOLDER the job starts from that adapter, with
    synthetic=FILE it brings synthetic rows.
    sites.NAME.KEY=value sets what one site does differently; the sites that you name are then the sites of the job.
    """
    if wants_help or not template:
        _explain(context, template)
        return
    if output is None:
        raise ConfigError("say where the job goes: -o FOLDER", code="no_output")
    if not output.name.isprintable():
        raise ConfigError(f"a job is named after its folder, and {output.name!r} is no text", code="not_text")
    from ..flare.jobs.new_job import write_job

    write_job(output, job_templates.load(template), dict(map(_setting, settings)))
    typer.echo(one_line(f"wrote {output}; next: nvflare-fm plan {output}, nvflare job submit -j {output}"))


def _setting(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not text.isprintable():
        raise ConfigError(f"{text!r} holds what is no text; settings are text in UTF-8", code="not_text")
    if not (key and equals):
        raise ConfigError(f"{text!r} sets nothing; write key=value", code="no_assignment")
    return key.strip(), value.strip()


def _explain(context: typer.Context, template: str) -> None:
    typer.echo(context.get_help())
    if not template:
        return
    settings = job_templates.load(template).settings()
    table = Table("setting", "value", "meaning", title=template, show_edge=False)
    for setting in settings:
        value = setting.value if setting.is_set else f"not set, e.g. {setting.value}"
        add_row(table, (job_templates.shortest(setting, settings), value, setting.meaning))
    console().print(table)


def plan(
    job: Annotated[Path, typer.Argument(help="folder of the job")],
    model: Annotated[
        Path | None, typer.Option(help="folder with the base model's config.json; its weights are not needed")
    ] = None,
    seconds_per_step: Annotated[
        list[str], typer.Option(help="figure that nvflare-fm site check has printed, 0.8, or SITE=0.8 for one site")
    ] = [],  # noqa: B006
    memory: Annotated[
        list[str], typer.Option(help="GiB that a site has for training, 24, or SITE=24 for one site")
    ] = [],  # noqa: B006
    records: Annotated[
        list[str], typer.Option(help="records a site trains on, 1000, or SITE=1000: for the noise of a job's privacy")
    ] = [],  # noqa: B006
    measure: Annotated[
        bool,
        typer.Option(
            "--measure", help="train a few steps on this machine, on made-up rows; needs --model with weights"
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON, for scripts")] = False,
) -> None:
    """Estimate what a job costs each site, before it runs.

    The command prints memory, seconds per round, and bytes per round up and down. Of a job with privacy it also prints
    the noise, and what all rounds together cost. It also checks the job.
    """
    from ..flare.jobs.forecast import forecast

    rates = dict(_by_site("--seconds-per-step", text) for text in seconds_per_step)
    has = dict(_by_site("--memory", text) for text in memory)
    told = forecast(job, model, rates, measure, has, dict(_by_site("--records", text) for text in records))
    if as_json:
        typer.echo(json.dumps(told.plain(), indent=2))
    else:
        _show(told)


def resume(
    ended: Annotated[
        str,
        typer.Argument(
            metavar="JOB", help="folder that nvflare job download has written, or, with --kit, the id of the job"
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="folder of the new job; unset: <name>_resumed in the current folder"),
    ] = None,
    kit: Annotated[
        Path | None,
        typer.Option("--kit", help="your startup kit, with which the command downloads JOB and submits the new job"),
    ] = None,
) -> None:
    """Continue a job that ended early, after its last round.

    The command makes a new job. With --kit it also downloads the old job and submits the new one.
    """
    from ..flare.jobs import resume as flare

    with tempfile.TemporaryDirectory() as downloads:
        result = Path(ended)
        if not result.is_dir():
            if kit is None:
                raise ConfigError(f"{ended!r} is no folder; to download a job by its id, add --kit", code="no_kit")
            result = flare.download(ended, kit, Path(downloads))
        name = next((file.parent.name for file in result.glob("job/*/meta.*")), "job")
        folder = output or Path(f"{name}_resumed")
        job = flare.write_resumed(result, folder)
    typer.echo(one_line(f"wrote {folder}: goes on with round {job.rounds.start} of rounds 0 to {job.rounds.stop - 1}"))
    if job.plan.shares != "AB":
        typer.echo("note: the factor that each site keeps to itself stays in the old job; it starts anew")
    if kit is None:
        typer.echo(one_line(f"next: nvflare job submit -j {folder}"))
        return
    submitted = flare.submit(folder, kit)
    typer.echo(one_line(f"submitted as {submitted}; next: nvflare job monitor {submitted}"))


def _by_site(option: str, text: str) -> tuple[str, float]:
    site, _, value = text.rpartition("=")
    try:
        number = float(value)
    except ValueError:
        number = 0.0
    if not 0 < number < math.inf:
        raise ConfigError(f"{option} {text!r} is no number above 0; write 0.8 or SITE=0.8", code="no_number")
    return site, number


def _show(told: "Forecast") -> None:
    table = Table(title=plain(told.title), show_edge=False)
    fits = any(cost.rank_that_fits is not None for cost in told.costs)
    names = ["site", "rank", *(["rank that fits"] if fits else []), "base", "memory", "steps a round", "s a round"]
    for name in (*names, "down a round", "up a round"):
        table.add_column(name, justify="left" if name in ("site", "base") else "right", no_wrap=name == "site")
    for cost in told.costs:
        cells = (
            cost.site,
            cost.rank or "–",
            *([_known(cost.rank_that_fits, str(cost.rank_that_fits))] if fits else []),
            cost.quantization,
            _size(cost.memory_bytes),
            _known(cost.steps, f"{cost.steps} × {cost.rows_per_step} rows"),
            _known(cost.seconds, f"{cost.seconds or 0:.1f}"),
            _size(cost.bytes_down),
            _size(cost.bytes_up),
        )
        add_row(table, cells)
    screen = console()
    screen.print(table)
    if told.noise:
        screen.print(_noise_table(told))
    if told.of_clients:
        screen.print(_client_table(told.of_clients))
    for note in told.notes:
        screen.print(plain(f"- {note}"))


def _noise_table(told: "Forecast") -> Table:
    table = Table(title="privacy", show_edge=False)
    names = ["site", "records", "in a step", "steps in all", "σ", "ε (RDP)", "ε (PRV)", "noise : clip"]
    for name in names:
        table.add_column(name, justify="left" if name == "site" else "right", no_wrap=name == "site")
    for each in told.noise:
        cells = (
            each.site,
            each.records,
            f"{each.records_per_step:g}",
            each.steps,
            f"{each.noise_multiplier:.3g}",
            f"{each.epsilon_rdp:.3g}",
            f"{each.epsilon_prv:.3g}",
            _known(each.ratio, f"{each.ratio or 0:.3g} : 1"),
        )
        add_row(table, cells)
    return table


def _client_table(noise: Mapping[str, float]) -> Table:
    """The noise at the server under `client_privacy`."""
    table = Table(title="client privacy: each site as a whole", show_edge=False)
    cells = {
        "sites": f"{noise['expected_sites']:g}",
        "rounds": f"{noise['rounds']:g}",
        "numbers": f"{noise['numbers']:g}",
        "clip": f"{noise['max_norm']:g}",
        "σ": f"{noise['noise_multiplier']:.3g}",
        "ε": f"{noise['epsilon']:.3g}",
        "δ": f"{noise['delta']:g}",
        "noise : clip": f"{noise['ratio']:.3g} : 1",
        "of all rounds": f"{noise['ratio_of_all']:.3g} : 1",
        "per number": f"{noise['per_number']:.3g}",
    }
    for name in cells:
        table.add_column(name, justify="right")
    add_row(table, tuple(cells.values()))
    return table


def _known(value: object, text: str) -> str:
    return "?" if value is None else text


def _size(size: int | None) -> str:
    if size is None:
        return "?"
    unit, name = next(((u, n) for u, n in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")) if size >= u), (1, "B"))
    return f"{size / unit:.3g} {name}" if unit > 1 else f"{size} B"
