"""A vector of numbers as ciphertexts in one row of bytes; sums of such rows; and what a stranger's bytes must be.

A row is the length of each ciphertext as four bytes, little-endian, then the ciphertexts. How many there are follows
from how many numbers there are, so nothing in the row decides what is read.

The server multiplies by the sites' shares, which it knows, and adds. TenSEAL then rescales each product: that takes
the last prime off, so a sum has about half the bytes of what a site sends, and needs no division at the sites.
"""

import struct
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy
from numpy.typing import NDArray

from ..errors import WireError
from .keys import LARGEST, Keys, tenseal

Numbers = NDArray[numpy.float64]
_LENGTH = numpy.dtype("<u4")
FRESH, SUMMED = (0,), (1,)  # primes of a ciphertext that are used up
_TINY = 2.0**-30  # of a share: the scale has no room for less


def chunks(keys: Keys, count: int) -> list[int]:
    """How many of `count` numbers are in each ciphertext: all slots, and what is left in the last."""
    whole, left = divmod(count, keys.slots)
    return [keys.slots] * whole + [left] * (left > 0)


def encrypted(keys: Keys, numbers: Numbers) -> bytes:
    """Encrypt numbers, of which none is larger than `LARGEST`, with the secret key.

    Raises:
        WireError: a number is larger, or not finite.
    """
    if not (numpy.abs(numbers) <= LARGEST).all():  # also where one is no number
        raise WireError(
            f"a number to be encrypted is not finite or beyond ±{LARGEST:g}; training diverged, so lower the learning "
            "rate or look at the data",
            code="too_large_to_encrypt",
        )
    library, at = tenseal(), 0
    made = []
    for count in chunks(keys, len(numbers)):
        scaled = (numbers[at : at + count] * keys.factor).tolist()
        made.append(library.ckks_vector(keys.context, scaled).serialize())
        at += count
    return _row(made)


def weighted_sum(keys: Keys, rows: Sequence[bytes | memoryview], shares: Sequence[float], count: int) -> bytes:
    """Σ shareₖ · rowₖ, of rows with `count` numbers each, without reading one. One ciphertext of all is held at a time.

    Args:
        rows: as `encrypted` makes them.
        shares: public, at least 0; not all 0.

    Raises:
        WireError: a row does not hold such ciphertexts.
    """
    counted = [(row, share) for row, share in zip(rows, shares, strict=True) if share > _TINY]
    made = []
    for parts in zip(*(read(keys, row, count, FRESH) for row, _ in counted), strict=True):
        products = [part * share for part, (_, share) in zip(parts, counted, strict=True)]
        total = products[0]
        for product in products[1:]:
            total = total + product
        made.append(total.serialize())
    return _row(made)


def decrypted(keys: Keys, row: bytes | memoryview, count: int) -> Numbers:
    """Decrypt a sum of `count` numbers, or what one site has encrypted, with the secret key.

    Raises:
        WireError: it holds no such sum, or was encrypted under another key.
    """
    found = [numpy.array(part.decrypt()) for part in read(keys, row, count, (*FRESH, *SUMMED))]
    numbers: Numbers = numpy.concatenate(found) / keys.factor
    if not (numpy.abs(numbers) <= 2 * LARGEST).all():
        raise WireError(
            "the encrypted adapter decrypts to numbers that no sum of updates has: it was made under another key, or "
            "is damaged; all kits must be of one provisioning",
            code="other_key",
        )
    return numbers


def check(keys: Keys, row: bytes | memoryview, count: int) -> None:
    """Do with every ciphertext of a site's row what a sum will, and forget it.

    TenSEAL keeps a scale and sizes of its own beside those of the ciphertext, and goes by them when it adds: they are
    checked as it writes them out again.

    Raises:
        WireError: it is not `count` fresh numbers under these parameters.
    """
    tail = b"\x19" + struct.pack("<d", keys.context.global_scale)
    for vector, size in zip(read(keys, row, count, FRESH), chunks(keys, count), strict=True):
        said, number = vector.serialize(), _varint(size)
        head = b"\x0a" + _varint(len(number)) + number + b"\x12"
        if not (said.startswith(head) and said.endswith(tail)):
            raise _other()
        try:
            vector * 0.5
        except Exception as error:  # TenSEAL and SEAL have errors of many kinds
            raise WireError("what came cannot be added", f"{error!r:.500}", code="no_ciphertext") from None


def read(keys: Keys, row: bytes | memoryview, count: int, used: Collection[int]) -> Iterator[Any]:
    """Read the ciphertexts of a row one after the other.

    Args:
        count: numbers that the row must hold.
        used: primes that each ciphertext may have used up.

    Raises:
        WireError: it is another row.
    """
    library, sizes = tenseal(), chunks(keys, count)
    for part, size in zip(_parts(row, len(sizes)), sizes, strict=True):
        try:
            vector = library.ckks_vector_from(keys.context, part)
            inside = vector.ciphertext()
            sound = vector.size() == size and len(inside) == 1 and _is_sound(inside[0], keys, used)
        except Exception as error:  # TenSEAL and SEAL have errors of many kinds
            raise WireError("what came is no ciphertext", f"{error!r:.500}", code="no_ciphertext") from None
        if not sound:
            raise _other()
        yield vector


def _other() -> WireError:
    return WireError(
        "a ciphertext is of another size, scale or level than asked for; provision all kits at once, and update "
        "nvflare_fm everywhere",
        code="other_ciphertext",
    )


def _varint(number: int) -> bytes:
    """A whole number as protobuf writes it."""
    made = b""
    while number > 127:
        made, number = made + bytes([number & 127 | 128]), number >> 7
    return made + bytes([number])


def _is_sound(ciphertext: Any, keys: Keys, used: Collection[int]) -> bool:
    return (
        ciphertext.size() == 2
        and ciphertext.poly_modulus_degree() == 2 * keys.slots
        and keys.primes - ciphertext.coeff_modulus_size() in used
        and ciphertext.scale == keys.context.global_scale
        and ciphertext.is_ntt_form()
        and not ciphertext.is_transparent()  # no secret is in it, and SEAL refuses to go on with it
    )


def _parts(row: bytes | memoryview, count: int) -> Iterator[bytes]:
    head = count * _LENGTH.itemsize
    lengths = numpy.frombuffer(row[:head], _LENGTH) if len(row) >= head else numpy.empty(0, _LENGTH)
    if len(lengths) != count or head + int(lengths.sum(dtype=numpy.int64)) != len(row):
        raise WireError("the ciphertexts' lengths do not add up to what came", code="no_ciphertext")
    at = head
    for length in lengths.tolist():
        yield bytes(row[at : at + length])
        at += length


def _row(made: Sequence[bytes]) -> bytes:
    return numpy.array([len(each) for each in made], _LENGTH).tobytes() + b"".join(made)
