"""A job folder in NVFlare's simulator, in a process of its own: its output goes to a log, its rounds to the caller.

The simulator makes a server and the sites on this machine, each in a process of its own. What real sites would refuse
is refused here, too: no code comes with the job, and each site has a site file.
"""

import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from nvflare.apis.fl_constant import SiteType
from nvflare.private.fed.simulator.simulator_const import SimulatorConstants

from ..errors import FmError
from ..job.at_home import PERSONAL
from ..record.result import last_errors
from ..record.round import FILE_NAME, SPECTRA, Round, read_line

SIMULATOR = "nvflare.private.fed.app.simulator.simulator"
_ENDS_WITHIN_S = 30.0  # from the order to stop to SIGKILL


@dataclass(frozen=True)
class Simulation:
    """One run.

    Args:
        job: a job's folder.
        workspace: emptied by the simulator, but for `local/`; each site has a folder there.
        sites: their names; each trains in a process of its own, all at once.
        gpu_config, log_config: as in NVFlare's simulator.
    """

    job: Path
    workspace: Path
    sites: Sequence[str]
    gpu_config: str | None = None
    log_config: str | None = None

    @property
    def log(self) -> Path:
        """What NVFlare and the trainers say; each site's own part is in `log.txt` of its folder."""
        return self.workspace.with_name(f"{self.workspace.name}.log")

    @property
    def results(self) -> Path:
        """The server's folder of the job."""
        return self.workspace / SiteType.SERVER / SimulatorConstants.JOB_NAME

    @property
    def personal(self) -> dict[str, Path]:
        """The adapters that sites have trained on for themselves, by site."""
        places = {site: self.workspace / site / SimulatorConstants.JOB_NAME / PERSONAL for site in self.sites}
        return {site: place for site, place in places.items() if place.is_dir()}

    def run(self) -> Iterator[Round]:
        """Run the job, and give each round as the server writes it down. Whoever stops listening stops the job.

        Raises:
            FmError: the job failed; with the last errors of its log.
        """
        self.log.parent.mkdir(parents=True, exist_ok=True)
        for name in (FILE_NAME, SPECTRA):
            (self.results / name).unlink(missing_ok=True)  # of an earlier run
        with self.log.open("wb") as log:
            process = subprocess.Popen(
                self._command(), stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        try:
            yield from _written(self.results / FILE_NAME, process)
        finally:
            _end(process)
        if process.returncode:
            why = "; ".join(last_errors(self.log)) or "its log does not say why"
            raise FmError(f"the job failed: {why}", f"log: {self.log}", code="simulation_failed")

    def _command(self) -> list[str]:
        count = str(len(self.sites))
        asked = ["-w", str(self.workspace.absolute()), "-c", ",".join(self.sites), "-n", count, "-t", count]
        gpu = ["-gpu", self.gpu_config] if self.gpu_config else []
        log = ["-l", self.log_config] if self.log_config else []
        return [sys.executable, "-m", SIMULATOR, str(self.job.absolute()), *asked, *gpu, *log]


def _written(file: Path, process: subprocess.Popen[bytes]) -> Iterator[Round]:
    seen = 0
    while True:
        ended = process.poll() is not None
        if file.exists():
            with file.open("rb") as opened:
                opened.seek(seen)
                while (line := opened.readline()).endswith(b"\n"):
                    seen += len(line)
                    yield read_line(line)
        if ended:
            return
        try:
            process.wait(0.3)
        except subprocess.TimeoutExpired:
            continue


def _end(process: subprocess.Popen[bytes]) -> None:
    """On SIGINT the simulator ends the processes it has started."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(_ENDS_WITHIN_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
