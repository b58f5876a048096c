"""A job that goes on where an earlier one ended: the same configuration, from the last adapter that one saved.

<result>/job/<name>/                  what was submitted      as `nvflare job download` writes them
<result>/workspace/adapters/last/     how far it came
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nvflare.apis.job_def import is_valid_job_id
from nvflare.fuel.flare_api.flare_api import Session, new_secure_session

from ... import at_rest
from ...errors import ConfigError
from ...files import read_object
from ..persistor import FOLDER, LAST, AdapterPersistor
from .job import Job, read_job, server_config
from .new_job import bring, making

ADAPTER = "resumed_adapter"  # the folder inside the new job
_CONNECTS_WITHIN_S = 20.0


def write_resumed(result: Path, folder: Path) -> Job:
    """Write a job that goes on after the last round of another, and check it as its server would.

    Args:
        result: what was downloaded of the job that ended.
        folder: of the new job; must not exist yet.
    Returns:
        What the new job says.
    Raises:
        ConfigError: `result` is no job's result, no round was over, none is left to train, or `folder` is in the way.
        ModelError: the adapter is damaged.
    """
    submitted, last = _submitted(result), at_rest.standing(result / "workspace" / FOLDER / LAST)
    if not last.is_dir():
        raise ConfigError(
            "the job saved no adapter: not one round was over. Submit the job itself again",
            str(result),
            code="nothing_to_resume",
        )
    with making(folder) as beside:
        signed = shutil.ignore_patterns(".__nvfl_*")  # by who submitted it: what is submitted now is signed anew
        shutil.copytree(submitted, beside, symlinks=True, ignore=signed, dirs_exist_ok=True)
        file, config = server_config(beside)
        shutil.rmtree(file.parent / ADAPTER, ignore_errors=True)
        bring(last, file.parent / ADAPTER)
        persistor = _persistor(config)
        persistor["args"] = {**(persistor.get("args") or {}), "initial_adapter": ADAPTER, "resume": True}
        file.unlink()
        file.with_suffix(".json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        return read_job(beside)


def _submitted(result: Path) -> Path:
    found = [meta.parent for meta in sorted(result.glob("job/*/meta.*"))]
    if len(found) != 1:
        raise ConfigError(
            "this is not what nvflare job download writes: it needs job/<name>/meta.json, and workspace/ beside job/",
            str(result),
            code="no_job_result",
        )
    return found[0]


def _persistor(config: dict[str, Any]) -> dict[str, Any]:
    kind = f"{AdapterPersistor.__module__}.{AdapterPersistor.__name__}"
    for part in config.get("components") or []:
        if isinstance(part, dict) and part.get("path") == kind:
            found: dict[str, Any] = part
            return found
    raise ConfigError(
        f"the job has no {AdapterPersistor.__name__}; is it a job of nvflare_fm?", code="not_one_component"
    )


@contextmanager
def connected(kit: Path) -> Iterator[Session]:
    """Give a session with the system that the startup kit of an admin belongs to.

    Raises:
        ConfigError: it is no such kit, or the system cannot be reached or refuses what is asked.
    """
    try:
        user = str(read_object(kit / "startup" / "fed_admin.json")["admin"]["username"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            "this is no startup kit of an admin: it needs startup/fed_admin.json",
            f"{kit}: {error}",
            code="no_admin_kit",
        ) from None
    session = None
    try:
        session = new_secure_session(user, str(kit), timeout=_CONNECTS_WITHIN_S)
        yield session
    except ConfigError:
        raise
    except Exception as error:  # NVFlare's session raises two dozen kinds
        raise ConfigError(
            f"the system says: {type(error).__name__}: {str(error)[:200]}", str(kit), code="system_refuses"
        ) from None
    finally:
        if session:
            session.close()


def download(job_id: str, kit: Path, into: Path) -> Path:
    """Download what a job left, once it has ended.

    Returns:
        The folder, as `write_resumed` takes it.
    Raises:
        ConfigError: the job is still running, or is not there, or the system cannot be reached.
    """
    if not is_valid_job_id(job_id):
        raise ConfigError(f"{job_id[:80]!r} is neither a folder nor the id of a job", code="no_such_result")
    with connected(kit) as session:
        return Path(session.download_job_result(job_id, str(into)))


def submit(folder: Path, kit: Path) -> str:
    """Submit a job's folder.

    Returns:
        Its id.
    Raises:
        ConfigError: the system cannot be reached or refuses the job.
    """
    with connected(kit) as session:
        return str(session.submit_job(str(folder.resolve())))
