"""Symmetric int8 in blocks of 64, each with a scale of its own (block-wise quantization, arXiv:2110.02861).

A scale is a float32: 8.5 bits a number. In float16 it would overflow above 65,504 · 127; in bfloat16 it would be
rounded, and a site that has not moved would not send back the very numbers it received.
"""

from typing import ClassVar

import torch
from torch import Tensor

from ..adapter import LORA_B, Description
from . import registry
from .compression import Compression, by_direction

BLOCK, MOST = 64, 127
_SCALE_BYTES = 4
_LARGEST = float(torch.nextafter(torch.tensor(torch.finfo(torch.float32).max / MOST), torch.tensor(0.0)))


@registry.register("int8")
class Int8(Compression):
    """Each block of 64 numbers of one direction as whole numbers from −127 to 127, and a float32 scale."""

    error: ClassVar[float] = 0.5 / MOST

    def packed(self, name: str, before: Description) -> Description:
        rows, length = by_direction(name, before.shape)
        return Description((rows * (_SCALE_BYTES * _blocks(length) + length),), torch.uint8)

    def pack(self, name: str, tensor: Tensor) -> Tensor:
        rows, length = by_direction(name, tuple(tensor.shape))
        values = (tensor.T if name.endswith(LORA_B) and tensor.ndim == 2 else tensor).float().reshape(rows, length)
        blocks = _in_blocks(values)
        scales = (blocks.abs().amax(dim=2) / MOST).clamp(max=_LARGEST)  # so that 127 of them do not overflow
        codes = (blocks / torch.where(scales > 0, scales, 1.0)[..., None]).round().clamp(-MOST, MOST).to(torch.int8)
        codes = codes.reshape(rows, -1)[:, :length]
        return torch.cat([scales.flatten().view(torch.uint8), codes.flatten().view(torch.uint8)])

    def unpack(self, name: str, payload: Tensor, before: Description) -> Tensor:
        rows, length = by_direction(name, before.shape)
        end = _SCALE_BYTES * rows * _blocks(length)
        scales = payload[:end].clone().view(torch.float32).reshape(rows, -1)  # a copy lies where float32 may lie
        blocks = _in_blocks(payload[end:].view(torch.int8).reshape(rows, length)).float() * scales[..., None]
        values = blocks.reshape(rows, -1)[:, :length]
        if name.endswith(LORA_B) and len(before.shape) == 2:
            values = values.T
        return values.reshape(before.shape).to(before.dtype).contiguous()


def _blocks(length: int) -> int:
    return -(-length // BLOCK)


def _in_blocks(rows: Tensor) -> Tensor:
    """Each row in whole blocks, the last filled with zeros."""
    missing = -rows.shape[1] % BLOCK
    return torch.nn.functional.pad(rows, (0, missing)).reshape(rows.shape[0], -1, BLOCK)
