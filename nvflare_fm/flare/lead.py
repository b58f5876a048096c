"""What the server tells the lead scientist of a job: its progress, or its result once it has ended."""

from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .jobs.resume import connected

GROUP = "nvflare_fm"  # of our numbers among those that NVFlare's components tell


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
    with connected(kit) as session:
        status = str((session.get_job_meta(job_id) or {}).get("status", ""))
        if not status:
            raise ConfigError(f"the server knows no job {job_id}", code="no_such_job")
        if status.startswith("FINISHED"):
            return Path(session.download_job_result(job_id, str(destination)))
        stats = session.show_stats(job_id, "server") if status == "RUNNING" else {}
        return {"status": status, **_ours(stats)}


def _ours(stats: Any) -> dict[str, Any]:
    """Our group, wherever in the answer it is: NVFlare nests it below the target and the component."""
    if not isinstance(stats, dict):
        return {}
    if isinstance(stats.get(GROUP), dict):
        return dict(stats[GROUP])
    return next((found for value in stats.values() if (found := _ours(value))), {})
