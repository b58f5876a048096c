"""Job folders that may hold anything: they are read, or refused with a reason, soon and in little memory."""

import json
import os
import shutil
import tempfile
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nvflare_fm.errors import ConfigError, FmError
from nvflare_fm.flare.jobs.job import read_job
from nvflare_fm.job import hocon, job_files, templates
from tests.texts import PIECES, texts

SOON_S, LITTLE = 5.0, 64 * 2**20  # of CPU time, and bytes
PARTS = ("meta", "config/config/config_fed_server", "config/config/config_fed_client")
HOSTILE = (
    *(None, True, -1, 0, 10**9, 10**30, 0.5, 1e308, "", "exact", "lora", "../../etc/passwd", "{$HOME}", "x" * 10_000),
    *([], {}, [[[]]], {"path": "subprocess.Popen", "args": {}}, {"path": [], "args": []}, ["@ALL"], {"rule": "loss"}),
    *(
        {"path": "nvflare_fm.flare.executor.PeftExecutor", "args": {"settings": {"rank": "4"}}},
        "nvflare_fm.flare.stats.RoundStats",
    ),
)


@pytest.fixture(scope="module")
def job() -> Iterator[Path]:
    """A job as `nvflare-fm new` makes it; each case changes a copy of one of its files and puts it back."""
    root = Path(tempfile.mkdtemp())
    for name, text in templates.load("lora_text_classification").files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    assert read_job(root).name
    yield root
    shutil.rmtree(root)


def read(job: Path) -> None:
    began = time.process_time()
    with suppress(FmError):
        read_job(job)
    assert time.process_time() - began < SOON_S


def with_file(job: Path, part: str, data: bytes, ending: str = ".conf") -> None:
    """Reads the job with one of its files replaced."""
    kept = (job / f"{part}.conf").rename(job / "kept")
    try:
        (job / f"{part}{ending}").write_bytes(data)
        read(job)
    finally:
        (job / f"{part}{ending}").unlink(missing_ok=True)
        kept.rename(job / f"{part}.conf")


@st.composite
def edits(draw: st.DrawFn) -> tuple[str, int, int, str]:
    """Which file, where, how much goes, and what comes in its place."""
    return draw(st.sampled_from(PARTS)), draw(st.integers(0, 10**6)), draw(st.integers(0, 60)), draw(texts)


@given(edits())
def test_a_job_with_a_few_changed_characters(job: Path, edit: tuple[str, int, int, str]) -> None:
    part, at, cut, put = edit
    text = (job / f"{part}.conf").read_text()
    at %= len(text)
    with_file(job, part, (text[:at] + put + text[at + cut :]).encode())


@given(st.sampled_from(PARTS), st.integers(0, 200), st.sampled_from(HOSTILE), st.booleans())
def test_a_job_with_another_value_anywhere(job: Path, part: str, number: int, value: Any, as_json: bool) -> None:
    said = hocon.parse((job / f"{part}.conf").read_text())
    places = list(_places(said))
    inside, key = places[number % len(places)]
    inside[key] = value
    written = json.dumps(said)
    with_file(job, part, written.encode(), ".json" if as_json else ".conf")


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every place of a value, inside lists and objects."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        yield value, key
        if isinstance(inner, dict | list):
            yield from _places(inner)


@given(st.sampled_from(PARTS), st.binary(max_size=200), st.sampled_from([".conf", ".json"]))
def test_a_job_with_any_bytes(job: Path, part: str, data: bytes, ending: str) -> None:
    with_file(job, part, data, ending)


@given(st.lists(st.sampled_from(PIECES) | st.text(max_size=3), min_size=1, max_size=4), st.integers(1, 60_000))
def test_what_repeats_is_read_in_little_time_and_memory(pieces: list[str], times: int) -> None:
    data = ("".join(pieces) * times)[: job_files.MAX_BYTES].encode()[: job_files.MAX_BYTES]
    for name in ("a.conf", "a.json"):
        began = time.process_time()
        with suppress(ConfigError):
            job_files.parse_config(name, data)
        assert time.process_time() - began < SOON_S


@pytest.mark.parametrize("pattern", ["a=", "[", '"', "# c\n"])
def test_the_largest_file_takes_little_memory(pattern: str) -> None:
    data = (pattern * job_files.MAX_BYTES).encode()[: job_files.MAX_BYTES]
    for name in ("a.conf", "a.json"):
        tracemalloc.start()
        with suppress(ConfigError):
            job_files.parse_config(name, data)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert most < LITTLE


NAMES = st.text(st.sampled_from("ab./\\\n\x00-_ é"), max_size=12) | st.sampled_from(
    (*(f"{part}.{end}" for part in PARTS for end in ("json", "conf", "yml", "json.default")), "custom/x.yml", ".")
)


@given(st.lists(NAMES, max_size=8))
def test_an_app_with_any_names(names: list[str]) -> None:
    with suppress(ConfigError):
        job_files.check_app(names, lambda name: b"{}")


ODD = ("fifo", "link to nothing", "link to itself", "link out", "folder", "unreadable", "huge", "no folder")


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("part", PARTS)
def test_a_job_with_something_else_than_a_file(job: Path, tmp_path: Path, part: str, kind: str) -> None:
    copy = Path(shutil.copytree(job, tmp_path / "job"))
    file = copy / f"{part}.conf"
    file.unlink()
    if kind == "fifo":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    elif kind == "no folder":
        shutil.rmtree(copy / "config")
        (copy / "config").write_text("")
    elif kind == "huge":
        with file.open("wb") as made:
            made.truncate(2**40)
    elif kind == "unreadable":
        file.write_text("a = 1")
        file.chmod(0)
    else:
        file.symlink_to({"link out": "/etc/passwd", "link to itself": file.name}.get(kind, "nowhere"))
    read(copy)
