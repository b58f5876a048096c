"""Reads files that may be anything.

What kind of file it is and how large is known before a byte is read: a FIFO, a device or a huge file is refused at
once.
"""

import os
import stat
from pathlib import Path
from typing import BinaryIO


def open_file(file: Path) -> BinaryIO:
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
