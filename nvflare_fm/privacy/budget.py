"""What a site's data have cost in privacy, over all jobs: a file that only grows, each line sealed with those before.

A line is written, and known to be on the disk, before what it pays for leaves. So a crash can leave a line for an
update that never left, and never the other way round. The number of lines and the last seal are noted in a second file,
so that lines cut off at the end are missed as well. Who may write to both files can put older copies of both back: only
a seal noted elsewhere shows that.
"""

import errno
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from ..errors import PolicyError
from ..files import open_file, read_object, sync, write_text
from ..untrusted import Count, Digest, Word
from .accountant import epsilon
from .disclosed import Delta, Unit
from .events import Event, together

NAME, HEAD = "fm_privacy.jsonl", "fm_privacy.head"
ROW = "row"  # the smallest unit: whoever protects a patient protects each row
LONGEST_LINE, LARGEST = 256 * 1024, 64 * 2**20  # bytes of a line, and of the file
_WAITS_S, _LOOKS_S = 60.0, 0.05
_START = "0" * 64
_Line = Annotated[str, Field(strict=True, max_length=1000)]


@dataclass(frozen=True)
class Entry:
    """One release: what left, for whom, and what it cost."""

    job: Annotated[str, Field(strict=True, max_length=128)]
    submitter: _Line
    org: _Line
    round: Count
    data: Word  # alias of the data set
    unit: Unit
    delta: Delta  # of the job
    events: Annotated[tuple[Event, ...], Field(max_length=1000)]
    digest: Digest  # SHA-256 of what left; empty: not known
    bytes: Count  # of its tensors
    at: Annotated[str, Field(strict=True, max_length=40)] = ""  # date and time, UTC; the budget fills it in


@dataclass(frozen=True)
class Book:
    """The budget's file, read."""

    entries: tuple[Entry, ...] = ()
    seals: tuple[str, ...] = ()  # of each line
    length: int = 0  # bytes of whole lines
    torn: bool = False  # a last line is half written: its writer was killed, and nothing left for it

    @property
    def seal(self) -> str:
        """The last seal, which stands for all lines."""
        return self.seals[-1] if self.seals else _START

    def of(self, data: str, unit: str) -> tuple[Entry, ...]:
        """What counts against a data set: releases that protect this unit, or more than it."""
        return tuple(entry for entry in self.entries if entry.data == data and unit in (entry.unit, ROW))


_ENTRY = TypeAdapter(Entry)


class Budget:
    """The privacy that a site's data have cost.

    Args:
        file: it need not exist.
    """

    def __init__(self, file: Path) -> None:
        self.file, self.head = file, file.with_name(file.name.removesuffix(NAME) + HEAD)

    @classmethod
    def beside(cls, site_file: Path, name: str) -> "Budget":
        """The budget of the site whose file this is; `name` is what a site that is not simulated calls its file."""
        return cls(site_file.with_name(site_file.name.removesuffix(name) + NAME))

    def spent(self, data: str, unit: str, delta: float, job: str = "") -> float:
        """Compute the ε that a data set has cost.

        Args:
            delta: at which ε is told.
            job: what this job alone has cost; empty: all jobs.

        Raises:
            PolicyError: the file is damaged or cannot be read.
        """
        entries = self.verify().of(data, unit)
        return cost([entry for entry in entries if not job or entry.job == job], delta)

    def check(self, data: str, unit: str, delta: float, max_epsilon: float | None, events: Sequence[Event]) -> None:
        """Tell whether a data set can pay for `events`, before any work is done for them.

        Args:
            delta, max_epsilon: the site's; None: the site sets no limit.

        Raises:
            PolicyError: it cannot, or the file is damaged or cannot be read.
        """
        _check(self.verify(), data, unit, delta, max_epsilon, events)

    def charge(self, entry: Entry, unit: str, delta: float, max_epsilon: float | None) -> Book:
        """Put a release on record. Only when this returns may it leave.

        Args:
            unit, delta, max_epsilon: the site's.

        Returns:
            The file with the new line in it.
        Raises:
            PolicyError: the data set cannot pay for it, or the file is damaged or cannot be written; the old lines are
                still there.
        """
        entry = _typed(asdict(replace(entry, at=datetime.now(UTC).isoformat(timespec="seconds"))))
        try:
            with self._locked() as opened:
                book = self._read(opened)
                _check(book, entry.data, unit, delta, max_epsilon, entry.events)
                return self._append(opened, book, entry)
        except OSError as error:
            raise PolicyError(
                f"the site's privacy budget ({NAME}) cannot be written: {error.strerror}; nothing leaves without it, "
                "so its admin must make room or give the site's user the right to write it",
                f"{self.file}: {error}",
                code="budget_not_written",
            ) from None

    def verify(self) -> Book:
        """Read the file and verify every seal.

        Raises:
            PolicyError: a line was changed, added, moved or removed, or the file cannot be read.
        """
        try:
            if not self.file.exists() and not self.head.exists():
                return Book()
            with open_file(self.file) as opened, _lock(opened.fileno(), fcntl.LOCK_SH):
                return self._read(opened)
        except (OSError, ValueError) as error:
            raise _damaged("it cannot be read", f"{self.file}: {error}") from None

    def _read(self, opened: IO[bytes]) -> Book:
        opened.seek(0)
        content = opened.read(LARGEST + 1)
        if len(content) > LARGEST:
            raise _damaged(f"it is larger than {LARGEST} bytes", str(self.file))
        book = read(content)
        lines, seal = self._noted()
        ahead = len(book.entries) - lines  # a writer that was killed has written its line and not yet noted it
        if ahead not in (0, 1) or (lines and book.seals[lines - 1] != seal):
            raise _damaged(
                f"it has {len(book.entries)} lines and {HEAD} notes {lines}, or another last line", str(self.head)
            )
        return book

    def _noted(self) -> tuple[int, str]:
        if not self.head.exists():
            return 0, _START
        try:
            noted = read_object(self.head, 1024)
            lines, seal = noted["lines"], noted["seal"]
        except (OSError, ValueError, KeyError) as error:
            raise _damaged(f"{HEAD} cannot be read", f"{self.head}: {error}") from None
        if type(lines) is not int or not 0 < lines < 2**40 or not isinstance(seal, str):
            raise _damaged(f"{HEAD} is not as it is written", str(self.head))
        return lines, seal

    def _append(self, opened: IO[bytes], book: Book, entry: Entry) -> Book:
        line = sealed(entry, book.seal)
        if len(line) > LONGEST_LINE or book.length + len(line) > LARGEST:
            raise _damaged(f"it would be larger than {LARGEST} bytes", str(self.file))
        self._note(book)  # a killed writer may have written its line and not noted it
        descriptor = opened.fileno()
        os.ftruncate(descriptor, book.length)  # what a killed writer left of its line, for which nothing has left
        os.lseek(descriptor, book.length, os.SEEK_SET)
        if os.write(descriptor, line) < len(line):
            os.ftruncate(descriptor, book.length)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(descriptor)
        book = Book((*book.entries, entry), (*book.seals, _seal_of(line)), book.length + len(line))
        self._note(book)
        return book

    def _note(self, book: Book) -> None:
        if book.entries and (len(book.entries), book.seal) != self._noted():
            write_text(self.head, json.dumps({"lines": len(book.entries), "seal": book.seal}) + "\n")

    @contextmanager
    def _locked(self) -> Iterator[IO[bytes]]:
        """The file, open for reading and writing, for this process alone."""
        is_new = not self.file.exists()
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        with os.fdopen(os.open(self.file, flags, 0o600), "r+b", buffering=0) as opened:
            if is_new:
                sync(self.file.parent)
            with _lock(opened.fileno(), fcntl.LOCK_EX):
                yield opened


def cost(entries: Sequence[Entry], delta: float) -> float:
    """Compute the ε of several releases together."""
    if not (events := together(event for entry in entries for event in entry.events)):
        return 0.0
    return epsilon(events, delta)


def read(content: bytes) -> Book:
    """Read the lines of a budget's file, each with its seal.

    Raises:
        PolicyError: a line is not as it was written, or not where it was.
    """
    *lines, rest = content.split(b"\n")
    entries: list[Entry] = []
    seals: list[str] = []
    for number, line in enumerate(lines, 1):
        entry = _entry(line, number)
        if line + b"\n" != sealed(entry, seals[-1] if seals else _START):
            raise _damaged(f"line {number} is not the one that was written there", "")
        entries.append(entry)
        seals.append(_seal_of(line))
    return Book(tuple(entries), tuple(seals), len(content) - len(rest), bool(rest))


def sealed(entry: Entry, before: str) -> bytes:
    """Write a line; its seal depends on every line before, whose last seal is `before`."""
    said = json.dumps(asdict(entry), sort_keys=True, separators=(",", ":"))
    seal = hashlib.sha256(f"{before}{said}".encode()).hexdigest()
    return f'{{"entry":{said},"seal":"{seal}"}}\n'.encode()


def _seal_of(line: bytes) -> str:
    return str(json.loads(line)["seal"])


def _entry(line: bytes, number: int) -> Entry:
    try:
        if len(line) > LONGEST_LINE:
            raise ValueError
        said = json.loads(line)["entry"]
        return _typed({**said, "events": tuple(said["events"])})
    except (ValueError, ValidationError, RecursionError, KeyError, TypeError) as error:
        raise _damaged(f"line {number} is not as it is written", type(error).__name__) from None


def _typed(said: dict[str, Any]) -> Entry:
    return _ENTRY.validate_python(said)


def _check(book: Book, data: str, unit: str, delta: float, max_epsilon: float | None, events: Sequence[Event]) -> None:
    if max_epsilon is None:
        return
    new = Entry("", "", "", 0, data, unit, delta, tuple(events), "", 0)
    if cost([*book.of(data, unit), new], delta) > max_epsilon:
        raise PolicyError(
            "what the site's privacy budget for this data set (max_epsilon) has left does not pay for another round; "
            "ask for a lower privacy.epsilon, for fewer rounds or for other data, or have the site's admin raise "
            "max_epsilon",
            code="budget_spent",
        )


@contextmanager
def _lock(descriptor: int, kind: int) -> Iterator[None]:
    """Held by one writer, or by several readers; the system gives it back when its holder dies."""
    until = time.monotonic() + _WAITS_S
    while True:
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() > until:
                raise PolicyError(
                    "another job at the site has held its privacy budget for a minute; ask again in the next round",
                    code="budget_busy",
                ) from None
            time.sleep(_LOOKS_S)
    try:
        yield
    finally:
        fcntl.flock(descriptor, fcntl.LOCK_UN)


def _damaged(how: str, local: str) -> PolicyError:
    return PolicyError(
        f"the site's privacy budget ({NAME}) is damaged: {how}; nothing protected leaves until the site's admin has "
        "put both of its files back from a backup",
        local,
        code="budget_damaged",
    )
