"""A job that reaches a site or the server is checked before it is parsed, and on record whatever becomes of it."""

import io
import json
import stat
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from nvflare.apis.app_validation import AppValidator
from nvflare.apis.fl_context import FLContext
from nvflare.apis.workspace import Workspace
from nvflare.fuel.sec.audit import Auditor, AuditService
from nvflare.fuel.utils.config import ConfigFormat
from nvflare.fuel.utils.config_factory import ConfigFactory
from nvflare.fuel.utils.zip_utils import zip_directory_to_bytes
from nvflare.private.fed.app.fl_app_validator import FLAppValidator
from nvflare.private.fed.server.job_meta_validator import JobMetaValidator
from nvflare.private.fed.utils.app_authz import AppAuthzService
from nvflare.private.fed.utils.app_deployer import AppDeployer

from nvflare_fm.flare.deployment import ServerValidator, SiteDeployer
from nvflare_fm.flare.kit import job_check
from nvflare_fm.flare.recipe import FedPEFTRecipe

SECRET = "hf_CANARY"
META = {"name": "study\n[E:forged]", "submitter_name": "lead@company.example", "submitter_org": "company"}


@pytest.fixture(autouse=True)
def canary(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FM_CANARY", SECRET)
    (tmp_path / "canary.conf").write_text(f'told = "{SECRET}"\n')


@pytest.fixture
def kit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Workspace]:
    """A site's kit, with the services that NVFlare's parent process starts."""
    for folder in ("kit/startup", "kit/local"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "kit/startup/fed_client.json").write_text("{}")
    job_check.install(tmp_path / "kit" / "local", is_site=True)
    monkeypatch.setattr(AppAuthzService, "app_validator", FLAppValidator(site_type="client"))
    AuditService.close()
    AuditService.initialize(str(tmp_path / "kit" / "audit.log"))
    yield Workspace(str(tmp_path / "kit"), "clinic")
    AuditService.close()


def app(tmp_path: Path, **changed: str) -> bytes:
    """The archive of a job's app, with files added or changed."""
    FedPEFTRecipe("job").export(str(tmp_path / "jobs"))
    folder = tmp_path / "jobs" / "job" / "app"
    for name, text in changed.items():
        (folder / "config" / name.replace("__", ".")).write_text(text)
    return zip_directory_to_bytes(str(folder), "")


def deployed(kit: Workspace, data: bytes, meta: dict[str, Any] = META) -> str:
    return SiteDeployer().deploy(kit, "job-1", meta, "app", data, FLContext())


def audited(kit: Workspace) -> list[str]:
    return (Path(kit.get_root_dir()) / "audit.log").read_text().splitlines()


def test_nvflare_adds_the_check_to_a_sites_parent_process_alone(kit: Workspace) -> None:
    (Path(kit.get_root_dir()) / "local" / "resources.json").write_text("{}")
    files = {for_job: kit.get_config_files_for_startup(is_server=False, for_job=for_job) for for_job in (False, True)}
    assert [job_check.FILE in str(files[for_job]) for for_job in (False, True)] == [True, False]


def test_a_job_that_is_accepted_is_deployed_and_on_record(kit: Workspace, tmp_path: Path) -> None:
    assert deployed(kit, app(tmp_path)) == ""
    assert (Path(kit.get_app_config_dir("job-1")) / "config_fed_client.json").exists()
    (line,) = audited(kit)
    assert "[R:job-1]" in line
    assert "[U:'lead@company.example'][A:nvflare_fm.job]accepted [job 'study\\n[E:forged]', of 'company']" in line


REFUSED = {
    "an include": {"config_fed_client__json": "", "config_fed_client__conf": 'include "/etc/hostname"'},
    "a variable": {"config_fed_client__json": '{"a": "{$FM_CANARY}"}'},
    "another's file": {"resources__json": "{}"},
    "YAML": {"config_fed_client__yml": "a: ${oc.env:FM_CANARY}"},
}


@pytest.mark.parametrize("changed", REFUSED.values(), ids=list(REFUSED))
def test_a_job_that_is_refused_is_not_unpacked_and_on_record_with_the_reason(
    kit: Workspace, tmp_path: Path, changed: dict[str, str]
) -> None:
    reason = deployed(kit, app(tmp_path, **changed))
    assert reason
    assert SECRET not in reason
    assert not Path(kit.get_run_dir("job-1")).exists()
    (line,) = audited(kit)
    assert f"refused: {reason!r} [job " in line


def fails(*given: Any, **more: Any) -> str:
    raise OSError(28, "no space left on device", "/srv/clinic/kit")


class Never(AppValidator):
    def validate(self, app_folder: str) -> tuple[str, dict[str, Any]]:
        return "not in this house", {}


def test_what_nvflare_refuses_is_on_record_too(kit: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AppAuthzService, "app_validator", FLAppValidator("client", custom_validators=[Never()]))
    assert deployed(kit, app(tmp_path)) == "not in this house"
    assert "refused: 'not in this house' [job " in audited(kit)[-1]


def test_nothing_that_goes_wrong_tells_a_path(kit: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AppDeployer, "deploy", fails)
    reason = deployed(kit, app(tmp_path))
    assert reason
    assert "/srv" not in reason + str(audited(kit))


def test_without_an_audit_log_no_job_is_taken(kit: Workspace, tmp_path: Path) -> None:
    AuditService.close()
    assert "audit log" in deployed(kit, app(tmp_path))
    AuditService.initialize(str(tmp_path / "audit.log"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Auditor, "add_event", fails)
        assert "audit log" in deployed(kit, app(tmp_path))


def archive(*entries: tuple[zipfile.ZipInfo | str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as writing, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the same name twice
        for name, data in entries:
            writing.writestr(name, data)
    return out.getvalue()


def link(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    return info


CLIENT = "config/config_fed_client.json"
TRICKS = {
    "no archive": b"PK",
    "cut": archive((CLIENT, b"{}"))[:-30],
    "a path": archive((CLIENT, b"{}"), ("../x", b"")),
    "an absolute path": archive((CLIENT, b"{}"), ("/x", b"")),
    "the same file twice": archive((CLIENT, b"{}"), (CLIENT, b'{"a": "{$HOME}"}')),
    "a file that seems another": archive((CLIENT, b"{}"), (f"./{CLIENT}", b"{}")),
    "a link": archive((CLIENT, b"{}"), (link("config/x"), b"/etc/passwd")),
    "no configuration": archive(("config/", b"")),
    "a damaged file": archive((CLIENT, b"{}")).replace(b"{}", b"{]", 1),
}


@pytest.mark.parametrize("data", TRICKS.values(), ids=list(TRICKS))
def test_an_archive_is_what_it_seems(kit: Workspace, data: bytes) -> None:
    reason = deployed(kit, data)
    assert reason
    assert "/" not in reason.replace(CLIENT, "").replace("config/", "").replace("'../x'", "").replace("'/x'", "")
    assert len(audited(kit)) == 1


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> FLAppValidator:
    """The validator as NVFlare's server builds it; its parsers as before after the test."""
    monkeypatch.setattr(ConfigFactory, "_fmt2Loader", dict(ConfigFactory._fmt2Loader))
    return FLAppValidator(site_type="server", custom_validators=[ServerValidator()])


def submitted(job: Path) -> tuple[bool, str, dict[str, Any]]:
    """What NVFlare's server says to a job that is submitted."""
    return JobMetaValidator().validate(job.name, zip_directory_to_bytes(str(job.parent), job.name))


READS = ("a = ${FM_CANARY}", 'include "canary.conf"', 'FM_CANARY += "x"', 'include url("file:///etc/hostname")')


@pytest.mark.parametrize("text", READS)
@pytest.mark.parametrize("name", ["meta", "app/config/config_fed_server"])
def test_the_server_refuses_a_job_before_it_parses_it(
    server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str
) -> None:
    monkeypatch.chdir(tmp_path)
    FedPEFTRecipe("job").export(str(tmp_path))
    job, said = tmp_path / "job", json.loads((tmp_path / "job" / f"{name}.json").read_text())
    (job / f"{name}.json").unlink()
    lines = [f"{key} = {json.dumps(value)}" for key, value in said.items()]
    (job / f"{name}.conf").write_text("\n".join(lines))
    assert submitted(job)[0]
    (job / f"{name}.conf").write_text("\n".join([*lines, text]))
    good, error, meta = submitted(job)
    assert not good
    assert "not_plain_hocon" in error
    assert SECRET not in f"{error}{meta}"
    if name != "meta":
        with pytest.raises(ValueError) as caught:
            server.validate(str(job / "app"))
        assert "[not_plain_hocon]" in str(caught.value)


@pytest.mark.parametrize("changed", REFUSED.values(), ids=list(REFUSED))
def test_the_server_refuses_an_app_when_it_is_deployed(server: Any, tmp_path: Path, changed: dict[str, str]) -> None:
    changed = {name.replace("client", "server"): text for name, text in changed.items()}
    with zipfile.ZipFile(io.BytesIO(app(tmp_path, **changed))) as archived:
        archived.extractall(tmp_path / "deployed")
    try:
        reason, _ = server.validate(str(tmp_path / "deployed"))
    except ValueError as error:
        reason = str(error)
    assert reason
    assert SECRET not in reason


def test_the_server_accepts_our_jobs(server: Any, tmp_path: Path) -> None:
    with zipfile.ZipFile(io.BytesIO(app(tmp_path))) as archived:
        archived.extractall(tmp_path / "deployed")
    assert server.validate(str(tmp_path / "deployed")) == ("", {})


def test_yaml_of_a_job_is_not_parsed_on_the_server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where OmegaConf is installed, NVFlare parses YAML with it."""
    parsers = ConfigFactory._fmt2Loader
    theirs = parsers[ConfigFormat.JSON]
    monkeypatch.setattr(ConfigFactory, "_fmt2Loader", {**parsers, ConfigFormat.OMEGACONF: theirs})
    ServerValidator()
    parser = ConfigFactory.get_config_loader(ConfigFormat.OMEGACONF)
    with pytest.raises(ValueError) as caught:
        parser.load_config_from_str("a: ${oc.env:FM_CANARY}")
    assert "YAML" in str(caught.value)
    (tmp_path / "own.yml").write_text("{}")
    assert parser.load_config(str(tmp_path / "own.yml")).to_dict() == {}  # the server's own
