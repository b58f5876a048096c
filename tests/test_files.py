"""Files that may be anything are refused at once; what is written is never found half written."""

import json
import os
import socket
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nvflare_fm.files import JSON_LIMIT, open_file, read_bytes, read_json, read_object, write_text


@pytest.mark.timeout(5)
def test_what_is_no_regular_file_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    with socket.socket(socket.AF_UNIX) as server:
        os.chdir(tmp_path)  # a socket's path is short
        server.bind("socket")
    (tmp_path / "circle").symlink_to("circle")
    for name in ("pipe", "link", "socket", "circle", "nothing", "."):
        with pytest.raises((OSError, ValueError)):
            open_file(tmp_path / name)
    with pytest.raises(ValueError):
        open_file(Path("/dev/zero"))


def test_what_is_larger_than_it_may_be_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "sparse"
    with file.open("wb") as opened:
        opened.truncate(2**40)
    with pytest.raises(ValueError):
        read_bytes(file, 10)
    file.write_bytes(b"0123456789")
    assert read_bytes(file, 10) == b"0123456789"


NO_JSON = {
    "brackets": b"[" * 10_000,
    "objects": b'{"a":' * 10_000,
    "65 levels": b"[" * 65 + b"1" + b"]" * 65,
    "not UTF-8": b'{"a": "\xff"}',
    "empty": b"",
    "unfinished": b"{",
    "a long number": b"9" * 5_000,
    "20 MB": b" " * (20 * 2**20),
    "NUL": b"\x00",
    "a byte order mark": b"\xef\xbb\xbf{}",
}


@pytest.mark.parametrize("content", NO_JSON.values(), ids=NO_JSON)
def test_a_text_that_is_no_json_of_a_sane_size_is_a_value_error(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "a.json"
    file.write_bytes(content)
    with pytest.raises(ValueError):
        read_json(file)


def test_what_json_can_say_is_read(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    for said in (json.loads("[" * 64 + "1" + "]" * 64), {"a": [1, 2.5, None, "ü"]}, [], "x" * (JSON_LIMIT - 2)):
        file.write_text(json.dumps(said, ensure_ascii=False), encoding="utf-8")
        assert read_json(file) == said
    file.write_text("[1]")
    with pytest.raises(ValueError):
        read_object(file)


@settings(max_examples=20)  # each waits for the disk
@given(texts=st.lists(st.text(st.characters(codec="utf-8"), max_size=20), min_size=1, max_size=3))
def test_what_was_written_last_is_what_is_read(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    file = tmp_path_factory.mktemp("written") / "a.txt"
    for text in texts:
        write_text(file, text)
    assert file.read_bytes() == texts[-1].encode()
    assert [f.name for f in file.parent.iterdir()] == ["a.txt"]


def test_a_text_keeps_its_permissions_and_is_the_old_one_where_the_new_one_cannot_be_written(tmp_path: Path) -> None:
    file = write_text(tmp_path / "a.txt", "old")
    file.chmod(0o640)
    write_text(file, "new")
    assert file.stat().st_mode & 0o777 == 0o640
    with pytest.raises(UnicodeEncodeError):
        write_text(file, "half a surrogate: \ud800")
    assert file.read_text() == "new"
    assert [f.name for f in tmp_path.iterdir()] == ["a.txt"]
