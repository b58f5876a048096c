"""`nvflare-fm site budget`, as a site's IT types it."""

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from nvflare_fm.cli import app
from nvflare_fm.privacy.events import Event
from nvflare_fm.site.offer.site_config import FILE_NAME
from tests.budget_kills import DELTA, budget, entry


def typed(kit: Path, *words: str) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, ["site", "budget", "--kit", str(kit), *words])


@pytest.fixture
def kit(tmp_path: Path) -> Path:
    (tmp_path / "local").mkdir()
    (tmp_path / "local" / FILE_NAME).write_text("privacy: {max_epsilon: 8.0}\n")
    return tmp_path


def test_what_each_data_set_has_cost_is_shown_by_job_and_the_seal_can_be_noted(kit: Path):
    made = budget(kit / "local", 2)
    made.charge(entry(2, job="job-2"), "row", DELTA, None)
    made.charge(entry(0, Event(1.0, 0.01, 20), "visits", "patient_id", "job-2"), "row", DELTA, None)
    done = typed(kit)
    assert done.exit_code == 0, done.output
    notes, *_ = [line for line in done.stdout.splitlines() if line.startswith("notes")]
    assert notes == f"notes, unit row: ε {made.spent('notes', 'row', DELTA):.4g} of 8, at δ 1e-05"
    rows = [line.split() for line in done.stdout.splitlines() if line.strip().startswith("job-")]
    costs = [("notes", "row", "job-1"), ("notes", "row", "job-2"), ("visits", "patient_id", "job-2")]
    expected = [f"{made.spent(data, unit, DELTA, job):.4g}" for data, unit, job in costs]
    cells = [[cell for cell in row if cell != "│"] for row in rows]
    assert [(row[0], row[1], row[2], row[-2], row[-1]) for row in cells] == [
        (job, "lead@company.example", "company", count, cost)
        for (_, _, job), count, cost in zip(costs, ("2", "1", "1"), expected, strict=True)
    ]
    seal = made.verify().seal
    assert f"seal: {seal}" in done.stdout
    assert "the account is whole: 4 lines" in done.stdout
    assert typed(kit, "--noted", made.verify().seals[1]).exit_code == 0
    gone = typed(kit, "--noted", "0" * 64)
    assert gone.exit_code == 1
    assert "seal_not_found" in str(gone.exception) + gone.output


def test_an_account_that_is_damaged_is_not_shown_as_if_it_were_whole(kit: Path):
    made = budget(kit / "local", 3)
    made.file.write_bytes(made.file.read_bytes().replace(b'"steps":10', b'"steps":1', 1))
    done = typed(kit)
    assert done.exit_code == 1
    assert "budget_damaged" in str(done.exception) + done.output
    assert "whole" not in done.stdout


def test_a_site_without_jobs_under_privacy_has_spent_nothing(kit: Path):
    done = typed(kit)
    assert done.exit_code == 0
    assert "the account is whole: 0 lines" in done.stdout
    assert not (kit / "local" / "fm_privacy.jsonl").exists()
    nowhere: Any = typed(kit / "local")
    assert nowhere.exit_code == 1


def test_a_half_written_line_is_said_not_to_count(kit: Path):
    made = budget(kit / "local", 2)
    with made.file.open("ab") as opened:
        opened.write(b'{"entry":{"at"')
    assert "a half-written line at its end, for which nothing left, does not count" in typed(kit).stdout
