"""The check for a GPU machine, tried on what is here with tiny models: each part measures what it is to measure."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

CHECK = Path(__file__).parent / "check.py"
MEASURES = {
    "versions": {"versions", "machine", "bitsandbytes"},
    "model1": {"model"},
    "step1": {"loaded", "loaded plainly", "step", "logits at once"},
    "tests": {"tests"},
    "federation": {"round", "federation"},
    "mixed": {"site", "mixed"},
    "model8": {"model"},
    "step8": {"loaded", "loaded plainly", "step"},
    "memory": {"measuring", "memory"},
    "oom": {"too much", "after it"},
    "methods": {"methods"},
    "merge": {"merge"},
    "memory8": {"memory"},
}


def measured(folder: Path, *options: str) -> tuple[int, list[dict[str, Any]]]:
    env = os.environ | {"OUT": str(folder / "out"), "GPU_WORK": str(folder / "work")}
    done = subprocess.run([sys.executable, CHECK, "--tiny", *options], env=env, capture_output=True, text=True)
    lines = [json.loads(line) for line in (folder / "out" / "results.jsonl").read_text().splitlines()]
    assert done.stdout.splitlines() == [json.dumps(line) for line in lines], done.stderr
    return done.returncode, lines


def test_a_part_prints_its_measurements_and_how_it_ended(tmp_path: Path) -> None:
    rc, lines = measured(tmp_path, "--only", "merge")
    assert rc == 0
    assert [(line["part"], line["what"]) for line in lines] == [("merge", "merge"), ("merge", "end")]
    assert lines[0]["all_blocks_s"] > 0


def test_every_part_measures_what_it_is_to_measure(tmp_path: Path) -> None:
    rc, lines = measured(tmp_path, "--budget", "1500")
    assert [line for line in lines if line["what"] in ("failed", "left out")] == []
    assert rc == 0
    for part, whats in MEASURES.items():
        assert {line["what"] for line in lines if line["part"] == part} >= whats | {"end"} - {"model"}, part
    assert all(line["rc"] == 0 for line in lines if line["what"] == "end")
    steps = [line for line in lines if line["what"] == "step"]
    assert all(line["losses"]["ours"] == pytest.approx(line["losses"]["plain"], rel=0.05) for line in steps)


def test_a_part_that_takes_too_long_is_ended_and_the_others_go_on(tmp_path: Path) -> None:
    rc, lines = measured(tmp_path, "--only", "federation,versions", "--budget", "11")
    assert rc == 1
    ends = {line["part"]: line for line in lines if line["what"] in ("end", "left out")}
    assert str(ends["federation"]["rc"]).startswith("stopped after")
    assert ends["versions"]["what"] == "left out"
