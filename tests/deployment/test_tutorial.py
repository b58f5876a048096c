"""Three hospitals and a company as a reader would: every block of the tutorial, in its order, in an empty folder."""

import os
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.deployment.system import ENVIRONMENT, EXAMPLE, SERVER, free_port

pytestmark = [pytest.mark.timeout(500), pytest.mark.slow]

ROOT = Path(__file__).parents[2]
TUTORIAL = ROOT / "docs" / "tutorials" / "three_hospitals.md"
HERE = Path("runs") / "oncology"  # where the tutorial works


def script(page: Path) -> str:
    """The page's blocks of shell and Python as one program that stops at the first failure."""
    blocks = re.findall(r"^```(sh|python)\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    parts = [text if language == "sh" else f"python - <<'BLOCK'\n{text}BLOCK\n" for language, text in blocks]
    return "set -euxo pipefail\n" + "".join(parts)


def ours(folder: Path) -> list[psutil.Process]:
    """What runs out of this folder."""
    return [p for p in psutil.process_iter(["cmdline"]) if any(str(folder) in w for w in p.info["cmdline"] or [])]


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A checkout to start in, a home of its own, and a port that nobody else has."""
    folder = tmp_path_factory.mktemp("reader")
    for name in ("home", "job_templates", ".venv"):
        (folder / name).mkdir()
    (folder / "job_templates" / EXAMPLE.name).write_text(EXAMPLE.read_text().replace("8002", str(free_port())))
    yield folder
    for process in ours(folder):
        process.kill()


@pytest.fixture(scope="module")
def said(reader: Path) -> str:
    """What the reader saw."""
    environment = ENVIRONMENT | {"HOME": str(reader / "home"), "TOKENIZERS_PARALLELISM": "false"}
    environment = {name: value for name, value in environment.items() if not name.startswith("NVFLARE_")}
    log = reader / "log.txt"
    with log.open("w") as output:
        done = subprocess.run(
            ["bash", "-c", script(TUTORIAL)],
            cwd=reader, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
        )  # fmt: skip
    assert done.returncode == 0, log.read_text()[-4000:]
    return log.read_text()


def test_every_command_of_the_tutorial_works_and_the_adapter_beats_the_base(said: str):
    before, after = re.search(r"^accuracy (\S+) → (\S+)$", said, re.MULTILINE).groups()
    assert float(after) > float(before) + 0.05


def test_poc_mode_runs_the_same_job_and_one_hospital_says_whom_it_does_not_work_for(said: str, reader: Path):
    rehearsal, real = said.split("nvflare provision -p project.yml", 1)
    assert "POC system stopped" in rehearsal
    assert "COMPLETED (FINISHED:COMPLETED)" in rehearsal
    assert "valley: refused: the job's submitter is not welcome at this site" in rehearsal
    assert "refused" not in real
    assert list((reader / HERE / "rehearsed").glob("*/workspace/adapters/best/adapter_model.safetensors"))
    assert not (reader / HERE / "poc").exists()


def test_the_monitor_shows_the_round_the_metrics_and_who_is_in(said: str):
    shown = re.findall(r"^status: RUNNING .* metrics: (.*)$", said, re.MULTILINE)
    assert any(re.search(r"round=1 accuracy=0\.\d+ loss=1\.\d+ sites_in=.+ sites_out=", line) for line in shown), shown


def test_nothing_of_it_is_left_running_or_kept_outside_its_folder(said: str, reader: Path):
    until = time.monotonic() + 40
    while (left := ours(reader)) and time.monotonic() < until:
        time.sleep(0.3)
    assert not [process.cmdline() for process in left]
    assert (reader / HERE / "company" / "store" / "jobs-storage").is_dir()
    assert (reader / HERE / "company" / SERVER / "audit.log").exists()
    assert os.path.commonpath([reader, *(reader / "home").rglob("*")]) == str(reader)
