"""A site's privacy budget never undercounts: whoever is killed when, whoever charges at once, whatever is changed."""

import multiprocessing
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from nvflare_fm.errors import PolicyError
from nvflare_fm.privacy import budget as budgets
from nvflare_fm.privacy.accountant import epsilon
from nvflare_fm.privacy.budget import HEAD, NAME, Book, Budget, Entry, cost, read, sealed
from nvflare_fm.privacy.events import Event
from tests.budget_kills import CHEAP, DELTA, STATES, budget, entry, rounds


def refused(work: Callable[[], object]) -> str:
    with pytest.raises(PolicyError) as error:
        work()
    assert "/" not in error.value.message.replace("and/or", "")
    return error.value.code


def test_what_is_charged_is_spent_together_and_by_job_and_can_be_read_again(tmp_path: Path):
    made = budget(tmp_path)
    assert made.spent("notes", "row", DELTA) == 0
    for number, job in enumerate(["a", "a", "b"]):
        made.charge(entry(number, job=job), "row", DELTA, None)
    of = {steps: epsilon([Event(4.0, 0.01, steps)], DELTA) for steps in (10, 20, 30)}
    assert made.spent("notes", "row", DELTA) == of[30]
    assert made.spent("notes", "row", DELTA, "a") == of[20]
    assert made.spent("notes", "row", DELTA, "b") == of[10]
    assert made.spent("visits", "row", DELTA) == 0
    assert [line.at[:2] for line in made.verify().entries] == ["20"] * 3
    assert stat.S_IMODE(made.file.stat().st_mode) == 0o600


def test_what_protects_a_patient_counts_for_rows_too_and_not_the_other_way_round(tmp_path: Path):
    made = budget(tmp_path)
    made.charge(entry(0, unit="patient_id"), "row", DELTA, None)
    made.charge(entry(1, unit="row"), "row", DELTA, None)
    assert made.spent("notes", "row", DELTA) == epsilon([Event(4.0, 0.01, 20)], DELTA)
    assert made.spent("notes", "patient_id", DELTA) == epsilon([CHEAP], DELTA)


def test_what_would_overdraw_is_refused_and_leaves_no_line(tmp_path: Path):
    made = budget(tmp_path, 1)
    limit = epsilon([Event(4.0, 0.01, 20)], DELTA)
    made.check("notes", "row", DELTA, limit, [CHEAP])
    made.charge(entry(1), "row", DELTA, limit)
    before = made.file.read_bytes()
    assert refused(lambda: made.check("notes", "row", DELTA, limit, [CHEAP])) == "budget_spent"
    assert refused(lambda: made.charge(entry(2), "row", DELTA, limit)) == "budget_spent"
    assert made.file.read_bytes() == before
    made.charge(entry(2, data="visits"), "row", DELTA, limit)  # another data set has a budget of its own


def test_a_job_of_another_delta_is_counted_at_the_sites(tmp_path: Path):
    made = budget(tmp_path)
    limit = epsilon([CHEAP], 1e-3)
    assert refused(lambda: made.charge(entry(0), "row", 1e-6, limit)) == "budget_spent"
    made.charge(entry(0), "row", 1e-3, limit)


@pytest.mark.parametrize("noise", [0.0, -1.0, float("nan"), float("inf")])
def test_what_is_no_event_is_never_written(tmp_path: Path, noise: float):
    with pytest.raises(ValidationError):
        budget(tmp_path).charge(entry(0, Event(noise, 0.5, 1)), "row", DELTA, None)
    assert not (tmp_path / NAME).exists()


# --- crashes


@pytest.mark.parametrize("state", STATES)
def test_a_writer_killed_at_any_line_never_lets_out_what_is_not_on_record(tmp_path: Path, state: str):
    command = [sys.executable, "-m", "tests.budget_kills", state, str(tmp_path)]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 80


@pytest.mark.parametrize("cut", [1, 2, 60])
def test_a_line_that_was_paid_for_and_is_cut_is_no_torn_line(tmp_path: Path, cut: int):
    made = budget(tmp_path, 3)
    made.file.write_bytes(made.file.read_bytes()[:-cut])
    assert refused(made.verify) == "budget_damaged"
    assert refused(lambda: made.charge(entry(9), "row", DELTA, None)) == "budget_damaged"


def test_where_the_disk_is_full_nothing_is_let_out_and_the_old_lines_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    made, write = budget(tmp_path, 2), os.write
    monkeypatch.setattr(budgets.os, "write", lambda descriptor, line: write(descriptor, line[:20]))
    assert refused(lambda: made.charge(entry(2), "row", DELTA, None)) == "budget_not_written"
    monkeypatch.undo()
    assert rounds(made) == [0, 1]
    made.charge(entry(2), "row", DELTA, None)
    assert rounds(made) == [0, 1, 2]


def test_where_the_note_cannot_be_written_nothing_is_let_out_and_the_line_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    made = budget(tmp_path, 2)
    monkeypatch.setattr(budgets, "write_text", full)
    for _ in range(3):  # and does not pile up lines that nobody notes
        assert refused(lambda: made.charge(entry(2), "row", DELTA, None)) == "budget_not_written"
    monkeypatch.undo()
    assert rounds(made) == [0, 1, 2]
    made.charge(entry(3), "row", DELTA, None)
    assert rounds(made) == [0, 1, 2, 3]


# --- at once


def _charge_until_refused(file: Path, job: str, limit: float) -> None:
    for number in range(100):
        try:
            Budget(file).charge(entry(number, job=job), "row", DELTA, limit)
        except PolicyError:
            return


def test_two_processes_that_charge_at_once_cannot_overdraw_together(tmp_path: Path):
    limit = epsilon([Event(4.0, 0.01, 120)], DELTA)
    fork = multiprocessing.get_context("fork")
    both = [fork.Process(target=_charge_until_refused, args=(tmp_path / NAME, job, limit)) for job in ("a", "b")]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
    entries = Budget(tmp_path / NAME).verify().entries
    assert len(entries) == 12
    assert cost(entries, DELTA) <= limit


def test_who_cannot_have_the_file_in_time_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    made = budget(tmp_path, 1)
    monkeypatch.setattr(budgets, "_WAITS_S", 0.0)
    with made._locked():
        assert refused(lambda: made.charge(entry(1), "row", DELTA, None)) == "budget_busy"
        assert refused(made.verify) == "budget_busy"


# --- changes


def test_lines_changed_moved_removed_or_put_in_are_noticed(tmp_path: Path):
    made = budget(tmp_path, 4)
    lines = made.file.read_bytes().splitlines(keepends=True)
    seals = made.verify().seals
    spoilt = {
        "changed": [lines[0].replace(b'"steps":10', b'"steps":1'), *lines[1:]],
        "last changed": [*lines[:3], lines[3].replace(b'"steps":10', b'"steps":1')],
        "removed": [lines[0], *lines[2:]],
        "first removed": lines[1:],
        "swapped": [lines[0], lines[2], lines[1], lines[3]],
        "twice": [*lines[:2], lines[1], *lines[2:]],
        "cut": lines[:3],
        "all cut": [],
        "put in": [*lines[:2], sealed(entry(7), seals[1]), *lines[2:]],
        "two put on": [*lines, one := sealed(entry(7), seals[3]), sealed(entry(8), read(one_whole(lines, one)).seal)],
        "new chain": [sealed(entry(7), "0" * 64)],
        "blank": [*lines[:2], b"\n", *lines[2:]],
        "written otherwise": [lines[0].replace(b'":', b'": ', 1), *lines[1:]],
        "a key more": [lines[0].replace(b'{"entry"', b'{"x":1,"entry"'), *lines[1:]],
    }
    for how, changed in spoilt.items():
        made.file.write_bytes(b"".join(changed))
        assert refused(made.verify) == "budget_damaged", how
        assert refused(lambda: made.charge(entry(9), "row", DELTA, None)) == "budget_damaged", how
    made.file.write_bytes(b"".join(lines))
    assert rounds(made) == [0, 1, 2, 3]


def one_whole(lines: list[bytes], more: bytes) -> bytes:
    return b"".join([*lines, more])


@pytest.mark.parametrize("head", ["", "{}", "[]", '{"lines": -1, "seal": ""}', '{"lines": 3, "seal": 7}', "x" * 5000])
def test_a_note_that_is_not_as_it_is_written_is_noticed(tmp_path: Path, head: str):
    made = budget(tmp_path, 3)
    made.head.write_text(head)
    assert refused(made.verify) == "budget_damaged"


def test_one_of_the_two_files_alone_is_no_budget(tmp_path: Path):
    made = budget(tmp_path, 3)
    for gone in (made.file, made.head):
        kept = gone.read_bytes()
        gone.unlink()
        assert refused(made.verify) == "budget_damaged"
        assert refused(lambda: made.charge(entry(3), "row", DELTA, None)) == "budget_damaged"
        gone.write_bytes(kept)
    assert rounds(made) == [0, 1, 2]


def test_older_copies_of_both_files_are_seen_by_a_seal_that_was_noted_elsewhere_alone(tmp_path: Path):
    """What the chain cannot show."""
    made = budget(tmp_path, 2)
    old = made.file.read_bytes(), made.head.read_bytes()
    noted = made.charge(entry(2), "row", DELTA, None).seal
    made.file.write_bytes(old[0])
    made.head.write_bytes(old[1])
    assert noted not in made.verify().seals


def test_what_is_no_file_is_refused_at_once(tmp_path: Path):
    made = budget(tmp_path)
    os.mkfifo(made.file)
    assert refused(made.verify) == "budget_damaged"
    assert refused(lambda: made.charge(entry(), "row", DELTA, None)) in ("budget_not_written", "budget_damaged")
    made.file.unlink()
    (tmp_path / "elsewhere").touch()
    made.file.symlink_to(tmp_path / "elsewhere")
    assert refused(lambda: made.charge(entry(), "row", DELTA, None)) == "budget_not_written"


@given(
    events=st.lists(
        st.builds(Event, st.floats(0.5, 50), st.floats(1e-4, 1.0), st.integers(1, 10**6)), min_size=1, max_size=3
    ),
    who=st.text(st.characters(codec="utf-8"), max_size=20),
)
def test_a_line_comes_back_as_it_was_written(events: list[Event], who: str):
    written = Entry("job", who, who, 1, "notes", "Fall-Nr. ü", DELTA, tuple(events), "", 0, "2026")
    line = sealed(written, "0" * 64)
    assert read(line).entries == (written,)
    assert read(line + line[:-1]) == Book((written,), read(line).seals, len(line), True)


def test_a_line_and_its_note_are_on_the_disk_before_what_they_pay_for_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    made, held, sync = budget(tmp_path, 1), [], os.fsync

    def watched(descriptor: int) -> None:
        held.append((Path(os.readlink(f"/proc/self/fd/{descriptor}")).name, made.file.read_bytes().count(b"\n")))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    made.charge(entry(1), "row", DELTA, None)
    assert held == [(NAME, 2), (f".{HEAD}.new", 2), (tmp_path.name, 2)]
