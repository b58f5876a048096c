"""Ends the jobs that a server was running when it was killed. NVFlare would list them as RUNNING for ever.

A component of the server's own process. `FmBuilder` and `nvflare-fm site allow` put it into the server's kit; it is on
no allow list, so a job cannot name it.
"""

import shutil
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_constant import FLContextKey, SystemComponents
from nvflare.apis.fl_context import FLContext
from nvflare.apis.job_def import RunStatus
from nvflare.apis.storage import WORKSPACE
from nvflare.apis.workspace import Workspace

from ..at_rest import tidy

RUNNER = "nvflare.private.fed.app.server.runner_process"  # the module that a job's process at the server runs
META = "nvflare_fm"  # a key of the job's meta, which `nvflare job meta` shows
_ENDS_WITHIN_S, _DIES_WITHIN_S = 60.0, 10.0


class JobRecovery(FLComponent):
    """Ends every job that this server's earlier life left RUNNING or DISPATCHED, as FINISHED:ABNORMAL.

    The job's folder goes to the job store: `nvflare job download` then has it, and `nvflare-fm resume` goes on after
    the last round. No job of this life is touched: those to end are looked up before the first job can start. A site's
    part of such a job ends by itself, once the server has told the site that it runs no such job.
    """

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        if event_type != EventType.SYSTEM_BOOTSTRAP:
            return
        jobs = fl_ctx.get_engine().get_component(SystemComponents.JOB_MANAGER)
        left = [job.job_id for job in jobs.get_jobs_by_status([RunStatus.RUNNING, RunStatus.DISPATCHED], fl_ctx)]
        if left:
            workspace, engine = fl_ctx.get_prop(FLContextKey.WORKSPACE_OBJECT), fl_ctx.get_engine()
            threading.Thread(target=self._end, args=(left, workspace, engine), daemon=True).start()

    def _end(self, left: Sequence[str], workspace: Workspace, engine: Any) -> None:
        for job_id in left:
            try:
                with engine.new_context() as fl_ctx:
                    end_job(job_id, workspace, engine.get_component(SystemComponents.JOB_MANAGER), fl_ctx)
                self.logger.warning(f"job {job_id} was running when the server stopped; it is FINISHED:ABNORMAL now")
            except Exception:  # the next job is to be ended all the same
                self.logger.exception(f"job {job_id} was running when the server stopped, and cannot be ended")


def end_job(job_id: str, workspace: Workspace, jobs: Any, fl_ctx: FLContext) -> None:
    """Wait for the job's process to end, store its folder, and set the job's status.

    It can be repeated after a kill at any point: a folder is removed last, and what is in the store is whole.

    Args:
        jobs: NVFlare's job manager.
    """
    from .persistor import FOLDER  # loads torch: only where there is a job to end

    _await_process(job_id)
    run_dir = Path(workspace.get_run_dir(job_id))
    if (run_dir / FOLDER).is_dir():
        tidy(run_dir / FOLDER)
    roots = (workspace.get_result_root, workspace.get_log_root, workspace.get_audit_root)
    folders = [
        folder for folder in dict.fromkeys([run_dir, *(Path(root(job_id)) for root in roots)]) if folder.is_dir()
    ]
    if folders and WORKSPACE not in jobs.list_components(job_id, fl_ctx):
        jobs.save_workspace(job_id, [str(folder) for folder in folders], fl_ctx)
    said = f"the server stopped while this job ran; nvflare-fm resume {job_id} goes on after its last round"
    jobs.update_meta(job_id, {META: said}, fl_ctx)
    jobs.set_status(job_id, RunStatus.FINISHED_ABNORMAL, fl_ctx)
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def _await_process(job_id: str) -> None:
    """Returns when the job's process has ended: by itself, because its parent is gone, or killed after a time."""
    until = time.monotonic() + _ENDS_WITHIN_S
    while (left := _processes(job_id)) and time.monotonic() < until:
        time.sleep(0.5)
    for process in left:
        with suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(left, timeout=_DIES_WITHIN_S)


def _processes(job_id: str) -> list[psutil.Process]:
    running = []
    for process in psutil.process_iter(["cmdline", "status"]):
        line = process.info["cmdline"] or []
        if RUNNER in line and job_id in line and process.info["status"] != psutil.STATUS_ZOMBIE:
            running.append(process)
    return running
