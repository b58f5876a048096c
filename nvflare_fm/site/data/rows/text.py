"""Texts of any size as lines, in bounded memory: their encoding, and what is packed with gzip.

An encoding that the site does not name follows from three rules that a person can check: a mark at the beginning says
it; else UTF-8, if more of the bytes beyond ASCII form UTF-8 than do not; else cp1252, as Western Windows writes it.
Detectors that compare frequencies of letters take German and Spanish in cp1252 for other code pages (docs/log.md). Here
a text with many letters beyond ASCII that is no UTF-8 is refused until the site names its encoding.
"""

import codecs
import gzip
import io
import re
import string
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from ....files import MIB, open_file
from . import ROW_LIMIT

_EXPANDS, _ALWAYS = 200, 64 * MIB  # a packed file holds at most so many times its size, or so many bytes
_BLOCK = 2**16
_MARKS = [  # UTF-32's begins with UTF-16's
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
]
_UTF8 = re.compile(rb"[\xc2-\xdf][\x80-\xbf]|[\xe0-\xef][\x80-\xbf]{2}|[\xf0-\xf4][\x80-\xbf]{3}")
_BEGUN = re.compile(rb"[\xc2-\xf4][\x80-\xbf]{0,2}\Z")
_HIGH = re.compile(rb"[\x80-\xff]")
_NO_TEXT = re.compile(rb"[\x81\x8d\x8f\x90\x9d\xff]")  # no letter of cp1252, and a ÿ that hardly a text has
_LETTERS = string.ascii_letters.encode()
_ENOUGH = 10_000  # characters beyond ASCII that decide
_WRONG = "\udcff"  # in place of bytes that are no text: no encoding has it, so the row is known as bad


def _mark_wrong(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return _WRONG, error.end


codecs.register_error("nvflare_fm_wrong", _mark_wrong)


class _Unpacked(io.RawIOBase):
    """What a packed file holds, up to a limit."""

    def __init__(self, packed: gzip.GzipFile, limit: int) -> None:
        self._packed, self._limit, self._left = packed, limit, limit

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        content = self._packed.read(min(len(buffer), _BLOCK))
        self._left -= len(content)
        if self._left < 0:
            raise ValueError(f"unpacked, it is larger than {self._limit} bytes")
        buffer[: len(content)] = content
        return len(content)


@contextmanager
def _bytes_of(file: Path) -> Iterator[IO[bytes]]:
    with open_file(file) as raw:
        if file.suffix.lower() == ".gz":
            limit = max(_ALWAYS, _EXPANDS * file.stat().st_size)
            yield io.BufferedReader(_Unpacked(gzip.GzipFile(fileobj=raw), limit), _BLOCK)
        else:
            yield raw


@contextmanager
def opened(file: Path, encoding: str) -> Iterator[IO[str]]:
    """The text of a file, packed or not. What is no text in that encoding is not `is_text`."""
    with _bytes_of(file) as content:
        codec = "utf-8-sig" if encoding == "utf-8" else encoding
        yield io.TextIOWrapper(content, encoding=codec, errors="nvflare_fm_wrong", newline="")


def is_text(value: str) -> bool:
    """Whether all of it was text in its encoding."""
    return _WRONG not in value


def first_characters(file: Path, encoding: str, characters: int) -> str:
    """Read the first `characters` of a text file."""
    with opened(file, encoding) as text:
        return text.read(characters)


def lines(file: Path, encoding: str) -> Iterator[str]:
    """The lines of a text, with their ends. One that is longer than a row may be is cut."""
    with opened(file, encoding) as text:
        while line := text.readline(ROW_LIMIT + 1):
            yield line
            while len(line) > ROW_LIMIT and line[-1] not in "\r\n":
                line = text.readline(ROW_LIMIT + 1)


def guess_encoding(file: Path) -> str:
    """The encoding that a text is most likely in.

    Raises:
        ValueError: it is neither UTF-8 nor Western.
    """
    with _bytes_of(file) as content:
        block = content.read(_BLOCK)
        for mark, encoding in _MARKS:
            if block.startswith(mark):
                return encoding
        if re.match(rb"(?:[^\0]\0){2}", block):
            return "utf-16-le"
        if re.match(rb"(?:\0[^\0]){2}", block):
            return "utf-16-be"
        return _guess_without_mark(content, block)


def _guess_without_mark(content: IO[bytes], block: bytes) -> str:
    utf8, other, letters, no_text = 0, 0, 0, False
    while block and utf8 + other < _ENOUGH:
        more, begun = content.read(_BLOCK), b""
        if not block.isascii():
            if more and (cut := _BEGUN.search(block)):
                block, begun = block[: cut.start()], cut[0]
            rest = _UTF8.sub(b"", block)
            utf8 += len(_UTF8.findall(block))
            other += len(_HIGH.findall(rest))
            no_text = no_text or bool(_NO_TEXT.search(rest))
        letters += len(block) - len(block.translate(None, delete=_LETTERS))
        block = begun + more
    if other <= utf8 or no_text:
        return "utf-8"
    if 3 * other > letters:
        raise ValueError("its text is neither UTF-8 nor Western (cp1252): set its encoding in the site file")
    return "cp1252"
