"""A job that a killed server was running is ended, whole, and can be ended again after a kill at any line of that."""

import subprocess
import sys
import time
import zipfile
from argparse import Namespace
from pathlib import Path
from typing import Any

import psutil
import pytest
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import FLContextKey, SystemComponents
from nvflare.apis.impl.job_def_manager import SimpleJobDefManager
from nvflare.apis.job_def import JobMetaKey, RunStatus
from nvflare.apis.workspace import Workspace
from nvflare.app_common.storages.filesystem_storage import FilesystemStorage
from nvflare.private.fed.server.run_manager import RunManager
from nvflare.private.fed.server.server_engine import ServerEngine

from nvflare_fm.flare import recovery
from tests import kills

LEFT = {"rounds.jsonl": "{}", "adapters/.last.old/adapter_config.json": "{}", "adapters/.last.new/half": ""}


class Server:
    """NVFlare's own engine, job manager and store, without a network."""

    def __init__(self, root: Path) -> None:
        for folder in ("startup", "local", "jobs"):
            (root / folder).mkdir()
        self.root, self.workspace = root, Workspace(str(root), "server")
        self.jobs, self.store = SimpleJobDefManager(str(root / "jobs")), FilesystemStorage()
        self.engine = ServerEngine(None, Namespace(set=[]), None, None)
        components = {SystemComponents.JOB_MANAGER: self.jobs, "job_store": self.store}
        self.engine.set_run_manager(RunManager("server", self.engine, "", self.workspace, components, None, []))

    def job(self, status: RunStatus) -> str:
        with self.engine.new_context() as fl_ctx:
            meta = self.jobs.create({JobMetaKey.JOB_NAME.value: "a"}, b"", fl_ctx)
            job_id = str(meta[JobMetaKey.JOB_ID.value])
            self.jobs.set_status(job_id, status, fl_ctx)
        for name, text in LEFT.items():
            (self.root / job_id / name).parent.mkdir(parents=True, exist_ok=True)
            (self.root / job_id / name).write_text(text)
        return job_id

    def meta(self, job_id: str) -> dict[str, Any]:
        with self.engine.new_context() as fl_ctx:
            return dict(self.jobs.get_job(job_id, fl_ctx).meta)

    def stored(self, job_id: str) -> set[str]:
        file = self.root / "jobs" / job_id / "workspace"
        return {name for name in zipfile.ZipFile(file).namelist() if not name.endswith("/")} if file.exists() else set()

    def end(self, job_id: str) -> None:
        with self.engine.new_context() as fl_ctx:
            recovery.end_job(job_id, self.workspace, self.jobs, fl_ctx)


@pytest.fixture
def server(tmp_path: Path) -> Server:
    return Server(tmp_path)


WHOLE = {"rounds.jsonl", "adapters/last/adapter_config.json"}  # the adapter is in its place


def test_at_its_start_the_server_ends_the_jobs_it_was_running_and_no_others(server: Server) -> None:
    jobs = {status: server.job(status) for status in RunStatus}
    ended = {jobs[RunStatus.RUNNING], jobs[RunStatus.DISPATCHED]}
    with server.engine.new_context() as fl_ctx:
        fl_ctx.set_prop(FLContextKey.WORKSPACE_OBJECT, server.workspace, private=True)
        recovery.JobRecovery().handle_event(EventType.SYSTEM_BOOTSTRAP, fl_ctx)
        later = server.job(RunStatus.RUNNING)  # of this life
        for event in (EventType.SYSTEM_START, EventType.START_RUN, EventType.END_RUN):
            recovery.JobRecovery().handle_event(event, fl_ctx)
    until = time.monotonic() + 20
    while time.monotonic() < until and any((server.root / job).exists() for job in ended):  # removed last
        time.sleep(0.1)
    for job in ended:
        assert not (server.root / job).exists()
        assert server.meta(job)["status"] == "FINISHED:ABNORMAL"
        assert server.stored(job) == WHOLE
        assert f"nvflare-fm resume {job}" in server.meta(job)[recovery.META]
    for status, job in {**jobs, RunStatus.RUNNING: later}.items():
        if job not in ended:
            assert server.meta(job)["status"] == status.value
            assert not server.stored(job)
            assert (server.root / job / "rounds.jsonl").exists()


def test_a_server_killed_while_it_ends_a_job_ends_it_in_its_next_life(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recovery, "_await_process", lambda job_id: None)  # there is none, and looking takes long
    line, ended = 0, False
    while not ended:
        job = server.job(RunStatus.RUNNING)
        ended = kills.ends(lambda job=job: server.end(job), line, "recovery.py")  # type: ignore[misc]
        if server.meta(job)["status"] == "RUNNING":
            server.end(job)
        assert server.meta(job)["status"] == "FINISHED:ABNORMAL"
        assert server.stored(job) == WHOLE
        line += 1
    assert line > 10


def test_what_is_in_the_store_is_not_replaced_by_what_is_left_of_a_folder(server: Server) -> None:
    """NVFlare was killed after it had stored a job, while it removed the job's folder."""
    job = server.job(RunStatus.RUNNING)
    with server.engine.new_context() as fl_ctx:
        server.jobs.save_workspace(job, [str(server.root / job)], fl_ctx)
    before = server.stored(job)
    (server.root / job / "rounds.jsonl").unlink()
    server.end(job)
    assert server.stored(job) == before
    assert server.meta(job)["status"] == "FINISHED:ABNORMAL"


def test_a_process_that_does_not_end_by_itself_is_killed_and_no_other_jobs(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recovery, "_ENDS_WITHIN_S", 1.0)
    jobs = [server.job(RunStatus.RUNNING) for _ in range(2)]
    sleep = "import time; time.sleep(60)"
    left, other = (subprocess.Popen([sys.executable, "-c", sleep, recovery.RUNNER, "-n", job]) for job in jobs)
    try:
        server.end(jobs[0])
        assert not psutil.pid_exists(left.pid)
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()
