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
WITHIN_S = 600
TABLE = Path("runs") / "faults.md"
HEAD = "killed | in round | job ended as | rounds lost | rounds without the site | next round (s) | next job"


@dataclass(frozen=True)
class Outcome:
    """What one kill cost."""

    fault: str
    round: int  # in which it came
    status: str
    lost: int  # rounds that were over and are in no adapter
    without: int  # rounds in which the site whose process was killed has no part
    next_round_s: float  # from the kill until a later round is over, in the same job or in the one that goes on
    next: str

    def row(self) -> str:
        cells = [self.fault, self.round, self.status, self.lost, self.without, f"{self.next_round_s:.0f}", self.next]
        return " | ".join(map(str, cells))


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
    in_round = len(faults.rounds(run))  # counted from 0
    faults.kill(system, fault, job, VICTIM)
    began = time.monotonic()

    def over(name: str, rounds: int) -> bool:
        return bool(system.ended(name)) or len(faults.rounds(system.kits / SERVER / name)) > rounds

    system.wait_for(lambda: over(job, in_round), WITHIN_S, "the job to end or to go on")
    took_s = time.monotonic() - began
    system.wait_for(lambda: system.ended(job), WITHIN_S, "the job to end")
    status, result = system.ended(job), system.download(job, tmp_path)
    saved, done = faults.last_round(result), [line for line in faults.rounds(result) if line["round"] < ROUNDS]
    if status == "FINISHED:COMPLETED":
        next_, again = "a new one", system.submit(exported(tmp_path / "new", "new", 1))
    else:
        next_, again = "resumed", faults.resumed(system, job, tmp_path / "again")
        system.wait_for(lambda: over(again, 0), WITHIN_S, "a round of the job that goes on")
        took_s = time.monotonic() - began
    system.wait_for(lambda: system.ended(again), WITHIN_S, f"{next_} to end")
    after = [line for line in faults.rounds(system.download(again, tmp_path)) if next_ == "resumed"]
    trained = {line["round"]: line for line in [*done[: saved + 1], *after] if line["round"] < ROUNDS}
    without = sum(VICTIM not in line["sites"] for line in trained.values())
    said = f"{next_}: {system.ended(again)}"
    table.append(Outcome(fault, in_round, status, len(done) - saved - 1, without, took_s, said))
    assert system.ended(again) == "FINISHED:COMPLETED"
    assert sorted(trained) == list(range(ROUNDS))
    assert len(done) - saved - 1 <= 1  # a round whose adapter was not yet saved
    assert without <= {"a site": ROUNDS - in_round, "a site's process of the job": 1, "a trainer": 1}.get(fault, 0)
    system.wait_for(lambda: not faults.left(system, job), 60, "every process of the job to end")
