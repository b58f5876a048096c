"""`nvflare-fm`: what a site's IT does on its own machine, and a data scientist before a job is submitted."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import FmError
from ..untrusted import one_line
from . import audit as cli_audit
from . import budget as cli_budget
from . import compare as cli_compare
from . import data as cli_data
from . import explain as cli_explain
from . import export as cli_export
from . import job as cli_job
from . import models as cli_models
from . import simulate as cli_simulate
from . import synth as cli_synth
from .terminal import Commands

if TYPE_CHECKING:  # torch takes a second to load, and most commands need none
    from ..config import TaskPlan
    from ..site.check.finding import Finding

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # help is text, too
    pretty_exceptions_enable=False,
    help="Federated PEFT fine-tuning on NVIDIA FLARE.",
)
site = typer.Typer(no_args_is_help=True, help="Prepare a site, and check that it is ready.")
app.add_typer(site, name="site")
site.command()(cli_budget.budget)
app.add_typer(cli_data.data, name="data")
app.add_typer(cli_compare.compare, name="compare")
app.add_typer(cli_models.models, name="models")
app.add_typer(cli_synth.synth, name="synth")
app.command()(cli_job.templates)
app.command(context_settings={"help_option_names": []})(cli_job.new)
app.command()(cli_job.plan)
app.command()(cli_simulate.simulate)
app.command()(cli_job.resume)
app.command()(cli_explain.explain)
app.command()(cli_export.export)
app.command()(cli_export.decrypt)
app.command()(cli_audit.audit)
site.command()(cli_audit.canaries)

Kit = Annotated[Path, typer.Option("--kit", help="the site's startup kit: the folder that holds startup/ and local/")]


@app.callback()
def main() -> None:
    """Federated PEFT fine-tuning on NVIDIA FLARE."""


@site.command()
def allow(
    kit: Kit = Path("."),
    remove: Annotated[bool, typer.Option("--remove", help="undo what this command has changed")] = False,
    only_ours: Annotated[
        bool, typer.Option("--only-ours", help="of NVFlare's classes, list only those that jobs of this package need")
    ] = False,
) -> None:
    """Prepare an existing startup kit for jobs of this package.

    The command lists the classes that jobs may build, and writes a site file, local/fm_site.yaml, to fill in.
    """
    from ..flare import provision

    files = provision.remove(kit) if remove else provision.allow(kit, only_ours)
    for file in files:
        typer.echo(("changed " if remove else "wrote ") + str(file))
    typer.echo("Restart the site for it to take effect." if files else "There was nothing to take out.")


@site.command()
def check(
    kit: Kit = Path("."),
    task: Annotated[str, typer.Option(help="task to try, such as sequence_classification")] = "causal_lm",
    labels: Annotated[str, typer.Option(help="labels of the task, separated by commas")] = "",
    model: Annotated[str, typer.Option(help="alias of the model with which to try the data sets")] = "base",
    quantization: Annotated[
        str, typer.Option(help="precision of the base model: nf4, fp4, int8, bf16, fp16 or fp32")
    ] = "nf4",
    rank: Annotated[int, typer.Option(help="rank of the LoRA adapter to try")] = 8,
    batch_size: Annotated[int, typer.Option(help="rows per step")] = 8,
    max_length: Annotated[int, typer.Option(help="tokens at which a text is cut")] = 512,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON, for scripts")] = False,
) -> None:
    """Check a site before its first job.

    The command checks the machine and the startup kit, loads and hashes the models, reads the data and trains a few
    steps. A line marked ✗ says what to do. Exit status: 0 if the site is ready, 1 if it is not.
    """
    from ..config import TaskPlan

    asked = {
        "task": task,
        "labels": [label.strip() for label in labels.split(",") if label.strip()],
        "model": model,
        "quantization": quantization,
        "peft": {"method": "lora", "rank": rank},
        "max_length": max_length,
        "training": {"batch_size": batch_size},
    }
    findings = []
    for finding in _findings(kit, TaskPlan.read(asked, "nvflare-fm site check")):
        findings.append(finding)
        if not as_json:  # each as it is found: a large model takes minutes
            _show(finding)
    if as_json:
        typer.echo(json.dumps([asdict(finding) for finding in findings], indent=2))
    raise typer.Exit(0 if all(finding.good for finding in findings) else 1)


def _findings(kit: Path, plan: "TaskPlan") -> "Iterator[Finding]":
    from ..site.check.checkup import checkup
    from ..site.check.finding import Finding
    from ..site.check.machine import machine
    from ..site.offer.site_config import FILE_NAME

    if text := _no_kit(kit):
        yield Finding("kit", False, text)
        return
    yield from machine(kit)
    yield from _certificates(kit)
    yield from _kit(kit)
    yield _encryption(kit)
    yield from checkup(kit / "local" / FILE_NAME, plan)


def _certificates(kit: Path) -> "Iterator[Finding]":
    from ..flare.kit.certificate import expiry
    from ..site.check.finding import Finding

    try:
        if found := expiry(kit):
            yield Finding("certificate", not found.over, str(found))
    except FmError as error:
        yield Finding("certificate", False, str(error))


def _no_kit(kit: Path) -> str:
    """Why the folder cannot be a site's startup kit; nothing where it can."""
    if not kit.is_dir():
        return f"there is no folder {kit}; name the site's startup kit with --kit"
    if missing := [name for name in ("startup", "local") if not (kit / name).is_dir()]:
        return f"{kit.absolute()} is no startup kit: it has no folder {' and no folder '.join(missing)}"
    return ""


def _kit(kit: Path) -> "list[Finding]":
    from ..flare import components, provision
    from ..flare.kit import allow_list, job_check, privacy_scope
    from ..site.check.finding import Finding

    try:
        _, resources = allow_list.read(kit / "local")
    except FmError as error:
        return [Finding("allow list", False, str(error))]
    faults = allow_list.faults(resources, components.SITE)
    others = allow_list.others(resources, components.NVFLARE_SITE)
    listed = ", ".join(name.rpartition(".")[2] for name in components.SITE)
    besides = f"{len(others)} other classes; site allow --only-ours takes out NVFlare's" if others else "no class"
    checked, streams = job_check.installed(kit / "local", is_site=True), provision.streams_logs(resources)
    remedy = "run nvflare-fm site allow"
    floor, open_ways = privacy_scope.has_floor(kit / "local"), privacy_scope.faults(kit / "local")
    if floor and streams:
        open_ways.append("set allow_log_streaming to false in resources.json")
    kept = "under a floor: only protected updates leave" if floor else "no floor is stated in the site file"
    return [
        Finding("allow list", not faults, "; ".join([*faults, remedy]) if faults else f"jobs may build {listed}"),
        Finding("allowed besides", True, besides),
        Finding("job files", checked, "are checked before they are parsed" if checked else remedy),
        Finding("egress filter", not (floor and open_ways), "; ".join([*open_ways, remedy]) if open_ways else kept),
        Finding("error logs", True, "go to the server: allow_log_streaming is on" if streams else "stay here"),
    ]


def _encryption(kit: Path) -> "Finding":
    from ..flare.encryption import SITE, site_keys
    from ..site.check.finding import Finding

    if not (kit / "startup" / SITE).exists():
        return Finding("encryption", True, "the kit has no context: jobs that encrypt what sites send are refused")
    try:
        return Finding("encryption", True, f"{2 * site_keys(kit / 'startup').slots} coefficients, exact enough")
    except FmError as error:
        return Finding("encryption", False, str(error))


def _show(finding: "Finding") -> None:
    mark = typer.style("✓", fg="green") if finding.good else typer.style("✗", fg="red")
    typer.echo(f"{mark} {one_line(finding.what)}: {one_line(finding.text)}")
