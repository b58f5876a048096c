"""Tells running jobs that a site was started again, so that its part of them is gone. NVFlare has them wait for ever.

A component of the server's own process, as `JobRecovery` is. NVFlare tells a job of a site that falls silent, after ten
minutes; a site that is back before that, as after a reboot, is no longer silent, and its old registration is forgotten.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from nvflare.apis.event_type import EventType
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_constant import RunProcessKey
from nvflare.apis.fl_context import FLContext


class RestartedSites(FLComponent):
    """Reports a site as gone to each job that it was part of when it was started again.

    The job goes on without the site a minute later, if enough others are left. A site whose part of the job lives on,
    because only its connection was lost, is heard from within that minute and stays in.
    """

    def __init__(self) -> None:
        super().__init__()
        self._reported: set[tuple[str, str, str]] = set()

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        if event_type != EventType.CLIENT_REGISTER_PROCESSED:  # of a site, or of an admin
            return
        engine = fl_ctx.get_engine()
        found = set(gone(dict(engine.run_processes), dict(engine.client_manager.clients)))
        for job_id, site, _ in sorted(found - self._reported):
            self.logger.warning(f"{site} was started again while job {job_id} ran")
            engine.notify_dead_job(job_id, site, "the site was started again")
            engine.job_runner.resolve_client_outcome(job_id, site)  # else the job would fail at its end for want of it
        self._reported = found


def gone(running: Mapping[str, Mapping[str, Any]], registered: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Find the sites that have registered anew since a job began that they are part of.

    Args:
        running: NVFlare's account of each job by its id, with the participants by their tokens of then.
        registered: the sites that are connected, by their tokens of now.
    Returns:
        The job, the site, and the site's token of now.
    """
    now = {client.name: token for token, client in registered.items()}
    for job_id, process in running.items():
        for token, client in dict(process.get(RunProcessKey.PARTICIPANTS) or {}).items():
            if token not in registered and client.name in now:
                yield job_id, client.name, now[client.name]
