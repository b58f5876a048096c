"""float32 numbers rounded to bfloat16: half the bytes, and as large a range."""

from typing import ClassVar

import torch
from torch import Tensor

from ..adapter import Description
from . import registry
from .compression import Compression

_LARGEST = torch.finfo(torch.bfloat16).max


@registry.register("bf16")
class Bf16(Compression):
    """Every number to the nearest bfloat16: 8 bits of precision."""

    error: ClassVar[float] = 2.0**-8

    def packed(self, name: str, before: Description) -> Description:
        return Description(before.shape, torch.bfloat16)

    def pack(self, name: str, tensor: Tensor) -> Tensor:
        return tensor.clamp(-_LARGEST, _LARGEST).to(torch.bfloat16)  # the largest float32 would become infinite

    def unpack(self, name: str, payload: Tensor, before: Description) -> Tensor:
        return payload.to(before.dtype)
