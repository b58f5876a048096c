"""The job templates: submit-ready, without code, every setting explained and read, the same job as the recipe's."""

import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any
from zipfile import ZipFile

import pytest
from nvflare.app_common.workflows.global_model_eval import GlobalModelEval
from nvflare.fuel.utils.config_factory import ConfigFactory
from nvflare.private.fed.server.job_meta_validator import JobMetaValidator
from pydantic import Field
from pyhocon import ConfigFactory as Hocon
from typer.testing import CliRunner

from nvflare_fm.adapter import RoundTask
from nvflare_fm.cli import app
from nvflare_fm.config import Aggregation, RoundPlan, SiteOverrides, TrainingSettings
from nvflare_fm.errors import ConfigError
from nvflare_fm.export.folder import Saved, read_adapter, write_adapter
from nvflare_fm.flare import aggregator as aggregator_module
from nvflare_fm.flare import controller as controller_module
from nvflare_fm.flare import executor as executor_module
from nvflare_fm.flare import recipe as recipe_module
from nvflare_fm.flare.controller import FedPEFT
from nvflare_fm.flare.environments import write_site
from nvflare_fm.flare.executor import PeftExecutor
from nvflare_fm.flare.jobs import render_template
from nvflare_fm.flare.jobs.simulate_job import prepare_simulation
from nvflare_fm.flare.locator import AdapterLocator
from nvflare_fm.flare.persistor import AdapterPersistor
from nvflare_fm.flare.recipe import EvaluateAdapterRecipe, FedPEFTRecipe, SyntheticVotesRecipe
from nvflare_fm.job import templates
from nvflare_fm.job.synthetic import read_rows
from nvflare_fm.synthesis.candidates import Candidate, CandidateSet, Provenance, write
from tests.codes import refused
from tests.flare.messages import MANIFEST, adapter
from tests.flare.test_job import Builder
from tests.site import tiny

FOLDER = Path(__file__).parents[1] / "job_templates"
SOURCES = render_template.sources()
TEMPLATES = list(SOURCES)
TRAINING = [name for name, source in SOURCES.items() if not {"measurement", "votes"} & {*source}]
FROM_ADAPTER = {name for name, source in SOURCES.items() if "measurement" in source or "initial_adapter" in source}
NOT_SETTINGS = {"path", "id", "format_version", "tasks", "executors", "workflows", "components"}
NOT_SETTINGS |= {"task_data_filters", "task_result_filters"}
every_template = pytest.mark.parametrize("template", TEMPLATES)
every_training = pytest.mark.parametrize("template", TRAINING)


def parts(folder: Path, side: str) -> list[dict[str, Any]]:
    """What one side of a job builds: workflows, executors, components; of all its apps."""
    found = []
    for file in sorted(folder.rglob(f"config_fed_{side}.*")):
        config = ConfigFactory.load_config(str(file)).to_dict()
        executors = [entry["executor"] for entry in config.get("executors", [])]
        found += [*config.get("workflows", []), *executors, *config["components"]]
    return found


def built(folder: Path) -> list[Any]:
    made = [Builder().build_component(part) for side in ("server", "client") for part in parts(folder, side)]
    return [*made, *(c.aggregator for c in made if isinstance(c, FedPEFT))]


def only(kind: type, components: list[Any]) -> Any:
    (found,) = [c for c in components if type(c) is kind]
    return found


def said(component: Any) -> str:
    """What it is and was made with, defaults written out."""
    names = [name for name in inspect.signature(type(component).__init__).parameters if name != "self"]
    ours = type(component).__module__.startswith("nvflare_fm.")
    held = {
        "plan": "settled" if hasattr(component, "settled") else "asked",
        "measurement": "asks",
        "settings": "aggregation" if hasattr(component, "aggregation") else "overrides",
    }
    values = {name: getattr(component, held.get(name, name)) for name in names if ours and name != "aggregator"}
    return f"{type(component).__name__} {values}"


def typed(*words: Any) -> str:
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == 0, f"{done.output} {done.exception}"
    return done.output


def test_every_folder_here_is_a_template_under_test() -> None:
    assert sorted(f.name for f in FOLDER.iterdir() if f.is_dir()) == TEMPLATES == templates.names()


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
        assert any(name.endswith("/config/config_fed_server.conf") for name in job.namelist())
    valid, error, meta = JobMetaValidator().validate(template, Path(archive).read_bytes())
    assert valid, error
    assert "byoc" not in meta
    assert meta["name"] == template


@every_training
def test_every_component_takes_its_arguments(template: str) -> None:
    assert only(FedPEFT, built(FOLDER / template)).settled.plan.template == template


@every_template
def test_an_argument_nobody_knows_is_refused(template: str) -> None:
    for part in parts(FOLDER / template, "server") + parts(FOLDER / template, "client"):
        with pytest.raises((TypeError, ValueError, RuntimeError, ConfigError)) as caught:
            Builder().build_component({**part, "args": {**part.get("args", {}), "lerning_rate": 1}})
        assert "lerning_rate" in str(caught.value)


@every_template
def test_every_setting_is_explained_on_its_own_line(template: str) -> None:
    for file in (FOLDER / template).rglob("config_fed_*.conf"):
        for number, line in enumerate(file.read_text().splitlines(), 1):
            setting = re.match(r"\s+(?:# )?(\w+) = ", line)
            if setting and setting[1] not in NOT_SETTINGS:
                assert re.search(r" {2}# \S.{4,}$", line), f"{file.name}, line {number} explains nothing: {line}"


@every_template
def test_a_template_is_what_its_source_says_now(template: str) -> None:
    there = {f.relative_to(FOLDER / template).as_posix(): f for f in (FOLDER / template).rglob("*") if f.is_file()}
    rendered = render_template.render(template, SOURCES[template])
    assert {name: file.read_text("utf-8") for name, file in there.items()} == rendered, "run: make templates"


def test_a_setting_that_a_source_does_not_know_is_refused_with_the_nearest() -> None:
    for wrong in ({"num_ronds": 3}, {"training": {"lerning_rate": 1}}, {"sites": {"a": {"rnk": 2}}}):
        with refused("wrong_setting", ConfigError, '"') as caught:
            render_template.render("mine", {**SOURCES["lora_text_classification"], **wrong})
        assert caught.value.code == "wrong_setting"


class MoreTraining(TrainingSettings):
    noise: float = Field(0.25, ge=0, le=1, description="Noise on the inputs, 0 to 1. More in the paper.")


class MorePlan(RoundPlan):
    training: MoreTraining = MoreTraining()
    hurry: bool = Field(True, description="Hurry up.")


class MoreAggregation(Aggregation):
    trim: int = Field(7, ge=0, le=9, description="Sites to leave out.")


class MoreOverrides(SiteOverrides):
    trim: int | None = Field(None, ge=0, le=9, description="Rows to leave out.", examples=[5])


def test_a_setting_costs_one_field(monkeypatch: pytest.MonkeyPatch, writer: ModuleType) -> None:
    """With nothing but a field, it is an argument of recipe and components, and in every template and the reference."""
    for module in (render_template, recipe_module, aggregator_module, executor_module, controller_module, writer):
        for more in (MorePlan, MoreAggregation, MoreOverrides, MoreTraining):
            name = more.__mro__[1].__name__
            if hasattr(module, name):
                monkeypatch.setattr(module, name, more)
    plan, how, _ = recipe_module.sorted_out({"trim": 3, "hurry": False})
    assert (plan, how) == ({"hurry": False}, {"trim": 3})
    assert aggregator_module.AdapterAggregator({"trim": 3}).aggregation.trim == 3
    assert PeftExecutor(settings={"trim": 3}).overrides.trim == 3
    source = SOURCES["lora_text_classification"]
    files = render_template.render("mine", {**source, "training": {"noise": 0.5}, "trim": 3})
    server, client = (files[f"config/config/config_fed_{side}.conf"] for side in ("server", "client"))
    assert re.search(r"^ +noise = 0\.5 +# Noise on the inputs, 0 to 1$", server, re.MULTILINE)
    assert re.search(r"^ +hurry = true +# Hurry up$", server, re.MULTILINE)
    assert re.search(r"^ +trim = 3 +# Sites to leave out$", server, re.MULTILINE)
    assert re.search(r"^ +# trim = 5 +# Rows to leave out$", client, re.MULTILINE)
    reference = writer.settings()
    for row in ("| `noise` | number, ≥ 0, ≤ 1 | `0.25` | Noise", "| `hurry` |", "`7` | Sites", "| Rows to leave out."):
        assert row in reference


def given(source: dict[str, Any]) -> dict[str, Any]:
    """What a source gives the recipe of its kind, under its arguments' names."""
    own = ("description", "about", "sites", "initial_adapter", "measurement")
    return {name: value for name, value in source.items() if name not in own}


def recipe(template: str, brought: Path) -> FedPEFTRecipe | EvaluateAdapterRecipe | SyntheticVotesRecipe:
    """The recipe that says in Python what the template's source says."""
    source = SOURCES[template]
    if "votes" in source:
        rows = candidates(brought.with_name("made.jsonl"), source["votes"]["labels"])
        return SyntheticVotesRecipe(template, rows, min_sites=2, **source["votes"], template=template)
    if "measurement" in source:
        return EvaluateAdapterRecipe(template, brought, min_sites=2, **source["measurement"], template=template)
    sites = {name: {k: v for k, v in said.items() if k != "about"} for name, said in source.get("sites", {}).items()}
    initial = {"initial_adapter": brought} if template in FROM_ADAPTER else {}
    return FedPEFTRecipe(template, min_sites=2, sites=sites, template=template, **initial, **given(source))


@every_template
def test_a_template_is_the_job_that_the_recipe_exports(template: str, tmp_path: Path) -> None:
    brought = write_adapter(tmp_path / "adapter", Saved(adapter(1), MANIFEST))
    recipe(template, brought).export(str(tmp_path))
    ours, theirs = built(FOLDER / template), built(tmp_path / template)
    named = "|".join(read_rows(file).digest for file in tmp_path.glob("made.jsonl")) or "-"
    assert sorted(map(said, ours)) == sorted(re.sub(f"digest='{named}'", "digest=''", said(each)) for each in theirs)
    served = [tasks_of(folder) for folder in (FOLDER / template, tmp_path / template)]
    assert served[0] == served[1]
    carried = sorted(f.relative_to(tmp_path / template).parent.name for f in (tmp_path / template).rglob("adapter_*"))
    assert carried == (["initial_adapter"] * 2 if template in FROM_ADAPTER else [])


def tasks_of(folder: Path) -> list[list[str]]:
    files = sorted(folder.rglob("config_fed_client.*"))
    return [ConfigFactory.load_config(str(file)).to_dict()["executors"][0]["tasks"] for file in files]


def test_an_evaluation_serves_no_training() -> None:
    assert tasks_of(FOLDER / "evaluate_adapter") == [["validate"]]
    kinds = {type(component) for component in built(FOLDER / "evaluate_adapter")}
    assert FedPEFT not in kinds
    assert {GlobalModelEval, AdapterPersistor, AdapterLocator} <= kinds


@pytest.mark.parametrize("package", ["tensorboard", "mlflow"])
@every_training
def test_the_tracker_that_is_behind_a_hash_is_one_that_nvflare_can_build(template: str, package: str) -> None:
    """With the # of its five lines taken away, each by itself."""
    (server,) = (FOLDER / template).rglob("config_fed_server.conf")
    receiver = {"tensorboard": "TBAnalyticsReceiver", "mlflow": "MLflowReceiver"}[package]
    (block,) = [b for b in re.findall(r"(?:    # [ {}].*\n){5}", server.read_text()) if receiver in b]
    config = Hocon.parse_string(server.read_text().replace(block, block.replace("    # ", "    ")))
    (part,) = [c for c in config["components"] if c["id"] == "receiver"]
    assert part["path"].endswith(receiver)
    if package == "tensorboard":
        assert Builder().build_component(part.as_plain_ordered_dict()).tb_folder == "tb_events"


def test_nvflare_lists_them_as_its_templates_and_creates_jobs_from_them(tmp_path: Path) -> None:
    def nvflare(*arguments: str) -> str:
        command = [sys.executable, "-m", "nvflare.cli", "job", *arguments]
        done = subprocess.run(
            command, env=os.environ | {"HOME": str(tmp_path)}, capture_output=True, text=True, check=True, cwd=tmp_path
        )
        return done.stdout

    listed = nvflare("list-templates", "-d", str(FOLDER))
    assert all(template[:20] in listed for template in TEMPLATES)
    job, template = tmp_path / "job", str(FOLDER / "lora_text_classification")
    nvflare("create", "-j", str(job), "-w", template, "-f", "config/config_fed_server.conf", "num_rounds=3")
    assert only(FedPEFT, built(job)).num_rounds == 3


def test_a_wheel_has_them_too(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=FOLDER.parent, capture_output=True, check=True)
    with ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        wheel.extractall(tmp_path / "installed")
    code = "from nvflare_fm.job import templates; print(templates.folder(), *templates.names())"
    installed = os.environ | {"PYTHONPATH": str(tmp_path / "installed")}
    done = subprocess.run([sys.executable, "-c", code], env=installed, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.split() == [str(tmp_path / "installed" / "nvflare_fm" / "job_templates"), *TEMPLATES]


# --- each of them run, as `nvflare-fm new` makes it

SMALL = ["num_rounds=2", "local_steps=2", "training.batch_size=4", "gradient_accumulation_steps=1", "max_length=48"]
CHANGED = {
    "continue_from_adapter": ["num_rounds=1"],
    "lora_mixed_hardware": [
        "sites.alder.rank=2",
        "sites.alder.quantization=fp32",
        "sites.birch.batch_size=2",
        "sites.birch.processes=2",
    ],
    "lora_text_classification": ["labels=calm,ill,well"],
    "lora_token_classification": ["labels=[calm, ill, well]"],
    "synthetic_votes": ["labels=calm,ill,well", "quantization=fp32", "chance=0.4", "privacy.delta=1e-3"],
    "private_text_classification": ["labels=calm,ill,well", "privacy.delta=1e-3"],
}
SIMULATED = "lora_mixed_hardware"  # in every run of the suite; the others by make test-all


def simulated(job: Path, output: Path, model: Path, task: str, sites: Sequence[str]) -> Path:
    """Runs a job folder as `nvflare-fm simulate` does; the server's folder of it. At oak, nothing is quantized."""
    files = {n: tiny.jsonl(output.parent / f"{n}.jsonl", tiny.rows(task, shift=i)) for i, n in enumerate(sites)}
    if "oak" in sites:
        _, run = prepare_simulation(job, model, files, {}, output / job.name)
        offer = tiny.site(model, files["oak"], limits={"threads": 1, "quantizations": ["fp32"]})
        write_site(run.workspace / "local" / "oak.fm_site.yaml", offer)
        assert list(run.run()) == []  # a round is one that trains
        return run.results
    told = typed("simulate", job, "--model", model, "-o", output, *(f"--data={s}={f}" for s, f in files.items()))
    shown = told.splitlines()
    assert shown[0] == f"{job.name}: 2 sites (alder, birch); they start within a minute"
    places = [line.split()[0] for line in shown[-5:]]
    if "chosen" in places:
        assert re.match(r"2 of 2 sites voted, \d+ candidates are chosen", shown[1]), told
    else:
        assert shown[1].startswith("after 0 of ")
        assert re.match(r"after (\d) of \1 rounds: .*loss \d", shown[-6]), told
        assert places == ["adapter", "adapter", "results", "log", "took"]
    assert "INFO" not in told
    assert "kernels" not in told + (output / f"{job.name}.log").read_text()  # bitsandbytes suggests to install them
    return output / job.name / "server" / "simulate_job"


def candidates(file: Path, labels: Sequence[str], each: int = 4) -> Path:
    """A file of candidates, for each label some."""
    rows = [
        Candidate(text=f"someone is {label}, for the {i}th time", label=label) for label in labels for i in range(each)
    ]
    file.write_bytes(write(CandidateSet(tuple(rows), Provenance(generator="made-up"))))
    return file


def earlier(folder: Path, model: Path) -> Path:
    """An adapter that a site has trained before."""
    worker = tiny.worker(folder, model, "causal_lm")
    plan = tiny.plan(quantization="nf4", training={"local_steps": 8, "batch_size": 4, "learning_rate": 1e-2})
    worker.train(RoundTask(plan))
    trained, manifest = worker.submit()
    return write_adapter(folder / "earlier", Saved(trained, manifest, 3, plan))


@pytest.mark.parametrize(
    "template", [pytest.param(name, marks=[] if name == SIMULATED else [pytest.mark.slow]) for name in TEMPLATES]
)
def test_a_template_runs_in_the_simulator_as_it_stands(template: str, tmp_path: Path) -> None:
    """Only what a user must change is changed: labels, sites, the adapter, and fewer and smaller steps."""
    votes = "votes" in SOURCES[template]
    task = (SOURCES[template]["votes"] if votes else SOURCES[template]).get("task", "causal_lm")
    model = tiny.save(tmp_path / "model", "llama" if task == "causal_lm" else "bert")
    brings = [f"adapter={earlier(tmp_path, model)}"] if template in FROM_ADAPTER else []
    if votes or template == SIMULATED:
        brings += [f"synthetic={candidates(tmp_path / 'made.jsonl', tiny.LABELS)}"]
    small = SMALL if template in TRAINING else []
    typed("new", template, "-o", tmp_path / "job", *small, *CHANGED.get(template, []), *brings)
    sites = ["alder", "birch", *(["oak"] if template == "evaluate_adapter" else [])]
    run = simulated(tmp_path / "job", tmp_path / "runs", model, task, sites)
    if template == "evaluate_adapter":
        assert_measured(run)
        return
    if votes:
        assert_chosen(run)
        return
    saved = read_adapter(run / "adapters" / "last")
    rounds = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
    assert saved.adapter
    assert saved.round == len([line for line in rounds if line["round"] < line["total_rounds"]]) - 1
    assert saved.manifest.labels == (() if task == "causal_lm" else tiny.LABELS)
    assert (rounds[0]["bytes_down"] > 0) == (template in FROM_ADAPTER)
    if template == "lora_mixed_hardware":
        used = {site: (said["rank"], said["quantization"]) for site, said in rounds[0]["sites"].items()}
        assert used == {"alder": (2, "fp32"), "birch": (16, "nf4")}
        added = (tmp_path / "runs" / "job.log").read_text().count("of 12 synthetic rows are added to")
        assert added == 3  # at alder, and in both processes of birch
        assert rounds[0]["sites"]["birch"]["steps"] == 2  # its two processes take them together


def assert_chosen(run: Path) -> None:
    """Some of the candidates, with their votes and where they come from."""
    chosen, (line,) = read_rows(run / "synthetic.jsonl"), (run / "rounds.jsonl").read_text().splitlines()
    assert 0 < len(chosen.rows) < 12
    assert json.loads(line)["chosen"] == len(chosen.rows)
    assert chosen.provenance.epsilon == 4.0
    assert chosen.provenance.parent
    assert all(row.votes is not None and row.votes > 0 for row in chosen.rows)


def assert_measured(run: Path) -> None:
    """At two sites; the third refuses, and says why where the scientist can read it."""
    results = json.loads((run / "cross_site_val" / "cross_val_results.json").read_text())
    assert all(list(owners) == ["SRV_initial_adapter"] for owners in results.values())
    measured = {site: owners["SRV_initial_adapter"] for site, owners in results.items()}
    assert 0 < measured["alder"]["loss"] < 5
    assert 0 < measured["birch"]["loss"] < 5
    assert measured["oak"] == {}
    refused = json.loads((run / "cross_site_val" / "cross_val_refused.json").read_text())
    assert list(refused) == ["oak"]
    assert "quantization is not among ['fp32']" in refused["oak"]["SRV_initial_adapter"]
    assert not (run / "adapters").exists()
    assert not (run / "rounds.jsonl").exists()
