"""A process that reads a stranger's ciphertexts once: TenSEAL and SEAL parse them in C++, and a crash ends it alone.

`python -m nvflare_fm.encryption.reader COUNT CONTEXT_BYTES` takes a context and a row of ciphertexts on its standard
input. It may take a little more memory than both. What it has read to the end, its caller reads again for the sum.
"""

import subprocess
import sys
from contextlib import suppress

from ..errors import FmError, WireError
from .ciphertexts import check
from .keys import Keys, read_keys

SPARE_BYTES = 2**30
_LONGEST_S, _LONGEST_S_OF_A_MIB = 60.0, 0.5
_CODES = {3: "no_ciphertext", 4: "other_ciphertext"}  # by what the process ends with


def check_apart(keys: Keys, row: bytes | memoryview, count: int, site: str) -> None:
    """Have another process read what a site sent.

    Args:
        keys: the server's.
        count: numbers that were to be sent.

    Raises:
        WireError: names the site; it sent no such ciphertexts, or reading them ended the process.
    """
    command = [sys.executable, "-m", __name__, str(count), str(len(keys.data))]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert process.stdin
    with suppress(BrokenPipeError), process.stdin as pipe:
        pipe.write(keys.data)
        pipe.write(row)
    try:
        code = process.wait(_LONGEST_S + _LONGEST_S_OF_A_MIB * len(row) / 2**20)
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
    count, size = int(sys.argv[1]), int(sys.argv[2])
    keys = read_keys(sys.stdin.buffer.read(size), secret=False, whose="the server")
    row = sys.stdin.buffer.read()
    _limit_memory()
    try:
        check(keys, row, count)
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
