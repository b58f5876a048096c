"""When a job reaches a site or the server: its files are checked before they are parsed, and a site's audit log gets a
line about every job.

NVFlare builds both classes in the parent processes; see `job_check`.
"""

import logging
import zipfile
import zlib
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

from nvflare.apis.app_validation import AppValidator
from nvflare.apis.fl_context import FLContext
from nvflare.apis.job_def import JobMetaKey
from nvflare.apis.workspace import Workspace
from nvflare.fuel.sec.audit import AuditService
from nvflare.fuel.utils.config import Config, ConfigFormat, ConfigLoader
from nvflare.fuel.utils.config_factory import ConfigFactory
from nvflare.private.fed.utils.app_deployer import AppDeployer

from ..errors import ConfigError, FmError
from ..job import job_files
from .kit import privacy_scope

ACTION = "nvflare_fm.job"  # of the lines in the audit log
_NO_ARCHIVE = (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError, OSError, ValueError)
logger = logging.getLogger(__name__)


class SiteDeployer(AppDeployer):
    """Takes what the server sends a site of a job. NVFlare's client looks it up as `app_deployer`."""

    def deploy(
        self,
        workspace: Workspace,
        job_id: str,
        job_meta: dict[str, Any],
        app_name: str,
        app_data: bytes,
        fl_ctx: FLContext,
    ) -> str:
        """Check, deploy and put on record; returns why the site refuses, or nothing. The server hears the reason."""
        try:
            check_archive(app_data, job_files.CLIENT)
            _check_floor(Path(workspace.get_site_config_dir()), job_meta, app_data)
            refused = super().deploy(workspace, job_id, job_meta, app_name, app_data, fl_ctx) or ""
        except FmError as error:
            refused = error.message
        except Exception:  # its text may hold paths
            logger.exception("job %s cannot be deployed", job_id)
            refused = "the job cannot be deployed here; see the site's log"
        if not _record(job_id, job_meta, refused):
            refused = refused or "this site cannot write its audit log, and takes no job without it"
        return refused


def _record(job_id: str, job_meta: Mapping[str, Any], refused: str) -> bool:
    """Whether the audit log has the line. Whoever submits a job chooses its name."""
    asked = (JobMetaKey.JOB_NAME, JobMetaKey.SUBMITTER_NAME, JobMetaKey.SUBMITTER_ORG)
    name, who, org = (repr(str(job_meta.get(key.value, "unknown"))[:80]) for key in asked)
    said = f"refused: {' '.join(refused.split())[:500]!r}" if refused else "accepted"
    try:
        return bool(AuditService.add_event(user=who, action=ACTION, ref=job_id, msg=f"{said} [job {name}, of {org}]"))
    except OSError:
        logger.exception("the audit log cannot be written")
        return False


def check_archive(data: bytes, needs: str = "") -> None:
    """Check the files of a job as it is deployed, before anything parses them.

    Raises:
        ConfigError: it is no archive of an app that a job may bring; see `job_files.check_app`.
    """
    try:
        with zipfile.ZipFile(BytesIO(data)) as archive:
            job_files.check_app(archive.namelist(), lambda name: _head(archive, name), needs)
    except _NO_ARCHIVE as error:
        raise ConfigError(f"the app is no archive: {type(error).__name__}", code="no_archive") from None


def _check_floor(local: Path, job_meta: Mapping[str, Any], data: bytes) -> None:
    """Check a job whose files have been checked against the site's privacy floor.

    Raises:
        PolicyError: as `privacy_scope.check_job`.
    """
    scope = job_meta.get(JobMetaKey.SCOPE.value) or ""
    with zipfile.ZipFile(BytesIO(data)) as archive:
        names = archive.namelist()
        (config,) = [name for name in names if name.startswith(f"config/{job_files.CLIENT}.")]
        client = job_files.parse_config(config, _head(archive, config))
    brings_code = any(name.split("/")[0] == "custom" for name in names)
    privacy_scope.check_job(local, scope if isinstance(scope, str) else repr(scope), brings_code, client)


def _head(archive: zipfile.ZipFile, name: str) -> bytes:
    with archive.open(name) as file:
        return file.read(job_files.most_bytes(name) + 1)


class ServerValidator(AppValidator):
    """Checks what a job brings to the server. NVFlare's server takes it as its `app_validator`.

    NVFlare parses a job's files before it asks a validator: when the job is submitted, and to see whether the app has a
    configuration at all. So this also changes how the process parses them.
    """

    def __init__(self) -> None:
        plain_jobs_only()

    def validate(self, app_folder: str) -> tuple[str, dict[str, Any]]:
        """Why the app is refused, or nothing; and what NVFlare is to know of it."""
        try:
            check_folder(Path(app_folder))
        except FmError as error:
            return error.message, {}
        return "", {}


def check_folder(folder: Path) -> None:
    """Check the files of one of a job's apps, before anything parses them.

    Raises:
        ConfigError: it is no folder of an app that a job may bring; see `job_files.check_app`.
    """
    job_files.check_app(_listed(folder), lambda name: first_bytes(folder / name))


def _listed(folder: Path) -> Any:
    for path in sorted(folder.rglob("*")):
        yield f"{path.relative_to(folder).as_posix()}{'/' if path.is_dir() else ''}"


def first_bytes(file: Path) -> bytes:
    """The first bytes of a file of a job, one more than it may have.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        if not file.is_file():  # a FIFO would never end
            raise ConfigError(f"{file.name} is no regular file", str(file), code="no_regular_file")
        with file.open("rb") as opened:
            return opened.read(job_files.most_bytes(file.as_posix()) + 1)
    except OSError as error:
        raise ConfigError(f"{file.name} cannot be read", f"{file}: {error}", code="unreadable_file") from None


def plain_jobs_only() -> None:
    """From now on, NVFlare in this process parses HOCON and YAML of a job only where every value stands in the text.

    Raises:
        KeyError, AttributeError: this NVFlare keeps its parsers elsewhere; nothing is parsed then.
    """
    parsers: dict[ConfigFormat, ConfigLoader] = ConfigFactory._fmt2Loader
    for format_ in (ConfigFormat.PYHOCON, ConfigFormat.OMEGACONF):
        if (parser := parsers.get(format_)) and not isinstance(parser, _Plain):
            parsers[format_] = _Plain(parser)


class _Plain(ConfigLoader):
    """A parser that checks the text of a job first. A text, and not a file, is always a job's."""

    def __init__(self, parser: ConfigLoader) -> None:
        super().__init__(parser.get_format())
        self.parser = parser

    def load_config(self, file_path: str) -> Config:
        file = Path(file_path)
        if file.name.startswith((job_files.CLIENT, job_files.SERVER)):
            self._check(file.name, first_bytes(file))
        return self.parser.load_config(file_path)

    def load_config_from_str(self, config_str: str) -> Config:
        self._check("the job's .conf", config_str.encode())
        return self.parser.load_config_from_str(config_str)

    def load_config_from_dict(self, config_dict: dict[str, Any]) -> Config:
        return self.parser.load_config_from_dict(config_dict)

    def _check(self, name: str, data: bytes) -> None:
        if self.get_format() != ConfigFormat.PYHOCON:
            raise ValueError(f"{name} is YAML; write JSON or HOCON")
        try:
            job_files.parse_config(name, data)
        except FmError as error:  # NVFlare tells the submitter what a ValueError says, and nothing of others
            raise ValueError(error.message) from None
