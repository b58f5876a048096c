"""What the server tells the lead scientist of a job: its progress, or its result once it has ended."""

from pathlib import Path
from typing import Any

from nvflare.fuel.flare_api.flare_api import new_secure_session
from nvflare.tool.kit.kit_config import StartupKitConfigError, resolve_admin_user_and_dir_from_startup_kit

from ..errors import ConfigError

GROUP = "nvflare_fm"  # of our numbers among those that NVFlare's components tell
_CONNECTS_WITHIN_S = 15.0


def fetch(job_id: str, kit: Path, destination: Path) -> dict[str, Any] | Path:
    """Ask the server about a job.

    Args:
        kit: the startup kit of the lead, or of another who may see the job.
        destination: where the result of a job that has ended is put.
    Returns:
        The numbers and reasons of a job that runs; the result folder of one that has ended.
    Raises:
        ConfigError: the kit is none, the server cannot be reached, or it knows no such job.
    """
    try:
        user, folder = resolve_admin_user_and_dir_from_startup_kit(str(kit))
        session = new_secure_session(user, folder, timeout=_CONNECTS_WITHIN_S)
    except StartupKitConfigError as error:
        raise ConfigError(f"{kit} is no startup kit of a person: {error}", code="no_lead_kit") from None
    except Exception as error:  # NVFlare's own kinds, for a server that is down, a certificate that is over, …
        raise ConfigError(f"the server cannot be reached with the kit {kit}: {error}", code="no_server") from None
    try:
        return _asked(session, job_id, destination)
    except Exception as error:
        raise ConfigError(f"job {job_id!r}: {type(error).__name__}: {error}", code="no_such_job") from None
    finally:
        session.close()


def _asked(session: Any, job_id: str, destination: Path) -> dict[str, Any] | Path:
    status = str(session.get_job_meta(job_id).get("status", ""))
    if status.startswith("FINISHED"):
        return Path(session.download_job_result(job_id, str(destination)))
    told = session.show_stats(job_id, "server") if status == "RUNNING" else {}
    return {"status": status, **dict(_ours(told))}


def _ours(told: Any) -> dict[str, Any]:
    """Our group, wherever in the answer it is: NVFlare nests it below the target and the component."""
    if not isinstance(told, dict):
        return {}
    if isinstance(told.get(GROUP), dict):
        return dict(told[GROUP])
    return next((found for value in told.values() if (found := _ours(value))), {})
