"""A job folder made from a template: settings given, sites named, the adapter it starts from copied in, all tried.

What a server would refuse while it loads the job is refused here, and nothing is left behind.
"""

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...errors import ConfigError
from ...export import folder as export
from ...job.settle import CHECKED
from ...job.synthetic import FILE, read_rows
from ...job.templates import ADAPTER, ROWS, SITES, Template
from ..sealed import files_of
from .job import Job, read_job

_KEPT = ("model", "data", "quantization", "double_quant", "compute_dtype", "max_length")  # of the plan


def write_job(folder: Path, template: Template, settings: Mapping[str, str]) -> Job:
    """Write a job of a template into a new folder, and read it back.

    Args:
        folder: must not exist yet. Its name is the job's, where the settings give none.
        settings: values for the template's settings; `adapter`: the folder of the adapter to start from; `synthetic`:
            the file of synthetic rows that the job brings;
            `sites.NAME.KEY`: what a site does differently. Where any site is named, these are the sites of the job.

    Raises:
        ConfigError: an unknown setting, a value that is refused, or a folder that exists already.
        ModelError: the adapter cannot be read.
    """
    own = {"name": folder.name, **settings}
    adapter = Path(own.pop(ADAPTER)) if ADAPTER in own else None
    if bool(adapter) != bool(template.adapter_folder):
        need = "starts from an adapter: add adapter=FOLDER" if template.adapter_folder else "starts from no adapter"
        raise ConfigError(f"{template.name} {need}", code="no_adapter")
    rows = Path(own.pop(ROWS)) if ROWS in own else None
    if rows:
        own["synthetic.digest"] = read_rows(rows).digest
    if named := list(dict.fromkeys(key.split(".")[1] for key in own if key.startswith(f"{SITES}."))):
        template = template.for_sites(named)
    template = template.with_values({**(_as_trained(adapter, template) if adapter else {}), **own})
    if template.sites and SITES not in own:
        template = template.with_values({SITES: _of_sites(template)})
    return _tried(folder, template, adapter, rows)


def _of_sites(template: Template) -> dict[str, dict[str, Any]]:
    """What the server must know of what the sites' own apps ask of them."""
    found: dict[str, dict[str, Any]] = {}
    for setting in template.settings():
        if setting.is_set and setting.path[0] == SITES and setting.path[-1] in CHECKED:
            found.setdefault(setting.path[1], {})[setting.path[-1]] = json.loads(setting.value)
    return found


def _as_trained(adapter: Path, template: Template) -> dict[str, Any]:
    """What of a job is as it was when the adapter was trained: the task, labels and PEFT settings must be, and the base
    model, data and how texts are cut are unless the job says otherwise.
    """
    saved = export.read_adapter(adapter)
    plan = saved.plan
    if plan is None or not any(setting.path[0] == "plan" for setting in template.settings()):
        return {}
    if saved.manifest.peft != "lora":
        raise ConfigError(
            f"{template.name} goes on with LoRA, the adapter is {saved.manifest.peft}; use FedPEFTRecipe",
            code="other_adapter",
        )
    widest = max((pair.rank for pair in saved.adapter.lora.values()), default=0)
    widest = max(widest, plan.rank) if widest else 0  # an adapter can be shorter than what trained it
    peft = {f"plan.peft.{name}": _plain(value) for name, value in plan.peft.items()}
    labels = {"labels": list(plan.labels)} if plan.labels else {}
    kept = {f"plan.{name}": getattr(plan, name) for name in _KEPT}
    return {"plan.task": plan.task, **labels, "aggregator.max_rank": widest, **peft, **kept}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _tried(folder: Path, template: Template, adapter: Path | None, rows: Path | None) -> Job:
    with making(folder) as beside:
        for name, text in template.files.items():
            (beside / name).parent.mkdir(parents=True, exist_ok=True)
            (beside / name).write_text(text, encoding="utf-8")
        if adapter:
            bring(adapter, beside / template.adapter_folder)
        if rows:
            for app in beside.glob("*/config"):
                shutil.copyfile(rows, app / FILE)
        return read_job(beside)


@contextmanager
def making(folder: Path) -> Iterator[Path]:
    """Give an empty folder, which becomes `folder` when the block ends, and is gone if it ends with an error.

    Raises:
        ConfigError: `folder` exists already, or cannot be written.
    """
    if folder.exists():
        raise ConfigError(
            "the job's folder exists already and is not overwritten; choose another",
            str(folder),
            code="output_exists",
        )
    beside = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        yield beside
        beside.chmod(0o755)  # mkdtemp's 0700 would hide the job from the user's group
        beside.rename(folder)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise ConfigError(
            f"the job's folder cannot be written: {reason}", f"{folder}: {error}", code="job_not_written"
        ) from None
    finally:
        if beside:
            shutil.rmtree(beside, ignore_errors=True)


def bring(adapter: Path, folder: Path) -> None:
    """Copy the files of a saved adapter, and no others, into a new folder of a job."""
    folder.mkdir()
    for name in files_of(adapter):
        shutil.copyfile(adapter / name, folder / name)
