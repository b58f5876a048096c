"""Encrypted sums: an adapter as one vector under CKKS, which the server adds to others' without reading any.

Of a pair B alone travels: A is frozen at the values of the plan's seed, so every site can make it. Whoever has the
sites' key opens the sum; see `nvflare_fm.encryption`.
"""

from collections.abc import Mapping, Sequence
from math import prod
from typing import ClassVar

import numpy
import torch
from pydantic import PrivateAttr
from torch import Tensor

from ..adapter import LORA_A, Description
from ..encryption.ciphertexts import check, decrypted, encrypted, weighted_sum
from ..encryption.keys import Keys
from ..encryption.reader import check_apart
from ..errors import ConfigError, WireError
from . import Encryption, Kept, Parcel, registry

NAME = "ciphertexts"  # of the one tensor that travels
_SLOTS, _MOST_BYTES = 4096, 2**20  # in a ciphertext at N = 8192; no larger N needs more bytes for as many numbers
_SENT_BYTES, _SUMMED_BYTES = 235_200, 131_300  # of a ciphertext at the defaults of `HEBuilder`, within 0.1 %


@registry.register("ckks")
class Ckks(Encryption):
    """Encrypts under CKKS with the contexts of NVFlare's `HEBuilder`. The server adds, and the sites decrypt."""

    error: ClassVar[float] = 1e-6
    linear: ClassVar[bool] = True

    _keys: Keys | None = PrivateAttr(None)

    def keyed(self, keys: Keys | None) -> "Ckks":
        copy = self.model_copy()
        copy._keys = _found(keys)
        return copy

    def described(self, before: Mapping[str, Description]) -> Mapping[str, Description]:
        return {NAME: Description((_ciphertexts(before) * _SENT_BYTES,), torch.uint8)}

    def summed(self, before: Mapping[str, Description]) -> Mapping[str, Description]:
        return {NAME: Description((_ciphertexts(before) * _SUMMED_BYTES,), torch.uint8)}

    def fits(self, sent: Mapping[str, Description], before: Mapping[str, Description]) -> bool:
        return (
            sent.keys() == {NAME}
            and sent[NAME].dtype == torch.uint8
            and len(sent[NAME].shape) == 1
            and 0 < sent[NAME].bytes <= _ciphertexts(before) * _MOST_BYTES
        )

    def encode(self, parcel: Parcel, kept: Kept | None) -> tuple[Parcel, Kept]:
        names = _travelling(parcel.described)
        vector = [parcel.tensors[name].detach().cpu().double().flatten() for name in names]
        try:
            row = encrypted(_found(self._keys), torch.cat([*vector, torch.empty(0, dtype=torch.float64)]).numpy())
        except WireError as error:
            raise _named(error, parcel.sender) from None
        return _parcel(parcel.sender, row), {}

    def added(self, parcels: Sequence[Parcel], before: Mapping[str, Description], shares: Sequence[float]) -> Parcel:
        rows = [_row(parcel) for parcel in parcels]
        return _parcel("the server", weighted_sum(_found(self._keys), rows, shares, _count(before)))

    def check(self, parcel: Parcel, before: Mapping[str, Description], apart: bool) -> None:
        row, count, site = _row(parcel), _count(before), parcel.sender
        if apart:
            check_apart(_found(self._keys), row, count, site)
            return
        try:
            check(_found(self._keys), row, count)
        except WireError as error:
            raise _named(error, site) from None

    def decrypt(self, parcel: Parcel, before: Mapping[str, Description]) -> Mapping[str, Tensor]:
        names = _travelling(before)
        counts = [prod(before[name].shape) for name in names]
        numbers = torch.from_numpy(decrypted(_found(self._keys), _row(parcel), sum(counts)))
        parts = torch.split(numbers, counts)
        return {n: part.reshape(before[n].shape).to(before[n].dtype) for n, part in zip(names, parts, strict=True)}


def _ciphertexts(before: Mapping[str, Description]) -> int:
    return -(-_count(before) // _SLOTS)


def _count(before: Mapping[str, Description]) -> int:
    return sum(prod(before[name].shape) for name in _travelling(before))


def _travelling(before: Mapping[str, Description]) -> list[str]:
    return sorted(name for name in before if not name.endswith(LORA_A))


def _row(parcel: Parcel) -> memoryview:
    return memoryview(parcel.tensors[NAME].contiguous().numpy())  # type: ignore[arg-type]


def _parcel(sender: str, made: bytes) -> Parcel:
    tensor = torch.from_numpy(numpy.frombuffer(bytearray(made), numpy.uint8))
    return Parcel(sender, {NAME: tensor}, {NAME: Description.of(tensor)})


def _found(keys: Keys | None) -> Keys:
    if keys is None:
        raise ConfigError(
            "the job encrypts what sites send, and there is no encryption context here; provision with HEBuilder, "
            "whose contexts lie in each startup kit (a simulator has none)",
            code="no_context",
        )
    return keys


def _named(error: WireError, sender: str) -> WireError:
    return WireError(f"{sender}: {error.message.removesuffix(f' [{error.code}]')}", error.local, code=error.code)
