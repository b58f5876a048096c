"""The job templates: submit-ready, without code, every knob explained and read, the same job as the recipe's."""

import inspect
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
from nvflare.fuel.utils.config_factory import ConfigFactory
from nvflare.private.fed.server.job_meta_validator import JobMetaValidator
from nvflare.private.fed.simulator.simulator_const import SimulatorConstants
from pyhocon import ConfigFactory as Hocon

from nvflare_fm.config import EvaluationSettings, RoundPlan, TrainingSettings
from nvflare_fm.export import read_adapter
from nvflare_fm.flare.aggregator import AdapterAggregator
from nvflare_fm.flare.allow_list import allow
from nvflare_fm.flare.controller import FedPEFT
from nvflare_fm.flare.environments import write_site
from nvflare_fm.flare.executor import PeftExecutor
from nvflare_fm.flare.persistor import AdapterPersistor
from nvflare_fm.flare.recipe import FedPEFTRecipe
from nvflare_fm.site.peft_methods import registry as methods
from tests.flare.test_job import Builder
from tests.site import tiny

FOLDER = Path(__file__).parents[1] / "job_templates"
TEMPLATES = ["lora_instruction_tuning", "lora_text_classification"]
APP = Path("config") / "config"
NOT_KNOBS = {"path", "id", "format_version", "tasks", "executors", "workflows", "components"}
NOT_KNOBS |= {"task_data_filters", "task_result_filters"}
every_template = pytest.mark.parametrize("template", TEMPLATES)


def parts(folder: Path, side: str) -> list[dict[str, Any]]:
    """What one side of a job builds: workflows, executors, components."""
    (file,) = folder.rglob(f"config_fed_{side}.*")
    config = ConfigFactory.load_config(str(file)).to_dict()
    executors = [entry["executor"] for entry in config.get("executors", [])]
    return [*config.get("workflows", []), *executors, *config["components"]]


def built(folder: Path) -> dict[type, Any]:
    made = [Builder().build_component(part) for side in ("server", "client") for part in parts(folder, side)]
    controller = next(c for c in made if isinstance(c, FedPEFT))
    return {type(component): component for component in (*made, controller.aggregator)}


def arguments(component: Any) -> dict[str, Any]:
    """What it was made with, defaults written out."""
    names = [name for name in inspect.signature(type(component).__init__).parameters if name != "self"]
    return {name: getattr(component, name) for name in names if name not in ("plan", "aggregator")}


def test_every_folder_here_is_a_template_under_test() -> None:
    assert sorted(f.name for f in FOLDER.iterdir() if f.is_dir()) == TEMPLATES


@every_template
def test_a_template_is_configuration_and_nothing_else(template: str) -> None:
    files = [file for file in (FOLDER / template).rglob("*") if file.is_file()]
    assert {file.suffix for file in files} == {".conf"}
    assert not list((FOLDER / template).rglob("custom"))
    for file in files:
        Hocon.parse_file(str(file))


@every_template
def test_nvflare_accepts_a_template_as_a_job_that_brings_no_code(template: str, tmp_path: Path) -> None:
    shutil.copytree(FOLDER / template, tmp_path / template)
    archive = shutil.make_archive(str(tmp_path / "job"), "zip", tmp_path, template)
    with ZipFile(archive) as job:
        assert f"{template}/{APP}/config_fed_server.conf" in job.namelist()
    valid, error, meta = JobMetaValidator().validate(template, Path(archive).read_bytes())
    assert valid, error
    assert "byoc" not in meta
    assert meta["name"] == template


@every_template
def test_every_component_takes_its_arguments(template: str) -> None:
    components = built(FOLDER / template)
    assert {FedPEFT, AdapterAggregator, AdapterPersistor, PeftExecutor} <= set(components)
    assert components[FedPEFT].round_plan.template == template


@every_template
def test_an_argument_nobody_knows_is_refused(template: str) -> None:
    for part in parts(FOLDER / template, "server") + parts(FOLDER / template, "client"):
        with pytest.raises((TypeError, ValueError, RuntimeError), match="lerning_rate"):
            Builder().build_component({**part, "args": {**part.get("args", {}), "lerning_rate": 1}})


@every_template
def test_every_knob_is_explained_on_its_own_line(template: str) -> None:
    for file in (FOLDER / template).rglob("config_fed_*.conf"):
        for number, line in enumerate(file.read_text().splitlines(), 1):
            knob = re.match(r"\s+(?:# )?(\w+) = ", line)
            if knob and knob[1] not in NOT_KNOBS:
                assert re.search(r" {2}# \S.{4,}$", line), f"{file.name}, line {number} explains nothing: {line}"


@every_template
def test_every_setting_is_a_knob(template: str) -> None:
    (controller,) = [p for p in parts(FOLDER / template, "server") if p["path"].endswith("FedPEFT")]
    plan = controller["args"]["plan"]
    labels = {"labels"} if plan["task"] == "causal_lm" else set()  # it has none
    assert set(plan) == set(RoundPlan.model_fields) - {"rest"} - labels  # rest follows from the merge rule
    assert set(plan["training"]) == set(TrainingSettings.model_fields)
    assert set(plan["evaluation"]) == set(EvaluationSettings.model_fields)
    assert set(plan["peft"]) == {"method", *methods[plan["peft"]["method"]].model_fields}


@every_template
def test_a_template_is_the_job_that_the_recipe_exports(template: str, tmp_path: Path) -> None:
    (controller,) = [p for p in parts(FOLDER / template, "server") if p["path"].endswith("FedPEFT")]
    asked = {k: v for k, v in controller["args"].items() if k not in ("aggregator", "min_responses", "persistor_id")}
    plan = asked.pop("plan")
    FedPEFTRecipe(template, min_sites=2, **asked, **plan).export(str(tmp_path))
    ours, theirs = built(FOLDER / template), built(tmp_path / template)
    assert set(ours) == set(theirs)
    for kind, component in ours.items():
        if kind.__module__.startswith("nvflare_fm."):
            assert arguments(component) == arguments(theirs[kind]), kind
    assert ours[FedPEFT].round_plan == theirs[FedPEFT].round_plan


def test_nvflare_lists_them_as_its_templates_and_creates_jobs_from_them(tmp_path: Path) -> None:
    def nvflare(*arguments: str) -> str:
        command = [sys.executable, "-m", "nvflare.cli", "job", *arguments]
        done = subprocess.run(
            command, env=os.environ | {"HOME": str(tmp_path)}, capture_output=True, text=True, check=True, cwd=tmp_path
        )
        return done.stdout

    listed = nvflare("list-templates", "-d", str(FOLDER))
    assert all(template[:20] in listed for template in TEMPLATES)
    job = tmp_path / "job"
    template, server = str(FOLDER / TEMPLATES[1]), f"{APP.name}/config_fed_server.conf"
    nvflare("create", "-j", str(job), "-w", template, "-f", server, "num_rounds=3")
    assert built(job)[FedPEFT].num_rounds == 3


def test_a_template_runs_in_the_simulator_as_it_stands(tmp_path: Path) -> None:
    """Only what a user must change is changed: the labels, and fewer and smaller rounds."""
    job, workspace = tmp_path / "job", tmp_path / "workspace"
    shutil.copytree(FOLDER / "lora_text_classification", job)
    server = job / APP / "config_fed_server.conf"
    changed = server.read_text()
    for knob, value in {"labels": '["calm", "ill", "well"]', "num_rounds": "2", "local_steps": "2"}.items():
        changed, times = re.subn(rf"(\s{knob} = )(\[[^]]*\]|\S+)", rf"\g<1>{value}", changed)
        assert times == 1, knob
    server.write_text(changed)
    model = tiny.save(tmp_path / "model", "bert")
    allow(workspace / "local")
    for shift, site in enumerate(("alder", "birch")):
        rows = tiny.jsonl(tmp_path / f"{site}.jsonl", tiny.rows("sequence_classification", shift=shift))
        write_site(workspace / "local" / f"{site}.fm_site.yaml", tiny.site(model, rows, limits={"threads": 1}))
    command = [sys.executable, "-m", "nvflare.private.fed.app.simulator.simulator", str(job), "-w", str(workspace)]
    done = subprocess.run([*command, "-c", "alder,birch", "-n", "2", "-t", "2"], capture_output=True, text=True)
    run = workspace / "server" / SimulatorConstants.JOB_NAME
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    adapter, manifest, provenance = read_adapter(run / "adapters" / "last")
    assert adapter
    assert provenance.round == 1
    assert manifest.labels == ("calm", "ill", "well")
