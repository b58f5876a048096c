"""The tests are tested: bugs planted on purpose are caught. The whole list by hand: python tests/planted_bugs.py."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests import planted_bugs


@pytest.mark.parametrize("bug", planted_bugs.BUGS, ids=lambda bug: f"{bug.file}: {bug.old[:40]}")
def test_every_planted_bug_still_has_its_place_in_the_code(bug):
    assert bug.fits(), f"{bug.old!r} must occur exactly once in {bug.file}"
    assert bug.old != bug.new


def test_a_sample_of_the_planted_bugs_is_caught():
    script = Path(planted_bugs.__file__)
    done = subprocess.run([sys.executable, script, "--sample", "4"], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 of 4 caught" in done.stdout
