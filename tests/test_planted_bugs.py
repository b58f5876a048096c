"""The tests are tested: bugs planted on purpose are caught. By hand: python tests/planted_bugs.py --match word."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import planted_bugs


def test_every_planted_bug_still_has_its_place_in_the_code():
    for bug in planted_bugs.BUGS:
        assert bug.fits(), f"{bug.old!r} must occur exactly once in {bug.file}"
        assert bug.old != bug.new
        assert all((Path(__file__).parent / f"{name}.py").exists() for name in bug.tests.split()), bug.tests


def test_a_sample_is_the_same_whatever_else_is_edited(monkeypatch: pytest.MonkeyPatch):
    sample = planted_bugs.chosen("", 20)
    monkeypatch.setattr(planted_bugs, "BUGS", [planted_bugs.Bug("new.py", "a", "b", "test_new"), *planted_bugs.BUGS])
    assert len({*planted_bugs.chosen("", 20)} - {*sample}) <= 1
    monkeypatch.setattr(planted_bugs, "BUGS", [bug for bug in planted_bugs.BUGS if bug not in sample[1:]])
    assert planted_bugs.chosen("", 1) == sample[:1]
    assert planted_bugs.chosen("", 20, seed=1) != sample


@pytest.mark.timeout(600)
def test_a_sample_of_the_planted_bugs_is_caught():
    """Of the algebra, whose tests take seconds; all the others by `make test-all`."""
    assert caught("--match", "file='algebra/lora.py'", "--sample", "2") == 2


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_the_planted_bugs_are_caught():
    """All of them, which takes an hour, or with PLANTED_BUGS=20 so many, drawn by PLANTED_SEED."""
    sample, seed = (os.environ.get(name, "0") for name in ("PLANTED_BUGS", "PLANTED_SEED"))
    assert caught("--sample", sample, "--seed", seed) == (int(sample) or len(planted_bugs.BUGS))


def caught(*options: str) -> int:
    script = [sys.executable, planted_bugs.__file__, *options]
    done = subprocess.run(script, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return int(done.stdout.splitlines()[-1].split(" of ")[0])
