"""Each process of a running system killed at random moments: how the job ends, what is lost, whether the next works.

make faults        a quarter of an hour; writes the table of docs/explanation/faults.md to runs/faults.md
"""

import os
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from nvflare_fm.flare.recipe import FedPEFTRecipe
from tests.deployment import faults
from tests.deployment.conftest import PLAN, said
from tests.deployment.system import SERVER, System, free_port, project, provision
from tests.site import tiny

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

SEEDS = range(int(os.environ.get("FAULTS_SEEDS", "3")))
SITES, VICTIM = ("clinic-a", "clinic-b"), "clinic-b"
ROUNDS = 6
TABLE = Path("runs") / "faults.md"
HEAD = "killed | in round | the job ended as | after (s) | rounds lost | next job | after (s)"


@dataclass(frozen=True)
class Outcome:
    """What one kill did."""

    fault: str
    round: int  # in which it came
    status: str
    ended_after_s: float
    lost: int  # rounds that were over and are in no adapter; of the victim: rounds it is not in
    next: str
    next_after_s: float  # from the kill to the end of the job that goes on, or of a new one

    def row(self) -> str:
        cells = [self.fault, self.round, self.status, f"{self.ended_after_s:.0f}", self.lost, self.next]
        return " | ".join(map(str, [*cells, f"{self.next_after_s:.0f}"]))


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    folder = tmp_path_factory.mktemp("faults")
    base = tiny.save(folder / "base")
    sites: dict[str, Any] = {
        name: said(folder, name, {"base": {"path": str(base)}}, 9 * i) | {"limits": {"threads": 1}}
        for i, name in enumerate(SITES)
    }
    running = System(provision(folder, project(free_port(), sites)))
    try:
        yield running.start(list(SITES))
    finally:
        remaining = running.stop()
    assert not remaining, f"the system did not stop by itself: {remaining}"


@pytest.fixture(scope="module")
def table() -> Iterator[list[Outcome]]:
    rows: list[Outcome] = []
    yield rows
    TABLE.parent.mkdir(exist_ok=True)
    lines = [HEAD, " | ".join("---" for _ in HEAD.split(" | ")), *(row.row() for row in rows)]
    TABLE.write_text("".join(f"| {line} |\n" for line in lines))


def exported(folder: Path, name: str, rounds: int) -> Path:
    """A job that one site alone can carry on."""
    recipe = FedPEFTRecipe(name, num_rounds=rounds, min_sites=1, sites={site: {} for site in SITES}, **PLAN)
    recipe.export(str(folder))
    return folder / name


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("fault", faults.FAULTS)
def test_a_job_ends_and_the_next_one_works(
    system: System, table: list[Outcome], tmp_path: Path, fault: str, seed: int
) -> None:
    moment = random.Random(f"{fault}/{seed}")
    system.wait_for(lambda: system.connected() >= set(SITES), 120, "all sites to connect")
    job = system.submit(exported(tmp_path, "killed", ROUNDS))
    run = system.kits / SERVER / job
    before = moment.randint(1, 3)  # rounds that are over
    system.wait_for(lambda: len(faults.rounds(run)) >= before, 180, f"{before} rounds")
    time.sleep(moment.uniform(0, 3))  # a round takes about as long
    in_round = len(faults.rounds(run))
    faults.kill(system, fault, job, VICTIM)
    began = time.monotonic()
    system.wait_for(lambda: system.ended(job), 300, "the job to end")
    ended_after_s, status = time.monotonic() - began, system.ended(job)
    result = system.download(job, tmp_path)
    saved = faults.last_round(result)
    done = [line for line in faults.rounds(result) if line["round"] < ROUNDS]
    if status == "FINISHED:COMPLETED":
        lost, next_ = sum(VICTIM not in line["sites"] for line in done), "a new job"
        again = system.submit(exported(tmp_path / "new", "new", 1))
    else:
        lost, next_ = len(done) - saved - 1, "resumed"
        again = faults.resumed(system, job, tmp_path / "again")
    system.wait_for(lambda: system.ended(again), 300, f"{next_} to end")
    took_s = time.monotonic() - began
    table.append(Outcome(fault, in_round, status, ended_after_s, lost, f"{next_}: {system.ended(again)}", took_s))
    assert system.ended(again) == "FINISHED:COMPLETED"
    assert saved >= before - 1
    assert lost <= 1
    system.wait_for(lambda: not faults.left(system, job), 60, "every process of the job to end")
    both = faults.rounds(system.download(again, tmp_path)) if next_ == "resumed" else []
    assert [line["round"] for line in both] == (list(range(saved + 1, ROUNDS + 1)) if both else [])
