"""Startup kits as a hospital gets them: this package allowed and nothing else changed, and taken out again."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime, timedelta
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
from nvflare_fm.flare import components
from nvflare_fm.flare.kit import allow_list, job_check
from nvflare_fm.flare.kit.certificate import expiry
from nvflare_fm.flare.provision import allow, remove, without_byoc
from nvflare_fm.flare.recovery import JobRecovery
from nvflare_fm.flare.restarted import RestartedSites
from nvflare_fm.site.offer.site_config import SiteConfig, load_site
from nvflare_fm.site.offer.site_file import render
from tests.codes import refused
from tests.deployment.system import (
    BIN,
    ENVIRONMENT,
    EXAMPLE,
    LEAD,
    PROJECT,
    SERVER,
    project,
    provision,
    provision_file,
)
from tests.flare.test_job import Builder

OPERATE = Path(__file__).parents[2] / "docs" / "how_to" / "operate_a_site.md"
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
    listed = [resources(made / "clinic-a")["class_allow_list"] for made in (kits, open_kits)]
    assert {*listed[1]} - {*listed[0]} == {*components.NVFLARE_STREAMING_SITE} - {*components.NVFLARE_SITE}
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


@pytest.fixture(scope="module")
def newer(example_kits: Path) -> Path:
    """After the how-to's commands: one hospital has a new certificate, and another one has come."""
    folder = example_kits.parents[2]
    (folder / "workspace").symlink_to(folder / "kits")
    page = OPERATE.read_text(encoding="utf-8")
    (hospital,) = re.findall(r"```yaml\n# (hospital\.yml\n.*?)```", page, re.DOTALL)
    name, _, content = hospital.partition("\n")
    (folder / name).write_text(content)
    (renewal,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    added, again = re.findall(r"^    (nvflare provision .*)$", page, re.MULTILINE)
    assert added.startswith(again)  # one run does for both
    for command in ([sys.executable, "-c", renewal], [BIN / "nvflare", *added.split()[1:]]):
        subprocess.run(command, cwd=folder, env=ENVIRONMENT, stdin=subprocess.DEVNULL, check=True, capture_output=True)
    return sorted((folder / "workspace" / PROJECT).glob("prod_*"))[-1]


def test_a_hospital_can_be_added_later_and_the_others_kits_come_out_as_before(example_kits: Path, newer: Path):
    assert newer != example_kits
    assert load_site(newer / "coast" / "local" / "fm_site.yaml").limits.max_rank == 8
    for name in ("lake", SERVER):
        for file in (file for folder in ("local", "startup") for file in (example_kits / name / folder).iterdir()):
            same = newer / name / file.relative_to(example_kits / name)
            assert same.read_bytes() == file.read_bytes(), file.name


def test_a_certificate_that_is_taken_out_of_the_state_is_made_anew(example_kits: Path, newer: Path):
    for file, same in (("rootCA.pem", True), ("client.crt", False), ("client.key", False)):
        old, new = ((kits / "north" / "startup" / file).read_bytes() for kits in (example_kits, newer))
        assert (old == new) is same, file


def test_the_first_certificate_to_expire_is_the_one_that_openssl_says(example_kits: Path, tmp_path: Path):
    """And the project's outlives those of the participants."""
    (command,) = re.findall(r"```sh\n(openssl .*?)\n```", OPERATE.read_text(encoding="utf-8"))
    kit = example_kits / "north"
    said = {}
    for file in ("client.crt", "rootCA.pem"):
        words = command.replace("north/kit/startup/client.crt", str(kit / "startup" / file)).split()
        shown = subprocess.run(words, capture_output=True, text=True, check=True).stdout
        said[file] = datetime.strptime(shown.strip().partition("=")[2], "%b %d %H:%M:%S %Y %Z").replace(tzinfo=UTC)
    assert said["rootCA.pem"] > said["client.crt"] + timedelta(days=3000)
    found = expiry(kit)
    assert found
    assert (found.file, found.at, found.over) == ("client.crt", said["client.crt"], False)
    assert str(found) == f"the kit's certificate is valid until {said['client.crt'].date()}"
    soon = replace(found, at=datetime.now(UTC) + timedelta(days=20))
    assert str(soon).endswith("ask the project's admin for a new kit now")
    past = replace(found, at=datetime.now(UTC) - timedelta(days=1), file="rootCA.pem")
    assert past.over
    assert str(past).startswith("the project's root certificate expired on ")
    assert expiry(tmp_path) is None
    (tmp_path / "startup").mkdir()
    (tmp_path / "startup" / "client.crt").write_bytes(b"\xff")
    with pytest.raises(ConfigError) as caught:
        expiry(tmp_path)
    assert caught.value.code == "bad_certificate"


def test_a_faulty_project_is_refused_by_name(tmp_path: Path, described: dict[str, Any]):
    faulty = project(8002, {"clinic-a": {"limits": {"max_rnak": 4}}})
    with pytest.raises(AssertionError) as caught:
        quickly(tmp_path, faulty)
    assert all(named in str(caught.value) for named in ("clinic-a", '"max_rank"', "[wrong_setting]"))
    early = project(8002, {"clinic-a": {}})
    early["builders"].insert(1, early["builders"].pop(2))
    with pytest.raises(AssertionError) as caught:
        quickly(tmp_path, early)
    assert "[builder_order]" in str(caught.value)


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
    with refused("not_a_kit", ConfigError):
        allow(tmp_path)


WHOLE = [
    ["nvflare_fm."],
    ["nvflare_fm.flare."],
    ["nvflare_fm.flare.executor"],
    ["nvflare_fm.flare.executor.ClientAPIExecutor"],
    ["nvflare_fm.export.folder.save_file", "nvflare_fm."],
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
