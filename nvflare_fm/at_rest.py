"""A folder of files at rest: replaced as a whole, and verified when it is read.

`SHA256SUMS` beside the files has coreutils' format, so that `sha256sum -c SHA256SUMS` verifies a folder, too.
"""

import hashlib
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

from .files import open_file, read_bytes, sync

SUMS = "SHA256SUMS"
_NEW, _OLD = "new", "old"
_SUMS_LIMIT = 64 * 1024


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Give an empty folder to write files into; when the block ends they are the files of `folder`, with their sums.

    A kill or a power cut at any moment leaves the old files or the new ones, whole: `standing` finds them. The next
    writer removes what a killed one left.

    Raises:
        OSError: the disk is full, or the folder may not be written to; the old files are still there.
    """
    new, old = _beside(folder, _NEW), _beside(folder, _OLD)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir()
        yield new
        names = [file.name for file in new.iterdir()]
        (new / SUMS).write_text(sums(new, names), encoding="utf-8")
        for name in (*names, SUMS, ""):
            sync(new / name)
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
        new.rename(folder)  # a kill before this line leaves no `folder`, and the old files in `old`
        sync(folder.parent)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        with suppress(OSError):
            if old.exists() and not folder.exists():
                old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def standing(folder: Path) -> Path:
    """Where the files of `folder` lie: there, or aside if a writer was killed between its two renames."""
    old = _beside(folder, _OLD)
    return old if old.exists() and not folder.exists() else folder


def tidy(parent: Path) -> None:
    """Put every folder in `parent` in its place and remove the rest, after its writer was killed.

    Raises:
        OSError: the folder may not be written to.
    """
    for aside in list(parent.glob(f".*.{_OLD}")):
        folder = parent / aside.name[1:].removesuffix(f".{_OLD}")
        if folder.exists():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            aside.rename(folder)
    for unfinished in list(parent.glob(f".*.{_NEW}")):
        shutil.rmtree(unfinished, ignore_errors=True)


def sums(folder: Path, names: Iterable[str]) -> str:
    """Compute the content of `SHA256SUMS` for those of `names` that are in `folder`.

    Raises:
        OSError, ValueError: one is there and cannot be read, or is no regular file.
    """
    return "".join(f"{_digest(folder / name)}  {name}\n" for name in sorted(names) if (folder / name).exists())


def condition(folder: Path, names: Iterable[str]) -> Literal["whole", "damaged", "unrecorded"]:
    """Tell whether the files `names` of `folder` are, bit for bit, those that were written.

    Returns:
        "unrecorded" where the folder has no `SHA256SUMS`. Sums are no signature: who can change the files can as well
        change or remove these. They tell damage from the real thing.
    Raises:
        OSError, ValueError: a file is there and cannot be read, or is no regular file.
    """
    if not (folder / SUMS).exists():
        return "unrecorded"
    written = read_bytes(folder / SUMS, _SUMS_LIMIT)
    return "whole" if written == sums(folder, names).encode() else "damaged"


def _digest(file: Path) -> str:
    with open_file(file) as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _beside(folder: Path, state: str) -> Path:
    return folder.with_name(f".{folder.name}.{state}")
