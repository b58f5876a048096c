"""A process that reads a stranger's ciphertexts once: TenSEAL and SEAL parse them in C++, and a crash ends it alone.

`python -m nvflare_fm.encryption.reader CONTEXT_BYTES COUNT …` takes on its standard input a context, and for each COUNT
the length of a row of ciphertexts as eight bytes, and the row. It may take a little more memory than a row. What it has
read to the end, its caller reads again for the sum.
"""

import subprocess
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress

from ..errors import FmError, WireError
from .ciphertexts import check
from .keys import Keys, read_keys

SPARE_BYTES = 2**30
_LONGEST_S = 120.0  # after it has taken the last row; it takes the next one when it has read the one before
_CODES = {3: "no_ciphertext", 4: "other_ciphertext"}  # by what the process ends with


def check_apart(keys: Keys, rows: Iterable[bytes | memoryview], counts: Sequence[int], site: str) -> None:
    """Have another process read what a site sent.

    Args:
        keys: the server's.
        rows: of ciphertexts, one in memory at a time.
        counts: numbers that were to be in each.

    Raises:
        WireError: names the site; it sent no such ciphertexts, or reading them ended the process.
    """
    command = [sys.executable, "-m", __name__, str(len(keys.data)), *map(str, counts)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert process.stdin
    with suppress(BrokenPipeError), process.stdin as pipe:
        pipe.write(keys.data)
        for row in rows:
            pipe.write(len(row).to_bytes(8, "little"))
            pipe.write(row)
    try:
        code = process.wait(_LONGEST_S)
    except subprocess.TimeoutExpired:
        process.kill()
        code = process.wait()
    if code:
        raise WireError(
            f"{site} sent ciphertexts that cannot be added; provision all kits at once, and update nvflare_fm there",
            f"the process that read them ended with {code}",
            code=_CODES.get(code, "ciphertext_crash"),
        )


def main() -> int:
    """Read the ciphertexts on the standard input; 0 if they are what they should be."""
    size, *counts = map(int, sys.argv[1:])
    pipe = sys.stdin.buffer
    keys = read_keys(pipe.read(size), secret=False, whose="the server")
    _limit_memory()
    try:
        for count in counts:
            check(keys, pipe.read(int.from_bytes(pipe.read(8), "little")), count)
    except FmError as error:
        return next((number for number, code in _CODES.items() if code == error.code), 1)
    return 0


def _limit_memory() -> None:
    """From now on `SPARE_BYTES` more than now: a few bytes can say that they unpack to many."""
    if sys.platform == "linux":
        import resource

        with open("/proc/self/statm", encoding="ascii") as file:
            now = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + SPARE_BYTES, now + SPARE_BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


if __name__ == "__main__":
    sys.exit(main())
