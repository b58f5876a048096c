"""A context as NVFlare's `HEBuilder` provisions it: parameters and keys, checked before anything is encrypted.

The server's has no key. All sites have the same secret key: whoever of them helps the server can read every update.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy

from ..errors import ConfigError

MOST_BYTES = 2**26  # of a context
DEGREES = (8192, 16384, 32768)  # N, of which half are numbers in a ciphertext; at 4096 the error is 1e-2 and more
SPARE = 10  # bits above the point of a ciphertext's numbers: 1 for the sign, 1 to spare, 8 for `LARGEST`
LARGEST = 2.0**8  # of a number that is encrypted
PRECISE = 1e-5  # relative error of a sum, at most


@dataclass(frozen=True)
class Keys:
    """What one end can do: add, or with the secret key also encrypt and decrypt.

    Args:
        context: TenSEAL's.
        slots: numbers in a ciphertext.
        primes: that a fresh ciphertext has; a sum has used up one.
        factor: by which numbers are multiplied before they are encrypted, so that small ones are exact, too.
        secret: whether the secret key is there.
        data: the context as it was read, for another process.
    """

    context: Any
    slots: int
    primes: int
    factor: float
    secret: bool
    data: bytes


def tenseal() -> Any:
    """TenSEAL, with the types of SEAL.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import tenseal as library
        import tenseal.sealapi
    except ImportError:
        raise ConfigError(
            "encrypted sums need TenSEAL, which is not installed here; install nvflare_fm[encryption]",
            code="no_tenseal",
        ) from None
    return library


def read_keys(data: bytes, secret: bool, whose: str) -> Keys:
    """Read a context and check that sums under it are exact enough and private.

    Args:
        data: as `HEBuilder` writes it.
        secret: whether it must hold the secret key (a site), or must not (the server).
        whose: for errors.

    Raises:
        ConfigError: it is no context, is too weak or too coarse, or holds a key too many or too few.
    """
    library = tenseal()
    if len(data) > MOST_BYTES:
        raise ConfigError(f"{whose} has an encryption context of {len(data)} bytes; {_REMEDY}", code="no_context")
    try:
        context = library.context_from(data, n_threads=1)
        first = context.seal_context().data.first_context_data()
        parameters = first.parms()
        degree = parameters.poly_modulus_degree()
        bits = [modulus.bit_count() for modulus in parameters.coeff_modulus()]
        is_ckks = parameters.scheme().name == "CKKS"
        scale = math.log2(context.global_scale) if is_ckks and context.global_scale > 0 else 0.0
        has_secret = context.has_secret_key()
    except Exception as error:  # TenSEAL and SEAL have errors of many kinds
        raise ConfigError(
            f"the encryption context of {whose} cannot be read; {_REMEDY}", f"{error!r:.500}", code="context_unreadable"
        ) from None
    if not is_ckks:
        raise ConfigError(f"the encryption context of {whose} is not for CKKS; {_REMEDY}", code="context_scheme")
    if degree not in DEGREES:
        raise ConfigError(
            f"the encryption context of {whose} has poly_modulus_degree {degree}, {DEGREES[0]} to {DEGREES[-1]} are "
            f"exact and fast enough; {_REMEDY}",
            code="context_degree",
        )
    if len(bits) < 2 or bits[0] - scale < SPARE + 1 or abs(bits[-1] - scale) > 1:
        raise ConfigError(
            f"under the encryption context of {whose} no weighted sum is exact: the moduli are {bits} bits and the "
            f"scale {scale:g}; {_REMEDY}",
            code="context_precision",
        )
    if has_secret != secret:
        raise ConfigError(*_WRONG_KEY[secret], code="no_secret_key" if secret else "secret_at_server")
    keys = Keys(context, degree // 2, len(bits), 2.0 ** (bits[0] - scale - SPARE), secret, data)
    if secret:
        _check_precise(keys, whose)
    return keys


_REMEDY = "provision with HEBuilder and its defaults (poly_modulus_degree 8192, [60, 40, 40], scale_bits 40)"
_WRONG_KEY = {
    True: (f"the site's encryption context holds no secret key, so it can read no sum; {_REMEDY}",),
    False: (
        "the server's encryption context holds the secret key, so the server could read every update; remove it from "
        "the server, and provision all kits anew",
    ),
}


def _check_precise(keys: Keys, whose: str) -> None:
    """Holds a sum of one ciphertext against the numbers, whatever the parameters promise."""
    from .ciphertexts import decrypted, encrypted, weighted_sum

    numbers = numpy.linspace(-1.0, 1.0, keys.slots)
    total = weighted_sum(keys, [encrypted(keys, numbers)], [0.3], len(numbers))
    error = float(numpy.linalg.norm(decrypted(keys, total, len(numbers)) - 0.3 * numbers))
    if not error <= PRECISE * float(numpy.linalg.norm(0.3 * numbers)):
        raise ConfigError(
            f"under the encryption context of {whose} a sum is off by more than {PRECISE:g}; {_REMEDY}",
            code="context_precision",
        )
