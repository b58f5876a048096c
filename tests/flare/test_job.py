"""A job is configuration only, says what the recipe said, and is refused while it loads where it cannot work."""

import json
from pathlib import Path
from typing import Any

import pytest
from nvflare.app_common.default_component_policy import DEFAULT_CLASS_ALLOW_LIST
from nvflare.fuel.utils.component_builder import ComponentBuilder

from nvflare_fm.at_rest import SUMS
from nvflare_fm.errors import ConfigError, ModelError
from nvflare_fm.export import folder as export
from nvflare_fm.flare import components
from nvflare_fm.flare.controller import FedPEFT
from nvflare_fm.flare.environments import write_site
from nvflare_fm.flare.executor import PeftExecutor
from nvflare_fm.flare.jobs import job, new_job
from nvflare_fm.flare.jobs.forecast import forecast
from nvflare_fm.flare.kit.allow_list import allow
from nvflare_fm.flare.persistor import AdapterPersistor
from nvflare_fm.flare.recipe import FedPEFTRecipe, SyntheticVotesRecipe
from nvflare_fm.job import templates
from nvflare_fm.site.offer.site_config import SiteConfig, load_site
from nvflare_fm.synthesis.candidates import Candidate, CandidateSet, Provenance, write
from tests.codes import refused

from .messages import MANIFEST, adapter


class Builder(ComponentBuilder):
    """NVFlare's own, as its server and clients use it."""

    def get_module_scanner(self) -> None:
        return None


def exported(folder: Path, **settings: Any) -> dict[str, Any]:
    """The configuration of each app, by its file in the job."""
    FedPEFTRecipe("job", **settings).export(str(folder))
    files = (folder / "job").glob("*/config/config_fed_*.json")
    return {str(file.relative_to(folder)): json.loads(file.read_text()) for file in files}


def built(apps: dict[str, Any]) -> list[Any]:
    """Every component of the job, made again from its configuration."""
    parts = [part for app in apps.values() for part in (*app["components"], *app.get("workflows", []))]
    parts += [entry["executor"] for app in apps.values() for entry in app.get("executors", [])]
    return [Builder().build_component(part) for part in parts]


def only(components: list[Any], kind: type) -> Any:
    (found,) = [c for c in components if isinstance(c, kind)]
    return found


def test_what_the_recipe_says_comes_out_of_the_job_again(tmp_path: Path) -> None:
    apps = exported(
        tmp_path,
        num_rounds=7,
        min_sites=2,
        merge="svd",
        weigh=["uniform"],
        sigma="A",
        deadline_s=60,
        grace_s=5,
        key_metric="accuracy",
        key_metric_mode="max",
        keep_rounds=True,
        sites={"alder": {"rank": 16}, "birch": {"data": "letters", "batch_size": 2}},
        processes=2,
        cross_site_evaluation=True,
        disk_offload=True,
        task="sequence_classification",
        labels=["calm", "ill"],
        data="records",
        peft={"method": "lora", "rank": 4},
        training={"local_steps": 9},
        seed=3,
    )
    components = built(apps)
    controller = only(components, FedPEFT)
    assert (controller.num_rounds, controller.min_responses, controller.deadline_s, controller.grace_s) == (7, 2, 60, 5)
    assert (controller.key_metric, controller.key_metric_mode, controller.disk_offload) == ("accuracy", "max", True)
    plan = controller.settled.plan
    assert (plan.data, plan.peft["rank"], plan.training.local_steps, plan.seed) == ("records", 4, 9, 3)
    how = controller.aggregator.aggregation
    assert (how.merge, how.weigh, how.sigma, how.seed) == ("svd", ("uniform",), "A", 3)
    assert controller.settled.global_rank == 16
    assert only(components, AdapterPersistor).keep_rounds
    executors = [c for c in components if isinstance(c, PeftExecutor)]
    said = sorted(str(e.overrides.model_dump(exclude_none=True)) for e in executors)
    assert said == ["{'batch_size': 2, 'data': 'letters'}", "{'rank': 16}"]
    assert all("torch.distributed.run" in e._command for e in executors)


@pytest.mark.parametrize(
    ("own", "more"), [({"lora_alpha": 7.0}, {}), ({"local_steps": 3}, {"normalize_steps": True}), ({"rank": 2}, {})]
)
def test_what_a_site_is_to_train_differently_must_be_listed_where_the_server_would_refuse_it(
    tmp_path: Path, own: dict[str, Any], more: dict[str, Any]
) -> None:
    exported(tmp_path, sites={"alder": own, "birch": {}}, **more)
    job.read_job(tmp_path / "job")
    (file,) = (tmp_path / "job").rglob("config_fed_server.json")
    config = json.loads(file.read_text())
    assert config["workflows"][0]["args"]["sites"].pop("alder") == own
    file.write_text(json.dumps(config))
    if "rank" in own:  # a lower rank is what any site may have
        job.read_job(tmp_path / "job")
    else:
        with pytest.raises(ConfigError) as raised:
            job.read_job(tmp_path / "job")
        assert raised.value.code == "site_not_listed"


def test_a_job_brings_no_code(tmp_path: Path) -> None:
    exported(tmp_path, sites={"alder": {}, "birch": {}})
    assert not list(tmp_path.rglob("custom"))
    assert not list(tmp_path.rglob("*.py"))


def test_an_initial_adapter_travels_inside_the_job(tmp_path: Path) -> None:
    folder = export.write_adapter(tmp_path / "somewhere", export.Saved(adapter(1), MANIFEST, 2))
    (folder / "notes.txt").write_text("for nobody else")
    apps = exported(tmp_path, initial_adapter=folder, resume=True)
    persistor = only(built(apps), AdapterPersistor)
    brought = next(tmp_path.rglob("config_fed_server.json")).parent / persistor.initial_adapter
    assert persistor.resume
    assert sorted(f.name for f in brought.iterdir()) == sorted([*export.NEEDED, SUMS])
    export.read_adapter(brought)


def test_an_initial_adapter_that_cannot_be_read_is_found_out_before_the_job_is_sent(tmp_path: Path) -> None:
    with refused("adapter_unreadable", ModelError):
        FedPEFTRecipe("job", initial_adapter=tmp_path)


@pytest.mark.parametrize("name", ["../secret", "/etc", "a/b", ".hidden", "..", "a\n", "a" * 65])
def test_a_job_cannot_make_the_server_read_a_path(name: str) -> None:
    with refused("wrong_setting", ConfigError, "persistor: initial_adapter"):
        AdapterPersistor(initial_adapter=name)


ROWS = CandidateSet(tuple(Candidate(text=f"text {i}", label="ab"[i % 2]) for i in range(4)), Provenance())
CLASSES: dict[str, Any] = {"task": "sequence_classification", "labels": ["a", "b"]}


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    (tmp_path / "made.jsonl").write_bytes(write(ROWS))
    return tmp_path / "made.jsonl"


@pytest.mark.parametrize("sites", [None, {"alder": {}, "birch": {"rank": 2}}])
def test_synthetic_rows_travel_inside_the_job_to_the_server_and_every_site(
    tmp_path: Path, rows: Path, sites: Any
) -> None:
    settings = CLASSES | {"synthetic": {"share": 0.3}, "sites": sites}
    FedPEFTRecipe("trains", synthetic_rows=rows, **settings).export(str(tmp_path))
    asked = CLASSES | {"sites": sites, "privacy": {"epsilon": 2.0}}
    SyntheticVotesRecipe("votes", rows, per_label=3, **asked).export(str(tmp_path))
    for name in ("trains", "votes"):
        apps = [file.parent for file in (tmp_path / name).rglob("config_fed_*.json")]
        assert {file.parent for file in (tmp_path / name).rglob("synthetic.jsonl")} == {*apps}
        made = job.read_job(tmp_path / name)
        assert made.plan.synthetic.digest == ROWS.digest
        assert made.plan.votes == (4 if name == "votes" else 0)
        for break_ in (lambda file: file.write_bytes(rows.read_bytes().replace(b"text 1", b"text 9")), Path.unlink):
            break_(apps[0] / "synthetic.jsonl")
            with pytest.raises(ConfigError) as error:
                job.read_job(tmp_path / name)
            assert error.value.code == ("no_synthetic_rows" if break_ is Path.unlink else "other_synthetic_rows")


def test_a_template_takes_synthetic_rows_and_a_vote_needs_them(tmp_path: Path, rows: Path) -> None:
    mixed, votes = templates.load("lora_mixed_hardware"), templates.load("synthetic_votes")
    ranks = {"sites.a.rank": "4", "sites.b.rank": "2"}
    made = new_job.write_job(tmp_path / "mixed", mixed, {"synthetic": str(rows), "share": "0.2", **ranks})
    assert (made.plan.synthetic.digest, made.plan.synthetic.share) == (ROWS.digest, 0.2)
    assert new_job.write_job(tmp_path / "votes", votes, {"synthetic": str(rows), "labels": "a,b"}).plan.votes == 4
    assert forecast(tmp_path / "votes", None, {}, False).notes[-1].startswith("4 candidates come with the job")
    for code, given in {
        "no_candidates": {"labels": "a,b"},
        "synthetic_labels": {"synthetic": str(rows)},
        "no_synthetic_rows": {"synthetic": str(tmp_path)},
    }.items():
        with refused(code, ConfigError):
            new_job.write_job(tmp_path / code, votes, given)
        assert not (tmp_path / code).exists()


def test_resuming_needs_something_to_resume_from() -> None:
    with refused("no_adapter", ConfigError, "initial_adapter"):
        AdapterPersistor(resume=True)


@pytest.mark.parametrize(
    ("settings", "code", "named"),
    [
        ({"num_rounds": 0}, "wrong_setting", "controller: num_rounds"),
        ({"min_responses": 0}, "wrong_setting", "controller: min_responses"),
        ({"deadline_s": -1}, "wrong_setting", "controller: deadline_s"),
        ({"grace_s": float("inf")}, "wrong_setting", "controller: grace_s"),
        ({"num_rounds": 10**9}, "wrong_setting", "controller: num_rounds"),
        ({"num_rounds": True}, "wrong_setting", "controller: num_rounds"),
        ({"num_rounds": "3"}, "wrong_setting", "controller: num_rounds"),
        ({"disk_offload": 1}, "wrong_setting", "controller: disk_offload"),
        ({"persistor_id": "a/b"}, "wrong_setting", "controller: persistor_id"),
        ({"aggregator": {"merge": "exact"}}, "wrong_setting", "controller: aggregator"),
        ({"plan": "task"}, "wrong_setting", "controller: plan"),
        ({"key_metric_mode": "least"}, "wrong_setting", "key_metric_mode"),
        ({"plan": {"lerning_rate": 1}}, "wrong_setting", "lerning_rate"),
        ({"plan": {"training": {"lerning_rate": 1}}}, "wrong_setting", '"learning_rate"'),
        ({"plan": {"peft": {"method": "lorra"}}}, "unknown_name", '"lora"'),
        ({"plan": {"rest": "none"}}, "wrong_setting", "rest"),
    ],
)
def test_a_job_that_cannot_work_is_refused_while_it_loads(settings: dict[str, Any], code: str, named: str) -> None:
    with refused(code, ConfigError, named):
        FedPEFT(**settings)


def test_a_merge_rule_that_needs_equal_ranks_is_refused_where_they_differ() -> None:
    with refused("one_rank", ConfigError, "alder", "factor_mean"):
        FedPEFTRecipe("job", merge="factor_mean", sites={"alder": {"rank": 2}}, peft={"method": "lora", "rank": 4})


def test_a_site_setting_nobody_knows_is_refused() -> None:
    with refused("wrong_setting", ConfigError, "alder", '"rank"', "rnk"):
        FedPEFTRecipe("job", sites={"alder": {"rnk": 2}})


@pytest.mark.parametrize(
    "settings",
    [
        {"settings": {"quantization": "nf3"}},
        {"settings": {"rank": 0}},
        {"settings": "rank"},
        {"processes": 0},
        {"processes": "2; rm"},
        {"settings": {"batch_size": "${secret:HOME}"}},
    ],
)
def test_a_job_cannot_smuggle_anything_into_the_trainers_command(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        PeftExecutor(**settings)


@pytest.mark.parametrize("name", ["notes", "${secret:HOME}", "$${secret:file:/etc/passwd}", "--help", "/srv/other"])
def test_the_command_is_fixed_whatever_the_job_says(name: str) -> None:
    argv = PeftExecutor(settings={"rank": 4, "data": name})._argv("/site/local/fm_site.yaml", "/site/job", "/site/app")
    assert argv[1:] == [
        *("-m", "nvflare_fm.flare.trainer", "--site-file", "/site/local/fm_site.yaml", "--job-folder", "/site/job"),
        *("--config-folder", "/site/app"),
    ]


def test_allowing_the_package_keeps_nvflares_own_list(tmp_path: Path) -> None:
    resources = json.loads(allow(tmp_path).read_text())
    assert resources["class_allow_list"] == [*DEFAULT_CLASS_ALLOW_LIST, *components.OURS]


def test_allowing_the_package_keeps_what_the_site_has_set_and_is_harmless_twice(tmp_path: Path) -> None:
    own = {"format_version": 2, "components": [{"id": "x"}], "class_allow_list": ["a.B"]}
    (tmp_path / "resources.json").write_text(json.dumps(own))
    allow(tmp_path)
    resources = json.loads(allow(tmp_path).read_text())
    assert resources == own | {"class_allow_list": ["a.B", *components.OURS]}


def test_a_kit_that_has_only_its_defaults_keeps_them(tmp_path: Path) -> None:
    (tmp_path / "resources.json.default").write_text(json.dumps({"format_version": 2, "client": {"retry": 3}}))
    assert json.loads(allow(tmp_path).read_text())["client"] == {"retry": 3}


def test_a_site_file_means_the_same_wherever_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    site = SiteConfig.read(
        {
            "models": {"base": {"path": "models/base"}, "hub": {"hub_id": "a/b", "revision": "c" * 40}},
            "data": {"notes": {"train": "n.jsonl"}, "kept": {"train": "k.jsonl", "folder": "data"}},
            "limits": {"threads": 0},
        },
        "test",
    )
    write_site(tmp_path / "elsewhere" / "fm_site.yaml", site, threads=2)
    read = load_site(tmp_path / "elsewhere" / "fm_site.yaml")
    assert read.model("base").path == str(tmp_path / "models" / "base")
    assert read.data_set("notes").train == str(tmp_path / "n.jsonl")
    assert read.limits.threads == 2
    (tmp_path / "fm_site.yaml").write_text((tmp_path / "elsewhere" / "fm_site.yaml").read_text())
    assert load_site(tmp_path / "fm_site.yaml") == read
