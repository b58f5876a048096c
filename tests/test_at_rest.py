"""A saved adapter is whole or known not to be: whichever bit flips, whoever kills its writer, whatever is there."""

import json
import multiprocessing
import os
import resource
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from nvflare_fm import at_rest
from nvflare_fm.adapter import Adapter
from nvflare_fm.aggregation.step import Memory
from nvflare_fm.errors import ModelError
from nvflare_fm.export import folder as export
from tests import kills
from tests.flare.messages import MANIFEST, adapter, same

FLIPS = 300


def remembered(seed: int) -> export.Saved:
    memory = Memory(adapter(seed, rank=2), {"head": torch.full((2,), float(seed))})
    return export.Saved(adapter(seed), MANIFEST, seed, None, {"rule": "adam"}, memory)


def saved(folder: Path, seed: int = 1) -> Path:
    return export.write_adapter(folder, remembered(seed))


def refused(folder: Path) -> str:
    """The code under which reading `folder` fails; empty: it does not."""
    try:
        export.read_adapter(folder)
    except ModelError as error:
        return error.code if str(folder.parent) not in error.message else "its path is told"
    return ""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("whole") / "last")


@settings(max_examples=FLIPS)
@given(data=st.data())
def test_any_flipped_bit_is_noticed(whole: Path, data: st.DataObject) -> None:
    files = sorted(whole.iterdir())
    assert len(files) == len(export.FILES)
    place = data.draw(st.integers(0, 8 * sum(file.stat().st_size for file in files) - 1))
    for file in files:
        if place < 8 * file.stat().st_size:
            break
        place -= 8 * file.stat().st_size
    content = bytearray(file.read_bytes())
    content[place // 8] ^= 1 << place % 8
    try:
        file.write_bytes(content)
        assert refused(whole) == "adapter_damaged"
    finally:
        content[place // 8] ^= 1 << place % 8
        file.write_bytes(content)
    assert not refused(whole)


@pytest.mark.parametrize("name", [export.STEP, export.WEIGHTS])
def test_a_file_that_was_there_and_is_gone_or_was_exchanged_is_noticed(tmp_path: Path, name: str) -> None:
    one, other = saved(tmp_path / "one"), saved(tmp_path / "other", seed=2)
    shutil.copyfile(other / name, one / name)
    assert refused(one) == "adapter_damaged"
    (one / name).unlink()
    assert refused(one) in ("adapter_damaged", "adapter_unreadable")


def test_an_adapter_from_before_there_were_sums_is_read_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = export.write_adapter(tmp_path / "last", export.Saved(adapter(1), MANIFEST))
    (folder / at_rest.SUMS).unlink()
    assert same(export.read_adapter(folder).adapter, adapter(1))
    assert at_rest.SUMS in caplog.text


def test_coreutils_verifies_the_same_sums(whole: Path) -> None:
    subprocess.run(["sha256sum", "--check", "--strict", at_rest.SUMS], cwd=whole, check=True, capture_output=True)


def test_what_the_servers_step_remembers_comes_back_bit_for_bit(whole: Path) -> None:
    after = export.read_adapter(whole)
    before = remembered(1)
    assert after.step == before.step
    assert same(after.memory.change, before.memory.change)
    assert after.memory.square.keys() == before.memory.square.keys()
    assert all(torch.equal(after.memory.square[n], v) for n, v in before.memory.square.items())


# --- killed


MEMORY = Path("/dev/shm")
SMALL = multiprocessing.get_context("forkserver")  # a process that tests share is large, and takes long to fork
SMALL.set_forkserver_preload([__name__])


@pytest.mark.parametrize("before", ["the old one", "nothing", "what a killed writer left"])
def test_a_writer_killed_at_any_line_leaves_the_old_adapter_or_the_new_one(before: str) -> None:
    """In memory, where there is such a folder: a kill loses nothing that the kernel has, so no disk is waited for."""
    with TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as folder:
        process = SMALL.Process(target=check_every_line, args=(Path(folder), before))
        process.start()
        process.join()
    assert process.exitcode == 0


def check_every_line(tmp_path: Path, before: str) -> None:
    start, work, last = tmp_path / "start", tmp_path / "work", tmp_path / "work" / "last"
    start.mkdir()
    if before == "the old one":
        saved(start / "last", 1)
    if before == "what a killed writer left":
        saved(start / ".last.old", 1)
        saved(start / ".last.new", 3)
    line, ended, ends = 0, False, set()
    while not ended:
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(start, work)
        ended = kills.ends(lambda: saved(last, 2), line, "at_rest.py", "shutil.py")
        if refused(last):
            assert before == "nothing"
            ends.add("nothing")
        else:
            found = export.read_adapter(last).adapter
            assert same(found, adapter(1)) or same(found, adapter(2))
            ends.add("new" if same(found, adapter(2)) else "old")
            at_rest.tidy(work)
            assert [f.name for f in work.iterdir()] == ["last"]
            assert same(export.read_adapter(last).adapter, found)
        line += 1
    assert ends == {"nothing" if before == "nothing" else "old", "new"}
    assert line > 40


@pytest.mark.parametrize("left", [[".last.old"], [".last.new"], [".last.old", ".last.new"], ["last", ".last.old"]])
def test_the_next_writer_removes_what_a_killed_one_left(tmp_path: Path, left: list[str]) -> None:
    for name in left:
        saved(tmp_path / name, 1)
    saved(tmp_path / "last", 2)
    assert [f.name for f in tmp_path.iterdir()] == ["last"]
    assert same(export.read_adapter(tmp_path / "last").adapter, adapter(2))


# --- nothing more can be written


def in_child(work: Callable[[], str]) -> str:
    """What `work` returns in a child of its own, whose limits are nobody else's."""
    read, write = os.pipe()
    if not (child := os.fork()):
        try:
            said = work()
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        os.write(write, said.encode())
        os._exit(0)
    os.close(write)
    os.waitpid(child, 0)
    with os.fdopen(read) as pipe:
        return pipe.read()


@pytest.mark.parametrize("room", [0, 100, 700])
def test_a_full_disk_is_an_error_and_the_old_adapter_is_still_there(tmp_path: Path, room: int) -> None:
    last = saved(tmp_path / "last", 1)

    def write() -> str:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))  # the kernel then answers as when the disk is full
        try:
            export.write_adapter(last, export.Saved(adapter(2, rank=4), MANIFEST))
        except ModelError as error:
            return error.code
        return ""

    assert in_child(write) == "adapter_not_saved"
    assert same(export.read_adapter(last).adapter, adapter(1))
    assert [f.name for f in tmp_path.iterdir()] == ["last"]


def test_a_folder_that_may_not_be_written_to_is_an_error(tmp_path: Path) -> None:
    last = saved(tmp_path / "last", 1)

    def write() -> str:
        if os.geteuid() == 0:
            os.setresuid(65534, 65534, 65534)
        try:
            export.write_adapter(last, export.Saved(adapter(2), MANIFEST))
        except ModelError as error:
            return error.code
        return ""

    for folder in (tmp_path, *tmp_path.parents[:-2]):
        folder.chmod(folder.stat().st_mode | 0o111)
    tmp_path.chmod(0o555)
    try:
        assert in_child(write) == "adapter_not_saved"
    finally:
        tmp_path.chmod(0o755)
    assert same(export.read_adapter(last).adapter, adapter(1))


# --- what lies there is no adapter


def fifo(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def circle(file: Path) -> None:
    file.unlink()
    file.symlink_to(file.name)


def folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def device(file: Path) -> None:
    file.unlink()
    file.symlink_to("/dev/zero")


def holding(content: bytes) -> Callable[[Path], object]:
    return lambda file: file.write_bytes(content)


STRANGE: dict[str, Callable[[Path], object]] = {
    "a FIFO": fifo,
    "a link to itself": circle,
    "a folder": folder,
    "a device": device,
    "20 MB of text": holding(b"x" * 20 * 2**20),
    "10,000 brackets": holding(b"[" * 10_000),
    "not UTF-8": holding(b'{"\xff": 1}'),
    "nothing": holding(b""),
    "a list": holding(b"[1]"),
    "a header of 2⁶³ bytes": holding((2**63).to_bytes(8, "little") + b"{}"),
    "a header of 100 MB": lambda file: file.write_bytes((10**8).to_bytes(8, "little") + b" " * 10**8),
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("with_sums", [True, False], ids=["sums", "no sums"])
@pytest.mark.parametrize("name", [*export.NEEDED, export.STEP, at_rest.SUMS])
@pytest.mark.parametrize("kind", STRANGE)
def test_a_file_of_another_kind_is_an_error_with_a_code(tmp_path: Path, kind: str, name: str, with_sums: bool) -> None:
    last = saved(tmp_path / "last")
    STRANGE[kind](last / name)
    if not with_sums and name != at_rest.SUMS:
        (last / at_rest.SUMS).unlink()
    code = refused(last)
    not_there = kind == "a link to itself" and (name == at_rest.SUMS or (name == export.STEP and not with_sums))
    assert code in ("adapter_damaged", "adapter_unreadable") or not_there


def without_sums(folder: Path, name: str, content: str | bytes) -> str:
    (folder / at_rest.SUMS).unlink(missing_ok=True)
    (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return refused(folder)


@pytest.mark.parametrize("alpha", [None, "8", float("nan"), True, [8]])
def test_a_configuration_without_a_usable_scale_is_an_error(tmp_path: Path, alpha: Any) -> None:
    for config in ({"lora_alpha": alpha}, {}):
        assert without_sums(saved(tmp_path / "last"), export.CONFIG, json.dumps(config)) == "adapter_unreadable"


@pytest.mark.parametrize(
    "tensors",
    [
        {"x.lora_A.weight": torch.zeros(2, 3), "x.lora_B.weight": torch.zeros(4, 3)},
        {"x.lora_A.weight": torch.zeros(()), "x.lora_B.weight": torch.zeros(())},
        {"x.lora_A.weight": torch.zeros(0, 3), "x.lora_B.weight": torch.zeros(4, 0)},
        {"x.lora_B.weight": torch.zeros(4, 2)},
        {"v": torch.zeros(3, dtype=torch.int64)},
        {"v": torch.zeros(3, dtype=torch.complex64)},
        {"v": torch.zeros(3).to(torch.float8_e4m3fn)},
    ],
    ids=["ranks", "scalars", "rank 0", "half a pair", "integers", "complex", "float8"],
)
def test_tensors_that_make_no_adapter_are_an_error(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    assert without_sums(saved(tmp_path / "last"), export.WEIGHTS, save(tensors)) == "adapter_unreadable"


def test_an_empty_memory_leaves_no_file(tmp_path: Path) -> None:
    folder = export.write_adapter(tmp_path / "last", export.Saved(Adapter(dense={"v": torch.ones(3)}), MANIFEST))
    assert sorted(export.files_of(folder)) == sorted(f.name for f in folder.iterdir())
    assert not (folder / export.STEP).exists()
