"""Reads files that may be anything, and writes files that nobody finds half written.

A file's kind and size are checked before its content is read: a FIFO, a device or a huge file is refused at once.
"""

import json
import os
import stat
from collections.abc import Iterable
from io import BufferedReader
from pathlib import Path
from typing import Any

MIB = 2**20
_DEPTH = 64  # levels of a configuration
JSON_LIMIT = 8 * MIB  # a configuration that names every layer of a large model stays below 1 MiB


def open_file(file: Path) -> BufferedReader:
    """Open a regular file for reading, and nothing else.

    Args:
        file: links are followed.
    Returns:
        The open file, at its start.
    Raises:
        OSError: there is no such file, or it may not be read.
        ValueError: it is a FIFO, a device, a socket or a folder.
    """
    descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # else a FIFO waits for who writes to it
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError(f"{file.name} is no regular file")
    return os.fdopen(descriptor, "rb")


def read_bytes(file: Path, limit: int) -> bytes:
    """Read a whole regular file of at most `limit` bytes.

    Raises:
        OSError: as `open_file`.
        ValueError: as `open_file`, or it is larger.
    """
    with open_file(file) as opened:
        content = opened.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"{file.name} is larger than {limit} bytes")
    return content


def read_json(file: Path, limit: int = JSON_LIMIT) -> Any:
    """Read a JSON file in UTF-8, of whatever content.

    Raises:
        OSError: as `open_file`.
        ValueError: as `read_bytes`, or it is no JSON, or nested too deeply.
    """
    try:
        content = json.loads(read_bytes(file, limit).decode())
    except RecursionError:
        raise ValueError(f"{file.name} is nested too deeply") from None
    level, depth = [content], 0
    while level := [part for value in level for part in _parts(value)]:
        depth += 1
        if depth > _DEPTH:  # what walks through it may need several calls a level
            raise ValueError(f"{file.name} is nested more than {_DEPTH} levels deep")
    return content


def _parts(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def read_object(file: Path, limit: int = JSON_LIMIT) -> dict[str, Any]:
    """Read a JSON file that must hold an object.

    Raises:
        OSError, ValueError: as `read_json`, or it holds something else.
    """
    content = read_json(file, limit)
    if not isinstance(content, dict):
        raise ValueError(f"{file.name} holds a {type(content).__name__}, where an object is needed")
    return content


def write_text(file: Path, text: str) -> Path:
    """Write `text` beside `file`, then rename: a reader finds the old text or the new one, also after a power cut.

    The file keeps its permissions; a link is replaced, not followed.

    Raises:
        OSError: the disk is full, or the folder may not be written to; the old text is still there.
    """
    beside = file.with_name(f".{file.name}.new")
    try:
        beside.write_text(text, encoding="utf-8")
        if file.exists():
            beside.chmod(stat.S_IMODE(file.stat().st_mode))
        sync(beside)
        beside.replace(file)
        sync(file.parent)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    return file


def sync(path: Path) -> None:
    """Have the disk hold what was written to a file, or a folder's list of names, before anything else happens."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
