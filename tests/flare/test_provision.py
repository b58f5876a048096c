"""Startup kits as a hospital gets them: this package allowed and nothing else changed, and taken out again."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from nvflare.apis.workspace import Workspace
from nvflare.app_common.default_component_policy import DEFAULT_CLASS_ALLOW_LIST
from nvflare.lighter.constants import CtxKey
from nvflare.lighter.prov_utils import prepare_builders
from nvflare.lighter.provision import prepare_project
from nvflare.lighter.provisioner import Provisioner

from nvflare_fm.errors import ConfigError
from nvflare_fm.flare import allow_list, components, job_check
from nvflare_fm.flare.provision import allow, remove, without_byoc
from nvflare_fm.flare.recovery import JobRecovery
from nvflare_fm.flare.restarted import RestartedSites
from nvflare_fm.site.site_config import SiteConfig, load_site
from nvflare_fm.site.site_file import render
from tests.deployment.system import EXAMPLE, LEAD, PROJECT, SERVER, project, provision, provision_file
from tests.flare.test_job import Builder

SAID: dict[str, Any] = {
    "models": {"base": {"path": "/srv/models/llama", "fingerprint": "abc"}},
    "data": {"notes": {"folder": "/srv/data", "train": "notes.jsonl", "columns": {"text": "note"}}},
    "limits": {"max_rank": 8, "quantizations": ["nf4"]},
    "welcome": {"orgs": ["company"]},
}
SITE, SERVERS = [*components.NVFLARE_SITE, *components.SITE], [*components.NVFLARE_SERVER, *components.SERVER]


def resources(kit: Path) -> dict[str, Any]:
    own = kit / "local" / "resources.json"
    return json.loads((own if own.exists() else own.with_suffix(".json.default")).read_text())


def quickly(folder: Path, described: dict[str, Any]) -> Path:
    """`nvflare provision` without starting a process for it."""
    asked = yaml.safe_load(yaml.safe_dump(described))
    done = Provisioner(str(folder), prepare_builders(asked)).provision(prepare_project(asked))
    assert not done.get(CtxKey.BUILD_ERROR), done.get_errors()
    return Path(done.get_result_location())


@pytest.fixture(scope="module")
def described() -> dict[str, Any]:
    return project(8002, {"clinic-a": SAID, "clinic-b": {}})


@pytest.fixture(scope="module")
def kits(tmp_path_factory: pytest.TempPathFactory, described: dict[str, Any]) -> Path:
    return provision(tmp_path_factory.mktemp("project"), described)


HOSPITALS = ("north", "lake", "valley")


@pytest.fixture(scope="module")
def example_kits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the example as it stands."""
    file = Path(shutil.copy(EXAMPLE, tmp_path_factory.mktemp("example")))
    return provision_file(file, PROJECT)


def test_the_example_project_makes_kits_for_a_company_and_three_hospitals_with_their_it(example_kits: Path):
    its = [f"it@{hospital}.example" for hospital in HOSPITALS]
    assert {kit.name for kit in example_kits.iterdir()} == {SERVER, LEAD, "admin@company.example", *HOSPITALS, *its}
    for name in (SERVER, *HOSPITALS):
        assert resources(example_kits / name)["class_allow_list"] == (SERVERS if name == SERVER else SITE)
        assert job_check.installed(example_kits / name / "local", is_site=name != SERVER)
        rules = json.loads((example_kits / name / "local" / "authorization.json.default").read_text())["permissions"]
        assert {rights["byoc"] for rights in rules.values()} == {"none"}
        assert rules["org_admin"]["operate"] == "o:site"


@pytest.mark.parametrize("hospital", HOSPITALS)
def test_each_hospital_of_the_example_has_its_site_file_and_a_readme(example_kits: Path, hospital: str):
    said = yaml.safe_load(EXAMPLE.read_text())
    (asked,) = [p["fm_site"] for p in said["participants"] if p["name"] == hospital]
    site, given = load_site(example_kits / hospital / "local" / "fm_site.yaml"), SiteConfig.read(asked, "example")
    assert (site.models, site.limits) == (given.models, given.limits)
    assert (site.privacy, site.welcome) == (given.privacy, given.welcome)
    assert site.data["notes"].train == f"/srv/{hospital}/notes/train.jsonl"
    assert resources(example_kits / hospital)["allow_log_streaming"] is False
    assert "must not be installed" in (example_kits / hospital / "readme_nvflare_fm.txt").read_text()


def test_server_and_sites_allow_our_components_and_what_these_need_of_nvflare(kits: Path):
    for name, listed in {SERVER: SERVERS, "clinic-a": SITE, "clinic-b": SITE}.items():
        assert resources(kits / name)["class_allow_list"] == listed
        assert resources(kits / name)["class_list_enforcement_mode"] == "enforce"


def test_a_project_that_does_not_ask_for_only_ours_keeps_nvflares_list(tmp_path: Path, described: dict[str, Any]):
    asked = yaml.safe_load(yaml.safe_dump(described))
    (builder,) = [b for b in asked["builders"] if "nvflare_fm" in b["path"]]
    del builder["args"]["only_ours"]
    kits = quickly(tmp_path, asked)
    assert resources(kits / SERVER)["class_allow_list"] == [*DEFAULT_CLASS_ALLOW_LIST, *components.SERVER]
    assert resources(kits / "clinic-a")["class_allow_list"] == [*DEFAULT_CLASS_ALLOW_LIST, *components.SITE]
    assert "besides, 87 of NVFlare's" in (kits / "clinic-a" / "readme_nvflare_fm.txt").read_text()


def test_what_sees_to_jobs_after_a_kill_is_part_of_the_servers_own_process_and_of_no_other(kits: Path):
    workspace = Workspace(str(kits / SERVER), "server")
    parent, job = ({*workspace.get_config_files_for_startup(True, for_job)} for for_job in (False, True))
    (file,) = parent - job
    built = [Builder().build_component(part) for part in json.loads(Path(file).read_text())["components"]]
    assert [type(component) for component in built] == [JobRecovery, RestartedSites]
    assert "Recovery" not in (kits / "clinic-a" / "local" / job_check.FILE).read_text()


def test_the_site_file_says_what_project_yml_says(kits: Path):
    file = kits / "clinic-a" / "local" / "fm_site.yaml"
    assert load_site(file) == SiteConfig.read(SAID | {"data": {"notes": SAID["data"]["notes"] | {
        "train": "/srv/data/notes.jsonl"}}}, "test")  # fmt: skip
    assert load_site(kits / "clinic-b" / "local" / "fm_site.yaml") == SiteConfig()
    assert not (kits / "clinic-a" / "local" / "fm_secret").exists()  # whoever makes the kits would know it


def test_the_server_is_told_limits_and_neither_aliases_nor_paths(kits: Path):
    told = resources(kits / "clinic-a")["nvflare_fm"]
    assert (told["max_rank"], told["quantizations"]) == (8, ["nf4"])
    assert not any(word in json.dumps(told) for word in ("srv", "notes", "base", "company"))


def test_error_logs_stay_at_the_site_unless_project_yml_says_otherwise(kits: Path, tmp_path: Path, described: Any):
    assert resources(kits / "clinic-a")["allow_log_streaming"] is False
    asked = yaml.safe_load(yaml.safe_dump(described))
    asked["participants"][1]["allow_log_streaming"] = True
    open_kits = quickly(tmp_path, asked)
    assert resources(open_kits / "clinic-a")["allow_log_streaming"] is True
    assert (
        "allow_log_streaming is on: they go to the server"
        in (open_kits / "clinic-a" / "readme_nvflare_fm.txt").read_text()
    )


def test_no_role_may_bring_code_and_every_other_right_is_as_before(kits: Path):
    for name in (SERVER, "clinic-a"):
        rules = json.loads((kits / name / "local" / "authorization.json.default").read_text())["permissions"]
        assert {role: rights["byoc"] for role, rights in rules.items()} == dict.fromkeys(rules, "none")
        assert rules["lead"]["submit_job"] == rules["project_admin"]["submit_job"] == "any"
    assert without_byoc({"permissions": {"all": "any", "few": {"view": "o:site"}}}) == {
        "permissions": {"all": {"view": "any", "byoc": "none"}, "few": {"view": "o:site", "byoc": "none"}}
    }


def test_a_client_can_be_added_later_and_the_others_kits_come_out_as_before(kits: Path, described: dict[str, Any]):
    folder = kits.parents[2]
    late = {"name": "clinic-d", "org": "clinic_d", "fm_site": {"limits": {"max_rank": 2}}}
    (folder / "late.yml").write_text(yaml.safe_dump(late))
    newer = provision(folder, described, "--add-client", "late.yml")
    assert newer != kits
    assert load_site(newer / "clinic-d" / "local" / "fm_site.yaml").limits.max_rank == 2
    for file in ("local/fm_site.yaml", "local/resources.json.default", "readme_nvflare_fm.txt"):
        assert (newer / "clinic-a" / file).read_text() == (kits / "clinic-a" / file).read_text()


def test_a_faulty_project_is_refused_by_name(tmp_path: Path, described: dict[str, Any]):
    faulty = project(8002, {"clinic-a": {"limits": {"max_rnak": 4}}})
    with pytest.raises(AssertionError, match=r'fm_site of clinic-a: unknown setting .*did you mean "max_rank"'):
        quickly(tmp_path, faulty)
    early = project(8002, {"clinic-a": {}})
    early["builders"].insert(1, early["builders"].pop(2))
    with pytest.raises(AssertionError, match="list nvflare_fm's builder after StaticFileBuilder"):
        quickly(tmp_path, early)


@pytest.mark.parametrize("only_ours", [False, True])
def test_kits_that_exist_already_are_allowed_and_cleared_again(
    tmp_path: Path, described: dict[str, Any], only_ours: bool
):
    plain = {**described, "builders": [b for b in described["builders"] if "nvflare_fm" not in b["path"]]}
    kits = quickly(tmp_path, plain)
    for name in (SERVER, "clinic-a"):
        kit = kits / name
        before = resources(kit)
        first = {file: file.read_text() for file in allow(kit, only_ours)}
        assert {file: file.read_text() for file in allow(kit, only_ours)} == first
        assert {file: file.read_text() for file in allow(kit)} == first
        ours, narrow = (components.SERVER, SERVERS) if name == SERVER else (components.SITE, SITE)
        assert resources(kit)["class_allow_list"] == (narrow if only_ours else [*DEFAULT_CLASS_ALLOW_LIST, *ours])
        assert job_check.installed(kit / "local", is_site=name != SERVER)
        assert (kit / "local" / "fm_secret").exists() == (name != SERVER)
        if name != SERVER:
            assert (before["allow_log_streaming"], resources(kit)["allow_log_streaming"]) == (True, False)
            assert "allow_log_streaming is off" in (kit / "readme_nvflare_fm.txt").read_text()
        remove(kit)
        assert resources(kit) == before
        assert not (kit / "local" / job_check.FILE).exists()
        assert remove(kit) == []
        assert not (kit / "local" / "fm_secret").exists()
    assert not (kits / SERVER / "local" / "fm_site.yaml").exists()
    assert (kits / "clinic-a" / "local" / "fm_site.yaml.removed").exists()


def test_a_site_that_sends_its_error_logs_again_is_obeyed(tmp_path: Path, described: dict[str, Any]):
    plain = {**described, "builders": [b for b in described["builders"] if "nvflare_fm" not in b["path"]]}
    kit = quickly(tmp_path, plain) / "clinic-a"
    allow(kit)
    own = kit / "local" / "resources.json"
    own.write_text(own.read_text().replace('"allow_log_streaming": false', '"allow_log_streaming": true'))
    allow(kit)
    assert resources(kit)["allow_log_streaming"] is True
    assert "allow_log_streaming is on" in (kit / "readme_nvflare_fm.txt").read_text()


def test_what_a_site_has_written_is_never_overwritten(kits: Path, tmp_path: Path):
    (tmp_path / "kit" / "startup").mkdir(parents=True)
    (tmp_path / "kit" / "local").mkdir()
    (tmp_path / "kit" / "startup" / "fed_client.json").write_text("{}")
    file = tmp_path / "kit" / "local" / "fm_site.yaml"
    file.write_text("limits: {max_rank: 3}\n")
    (tmp_path / "kit" / "local" / "resources.json").write_text('{"class_allow_list": ["my.own.Thing"], "x": 1}')
    allow(tmp_path / "kit")
    assert file.read_text() == "limits: {max_rank: 3}\n"
    said = resources(tmp_path / "kit")
    assert (said["class_allow_list"], said["x"]) == (["my.own.Thing", *components.SITE], 1)
    assert said["nvflare_fm"]["max_rank"] == 3
    with pytest.raises(ConfigError, match="no startup kit"):
        allow(tmp_path)


WHOLE = [
    ["nvflare_fm."],
    ["nvflare_fm.flare."],
    ["nvflare_fm.flare.executor"],
    ["nvflare_fm.flare.executor.ClientAPIExecutor"],
    ["nvflare_fm.export.save_file", "nvflare_fm."],
]


@pytest.mark.parametrize("entries", WHOLE)
def test_an_older_kits_entry_for_more_of_the_package_is_found_and_gives_way(kits: Path, tmp_path: Path, entries: Any):
    kit = Path(shutil.copytree(kits / "clinic-a", tmp_path / "kit"))
    own = resources(kit)
    own["class_allow_list"] = ["my.own.Thing", *components.SITE, *entries]
    (kit / "local" / "resources.json").write_text(json.dumps(own))
    assert allow_list.faults(resources(kit), components.SITE)
    allow(kit)
    assert resources(kit)["class_allow_list"] == ["my.own.Thing", *components.SITE]
    assert not allow_list.faults(resources(kit), components.SITE)


@pytest.mark.parametrize("change", [{"class_allow_list": ["*"]}, {"class_list_enforcement_mode": "warn"}])
def test_a_list_that_binds_nobody_is_found(kits: Path, change: Any):
    said = resources(kits / "clinic-a")
    assert not allow_list.faults(said, components.SITE)
    listed = change.get("class_allow_list", []) + said["class_allow_list"]
    assert allow_list.faults(said | change | {"class_allow_list": listed}, components.SITE)


def test_a_kit_that_has_another_component_where_ours_must_be_is_refused(kits: Path, tmp_path: Path):
    for name, taken in {
        "clinic-a": {"components": [{"id": "app_deployer", "path": "a.B"}]},
        SERVER: {"app_validator": {"path": "a.B"}},
    }.items():
        kit = Path(shutil.copytree(kits / name, tmp_path / name))
        (kit / "local" / "resources.json").write_text(json.dumps(resources(kit) | taken))
        with pytest.raises(ConfigError) as error:
            allow(kit)
        assert error.value.code == "job_check_taken"


def test_each_commented_setting_of_a_site_file_can_be_uncommented(tmp_path: Path):
    file = tmp_path / "fm_site.yaml"
    lines = render(SAID).splitlines()
    settings = [line for line in lines if ": " in line and line.lstrip().startswith("# ") and line.startswith(" ")]
    assert len(settings) > 15
    file.write_text("\n".join(line.replace("# ", "", 1) if line in settings else line for line in lines))
    full, short = load_site(file), tmp_path / "short.yaml"
    short.write_text(render(SAID))
    assert full.welcome.tasks == ("sequence_classification",)  # whom to welcome has no default, so an example is shown
    assert full.model_copy(update={"welcome": load_site(short).welcome}) == load_site(short)
