"""Encrypted sums: an adapter as one vector under CKKS, which the server adds to others' without reading any.

Of a pair B alone travels: A is frozen at the values of the plan's seed, so every site can make it. Whoever has the
sites' key opens the sum; see `nvflare_fm.encryption`.
"""

from collections.abc import Iterable, Mapping, Sequence
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

_PART = 2**20  # numbers in a tensor that travels, and so in memory at once of each site: whole ciphertexts for any N
_SLOTS, _MOST_BYTES = 4096, 2**20  # in a ciphertext at N = 8192; no larger N needs more bytes for as many numbers
_SENT_BYTES, _SUMMED_BYTES = 235_200, 131_300  # of a ciphertext at the defaults of `HEBuilder`, within 0.3 %


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
        return _sized(before, _SENT_BYTES)

    def summed(self, before: Mapping[str, Description]) -> Mapping[str, Description]:
        return _sized(before, _SUMMED_BYTES)

    def fits(self, sent: Mapping[str, Description], before: Mapping[str, Description]) -> bool:
        if len(sent) != -(-_count(before) // _PART):  # what is described may be of any size
            return False
        parts = _parts(before)
        return sent.keys() == parts.keys() and all(
            sent[name].dtype == torch.uint8
            and len(sent[name].shape) == 1
            and 0 < sent[name].bytes <= _ciphertexts(count) * _MOST_BYTES
            for name, count in parts.items()
        )

    def encode(self, parcel: Parcel, kept: Kept | None) -> tuple[Parcel, Kept]:
        keys, names = _found(self._keys), _travelling(parcel.described)
        numbers = torch.empty(_count(parcel.described), dtype=torch.float64)
        at = 0
        for name in names:
            tensor = parcel.tensors[name]
            numbers[at : at + tensor.numel()] = tensor.detach().cpu().flatten()
            at += tensor.numel()
        parts = _parts(parcel.described)
        try:
            rows = [encrypted(keys, part.numpy()) for part in torch.split(numbers, list(parts.values()))]
        except WireError as error:
            raise _named(error, parcel.sender) from None
        return _parcel(parcel.sender, parts, rows), {}

    def added(self, parcels: Sequence[Parcel], before: Mapping[str, Description], shares: Sequence[float]) -> Parcel:
        keys, parts = _found(self._keys), _parts(before)
        rows = (
            weighted_sum(keys, [_row(parcel.tensors[name]) for parcel in parcels], shares, count)
            for name, count in parts.items()
        )
        return _parcel("the server", parts, rows)

    def check(self, parcel: Parcel, before: Mapping[str, Description], apart: bool) -> None:
        keys, parts = _found(self._keys), _parts(before)
        rows = (_row(parcel.tensors[name]) for name in parts)
        if apart:
            check_apart(keys, rows, list(parts.values()), parcel.sender)
            return
        try:
            for row, count in zip(rows, parts.values(), strict=True):
                check(keys, row, count)
        except WireError as error:
            raise _named(error, parcel.sender) from None

    def decrypt(self, parcel: Parcel, before: Mapping[str, Description]) -> Mapping[str, Tensor]:
        keys, names = _found(self._keys), _travelling(before)
        read = [decrypted(keys, _row(parcel.tensors[name]), count) for name, count in _parts(before).items()]
        tensors = torch.split(torch.from_numpy(numpy.concatenate(read)), [prod(before[name].shape) for name in names])
        return {n: t.reshape(before[n].shape).to(before[n].dtype) for n, t in zip(names, tensors, strict=True)}


def _sized(before: Mapping[str, Description], each: int) -> dict[str, Description]:
    return {n: Description((_ciphertexts(count) * each,), torch.uint8) for n, count in _parts(before).items()}


def _travelling(before: Mapping[str, Description]) -> list[str]:
    return sorted(name for name in before if not name.endswith(LORA_A))


def _count(before: Mapping[str, Description]) -> int:
    return sum(prod(before[name].shape) for name in _travelling(before))


def _parts(before: Mapping[str, Description]) -> dict[str, int]:
    """The tensors that travel, and how many numbers are in each."""
    whole, left = divmod(_count(before), _PART)
    return {f"ciphertexts.{place:05}": count for place, count in enumerate([_PART] * whole + [left] * (left > 0))}


def _ciphertexts(count: int) -> int:
    return -(-count // _SLOTS)


def _row(tensor: Tensor) -> memoryview:
    return memoryview(tensor.contiguous().numpy())  # type: ignore[arg-type]


def _parcel(sender: str, parts: Mapping[str, int], rows: Iterable[bytes]) -> Parcel:
    made = {name: torch.frombuffer(bytearray(row), dtype=torch.uint8) for name, row in zip(parts, rows, strict=True)}
    return Parcel(sender, made, {name: Description.of(tensor) for name, tensor in made.items()})


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
