"""What is killed on a running system, and what can be seen of it afterwards."""

import json
import os
import re
import signal
import subprocess
from pathlib import Path
from typing import Any

import psutil

from nvflare_fm.at_rest import standing
from nvflare_fm.export.folder import PROVENANCE
from tests.deployment.system import BIN, ENVIRONMENT, LEAD, SERVER, System

PARENTS = "the server", "a site"
FAULTS = (PARENTS[0], "the server's process of the job", PARENTS[1], "a site's process of the job", "a trainer")
_MODULES = {
    FAULTS[1]: "nvflare.private.fed.app.server.runner_process",
    FAULTS[3]: "nvflare.private.fed.app.client.worker_process",
    FAULTS[4]: "nvflare_fm.flare.trainer",
}


def processes(system: System, fault: str, job: str, site: str) -> list[psutil.Process]:
    """The processes that `fault` kills: one where all is well."""
    kit = system.kits / (site if fault in FAULTS[2:] else SERVER)
    if fault in PARENTS:
        return [psutil.Process(int((kit / "pid.fl").read_text()))]
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        line = process.info["cmdline"] or []
        here = any(str(kit) in word for word in line) and any(job in word for word in line)
        if _MODULES[fault] in line and here and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process)
    return found


def kill(system: System, fault: str, job: str, site: str) -> None:
    (victim,) = processes(system, fault, job, site)
    os.kill(victim.pid, signal.SIGKILL)


def left(system: System, job: str) -> list[str]:
    """What still runs of a job, anywhere."""
    lines = [" ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])]
    return [line for line in lines if job in line and str(system.kits) in line]


def rounds(folder: Path) -> list[dict[str, Any]]:
    """The finished rounds in a server's folder of a job, or in a download of it."""
    file = folder / "rounds.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def last_round(folder: Path) -> int:
    """The round of the adapter that a server's folder of a job holds; -1: none."""
    file = standing(folder / "adapters" / "last") / PROVENANCE
    return int(json.loads(file.read_text())["round"]) if file.exists() else -1


def resumed(system: System, job: str, folder: Path) -> str:
    """The id of the job that goes on, by the one command of the docs."""
    command = [BIN / "nvflare-fm", "resume", job, "--kit", system.kits / LEAD, "-o", folder]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stdout + done.stderr
    return re.search(r"submitted as (\S+);", done.stdout).group(1)
