"""A writer of a site's privacy budget, killed at every line in turn. In an interpreter without torch a fork is cheap.

python -m tests.budget_kills "two lines" FOLDER      ends with 0, and prints at how many lines it was killed
"""

import json
import os
import shutil
import sys
from pathlib import Path

from nvflare_fm.privacy.budget import NAME, Budget, Entry, read
from nvflare_fm.privacy.events import Event
from tests import kills

DELTA = 1e-5
CHEAP = Event(4.0, 0.01, 10)
STATES = ("nothing", "two lines", "a torn line", "a line that is not noted")


def entry(number: int = 0, event: Event = CHEAP, data: str = "notes", unit: str = "row", job: str = "job-1") -> Entry:
    return Entry(job, "lead@company.example", "company", number, data, unit, DELTA, (event,), "ab" * 32, 1000)


def budget(folder: Path, lines: int = 0) -> Budget:
    made = Budget(folder / NAME)
    for number in range(lines):
        made.charge(entry(number), "row", DELTA, None)
    return made


def rounds(made: Budget) -> list[int]:
    return [each.round for each in made.verify().entries]


def _begun(folder: Path, state: str) -> int:
    """A budget in this state; returns how many of its lines count."""
    made = budget(folder, {"nothing": 0, "two lines": 2}.get(state, 3))
    if state not in ("nothing", "two lines"):  # the writer of the third was killed before it could note it
        whole = made.file.read_bytes()
        made.head.write_text(json.dumps({"lines": 2, "seal": read(whole).seals[1]}))
        made.file.write_bytes(whole[:-10] if state == "a torn line" else whole)
    return 3 if state == "a line that is not noted" else 2 if state != "nothing" else 0


def killed_at_every_line(state: str, folder: Path) -> int:
    """Kill the writer at each line; returns how many lines there are.

    Raises:
        AssertionError: something left that is not on record, or the next writer cannot go on.
    """
    start, work, left = folder / "start", folder / "work", folder / "left"
    start.mkdir()
    known = _begun(start, state)

    def release() -> None:
        Budget(work / NAME).charge(entry(9), "row", DELTA, None)
        left.touch()

    line, ended, seen = 0, False, set()
    while not ended:
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(start, work)
        left.unlink(missing_ok=True)
        ended = kills.ends(release, line, "privacy/budget.py", "nvflare_fm/files.py", "budget_kills.py")
        found = rounds(Budget(work / NAME))
        assert found in ([*range(known)], [*range(known), 9]), (line, found)
        assert found[-1:] == [9] or not left.exists(), (line, found)
        seen.add(tuple(found))
        budget(work).charge(entry(10), "row", DELTA, None)  # and the next writer goes on
        assert rounds(Budget(work / NAME)) == [*found, 10], line
        line += 1
    assert len(seen) == 2, seen
    return line


if __name__ == "__main__":
    os.fsync = lambda descriptor: None  # a kill loses nothing that was written; only a power cut would
    print(killed_at_every_line(sys.argv[1], Path(sys.argv[2])))
