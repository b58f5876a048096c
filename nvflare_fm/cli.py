"""`nvflare-fm`: what a site's IT does on its own machine, and a data scientist before a job is submitted."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from . import cli_job
from .errors import FmError

if TYPE_CHECKING:  # torch takes a second to load, and most commands need none
    from .site.checkup import Finding

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Federated PEFT fine-tuning on NVIDIA FLARE.")
site = typer.Typer(no_args_is_help=True, help="What a site allows, and whether it is ready.")
app.add_typer(site, name="site")
app.command()(cli_job.templates)
app.command(context_settings={"help_option_names": []})(cli_job.new)
app.command()(cli_job.plan)
app.command()(cli_job.resume)

Kit = Annotated[Path, typer.Option("--kit", help="the site's startup kit: the folder that holds startup/ and local/")]


@app.callback()
def main() -> None:
    """Federated PEFT fine-tuning on NVIDIA FLARE."""


@site.command()
def allow(
    kit: Kit = Path("."),
    remove: Annotated[bool, typer.Option("--remove", help="take everything out again")] = False,
    only_ours: Annotated[
        bool, typer.Option("--only-ours", help="let jobs build nothing of NVFlare's but what ours need")
    ] = False,
) -> None:
    """Lets jobs use this package with a startup kit that exists already, and gives the site a file to fill in."""
    from .flare import provision

    try:
        files = provision.remove(kit) if remove else provision.allow(kit, only_ours)
    except FmError as error:
        sys.exit(f"nvflare-fm: {error}")
    for file in files:
        typer.echo(("changed " if remove else "wrote ") + str(file))
    typer.echo("Restart the site for it to take effect." if files else "There was nothing to take out.")


@site.command()
def check(
    kit: Kit = Path("."),
    task: Annotated[str, typer.Option(help="what a job would train: see the site file's welcome.tasks")] = "causal_lm",
    labels: Annotated[str, typer.Option(help="for classification: the classes, separated by commas")] = "",
    model: Annotated[str, typer.Option(help="alias of the model to try the data sets with")] = "base",
    quantization: Annotated[str, typer.Option(help="nf4, fp4, int8, bf16, fp16 or fp32")] = "nf4",
    rank: Annotated[int, typer.Option(help="of the LoRA adapter tried")] = 8,
    batch_size: Annotated[int, typer.Option(help="examples a step")] = 8,
    max_length: Annotated[int, typer.Option(help="tokens; longer texts are cut")] = 512,
    as_json: Annotated[bool, typer.Option("--json", help="for scripts")] = False,
) -> None:
    """Loads and hashes the models, reads the data, trains a few steps. Exit status 0: ready, 1: see each ✗."""
    from .config import RoundPlan
    from .site.checkup import checkup
    from .site.site_config import FILE_NAME

    asked = {
        "task": task,
        "labels": [label.strip() for label in labels.split(",") if label.strip()],
        "model": model,
        "quantization": quantization,
        "peft": {"method": "lora", "rank": rank},
        "max_length": max_length,
        "training": {"batch_size": batch_size},
    }
    try:
        plan = RoundPlan.read(asked, "nvflare-fm site check")
    except FmError as error:
        sys.exit(f"nvflare-fm: {error}")
    findings = [*_kit(kit), *checkup(kit / "local" / FILE_NAME, plan)]
    if as_json:
        typer.echo(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        _show(findings)
    raise typer.Exit(0 if all(finding.good for finding in findings) else 1)


def _kit(kit: Path) -> "list[Finding]":
    from .flare import allow_list, components, job_check, provision
    from .site.checkup import Finding

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
    return [
        Finding("allow list", not faults, "; ".join([*faults, remedy]) if faults else f"jobs may build {listed}"),
        Finding("allowed besides", True, besides),
        Finding("job files", checked, "are checked before they are parsed" if checked else remedy),
        Finding("error logs", True, "go to the server: allow_log_streaming is on" if streams else "stay here"),
    ]


def _show(findings: "list[Finding]") -> None:
    table = Table("", "what", show_edge=False)
    table.add_column("found", overflow="fold")  # a fingerprint must be there in full, to be copied
    for finding in findings:
        table.add_row("[green]✓" if finding.good else "[red]✗", finding.what, finding.said)
    Console().print(table)


if __name__ == "__main__":
    app()
