"""A real NVFlare system on this machine: provisioned kits, mutual TLS, each participant its own process tree."""

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import yaml
from nvflare.fuel.flare_api.api_spec import NoConnection
from nvflare.fuel.flare_api.flare_api import Session, new_secure_session

EXAMPLE = Path(__file__).parents[2] / "job_templates" / "project.yml"
PROJECT, SERVER = "oncology", "server.company.example"  # as in the example
LEAD, ADMIN = "lead@company.example", "admin@company.example"
SITES = {"clinic-a": "clinic_a", "clinic-b": "clinic_b", "clinic-c": "clinic_c"}  # with their organisations
ENCRYPTS, SIGNS = "nvflare.lighter.impl.he.HEBuilder", "nvflare.lighter.impl.signature.SignatureBuilder"
CANARY = "hf_Quarantine9SiteToken"  # in the environment of each site and of the server, where no job may read it
BIN = Path(sys.executable).parent
ENVIRONMENT = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}


def project(port: int, sites: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The example `project.yml` with encryption, and with other clinics: one for each of `sites` with what its
    `fm_site.yaml` says.
    """
    example: dict[str, Any] = yaml.safe_load(EXAMPLE.read_text())
    company = [participant for participant in example["participants"] if participant["org"] == "company"]
    server = next(participant for participant in company if participant["type"] == "server")
    server["fed_learn_port"] = port
    clients = [
        {"name": name, "type": "client", "org": SITES.get(name, "clinic"), "fm_site": dict(said)}
        for name, said in sites.items()
    ]
    users = [participant for participant in company if participant["type"] == "admin"]
    before = [builder["path"] for builder in example["builders"]].index(SIGNS)
    builders = [*example["builders"][:before], {"path": ENCRYPTS}, *example["builders"][before:]]
    return example | {"participants": [server, *clients, *users], "builders": builders}


def provision(folder: Path, described: Mapping[str, Any], *more: str) -> Path:
    """Runs `nvflare provision`; returns the folder of the newest kits."""
    file = folder / "project.yml"
    file.write_text(yaml.safe_dump(dict(described), sort_keys=False))
    return provision_file(file, described["name"], *more)


def provision_file(file: Path, name: str, *more: str) -> Path:
    folder = file.parent
    command = [BIN / "nvflare", "provision", "-p", file.name, "-w", "kits", "--force", *more]
    done = subprocess.run(
        command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    made = sorted((folder / "kits" / name).glob("prod_*"))
    assert done.returncode == 0, done.stdout + done.stderr
    return made[-1]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])


class System:
    """The kits, started and stopped with their own scripts."""

    def __init__(self, kits: Path) -> None:
        self.kits, self.taps = kits, kits.parent / "taps"
        self.ours: dict[int, psutil.Process] = {}
        _set_up(self.kits / SERVER / "local", kits.parent / "store")

    def start(self, sites: list[str]) -> "System":
        for name in (SERVER, *sites):
            tap = self.taps / name
            tap.mkdir(parents=True)
            environment = ENVIRONMENT | {"PYTHONPATH": str(Path(__file__).parent / "tap"), "FM_TAP": str(tap)}
            environment |= {"FM_CANARY": CANARY}
            with (self.kits / name / "console.txt").open("w") as console:
                subprocess.run(
                    [self.kits / name / "startup" / "start.sh"],
                    env=environment, stdin=subprocess.DEVNULL, stdout=console, stderr=console, check=True,
                    start_new_session=True,
                )  # fmt: skip
        self.wait_for(lambda: self.connected() >= set(sites), 60, "all sites to connect")
        return self

    def connected(self) -> set[str]:
        try:
            session = self.session(ADMIN)
        except Exception:  # the server is not up yet
            return set()
        try:
            return {client.name for client in session.get_system_info().client_info}
        finally:
            session.close()

    def session(self, user: str = LEAD) -> Session:
        return new_secure_session(user, str(self.kits / user), timeout=5.0)

    def stop(self) -> list[str]:
        """Asks the system to shut down; ends whatever of it is still there after that, and names it."""
        self._see()
        try:
            session = self.session(ADMIN)
            session.shutdown_system()
            session.close()
        finally:
            gone_by = time.monotonic() + 40
            while time.monotonic() < gone_by and any(p.is_running() for p in self.ours.values()):
                time.sleep(0.2)
            left = [process for process in self.ours.values() if process.is_running()]
            for process in left:
                process.kill()
        return [f"{process.pid}: {process.name()}" for process in left]

    def _see(self) -> None:
        """Remembers every process of this system: those its own pid files name, and their children."""
        for file in self.kits.glob("*/*pid.fl"):
            try:
                root = psutil.Process(int(file.read_text()))
                self.ours |= {p.pid: p for p in (root, *root.children(recursive=True))}
            except (psutil.Error, ValueError, OSError):
                continue

    def wait_for(self, what: Any, within_s: float, meaning: str) -> None:
        until = time.monotonic() + within_s
        while not what():
            assert time.monotonic() < until, f"waited {within_s} s in vain for {meaning}; see {self.kits}"
            time.sleep(0.3)

    def meta(self, job: str) -> dict[str, Any]:
        """What the server says of a job; nothing where it is down."""
        try:
            session = self.session()
        except NoConnection:
            return {}
        try:
            return dict(session.get_job_meta(job))
        finally:
            session.close()

    def ended(self, job: str) -> str:
        """How a job ended; empty while it has not, or the server is down."""
        status = str(self.meta(job).get("status", ""))
        return status if status.startswith(("FINISHED", "FAILED")) else ""

    def submit(self, folder: Path) -> str:
        session = self.session()
        try:
            return session.submit_job(str(folder))
        finally:
            session.close()

    def download(self, job: str, into: Path) -> Path:
        """The server's folder of a job that has ended."""
        session = self.session()
        try:
            return Path(session.download_job_result(job, str(into))) / "workspace"
        finally:
            session.close()

    def audit(self, site: str, job: str = "") -> str:
        return (self.kits / site / job / "audit.log").read_text()

    def log(self, site: str, job: str = "") -> str:
        return (self.kits / site / job / "log.txt").read_text()

    def sent(self, site: str) -> list[bytes]:
        """Every message the site's NVFlare processes sent to anyone outside the site, before encryption."""
        messages = [m for f in (self.taps / site).glob("*.sent") for m in f.read_bytes().split(b"\n<message>")]
        return [m for m in messages if m and not re.search(rb"'cn__destination': '" + site.encode() + rb"[.']", m)]


def _set_up(local: Path, store: Path) -> None:
    """NVFlare's server keeps jobs under /tmp/nvflare and runs four at once, unless told otherwise."""
    file = local / "resources.json.default"
    text = file.read_text().replace("/tmp/nvflare/", f"{store}/").replace('"max_jobs": 4', '"max_jobs": 8')
    json.loads(text)
    file.write_text(text)
