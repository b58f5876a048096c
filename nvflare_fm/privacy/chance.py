"""Chance that nobody can repeat: for differential privacy, drawn from the operating system.

The plan's seed is the server's, and torch's generator takes 32 bits of a seed on a CPU: whoever has an update could try
them all and take the noise off again. So every bit here comes from `os.urandom`, the kernel's cryptographic generator.
"""

import math
import os

import torch
from torch import Tensor

_AT_ONCE = 2**22  # numbers made at a time: 16 bytes each are held while they are
_BITS = 53  # of a float64


def uniform(count: int) -> Tensor:
    """Draw `count` numbers from (0, 1], in float64."""
    drawn = torch.frombuffer(bytearray(os.urandom(8 * count)), dtype=torch.int64) if count else torch.zeros(0)
    numbers: Tensor = ((drawn.long() & (2**_BITS - 1)) + 1).double() * 2.0**-_BITS
    return numbers


def normal(count: int) -> Tensor:
    """Draw `count` standard normal numbers, in float64, by Box and Muller's transform of `uniform`.

    Their tails end at 8.6: the chance of a number beyond is 1e-17. Not every float64 is reached (arXiv:2107.10138); the
    sum that they are added to is rounded to float32 afterwards, where each value is reached from 2²⁹ float64.
    """
    parts = []
    for start in range(0, count, _AT_ONCE):
        size = min(_AT_ONCE, count - start)
        radius, angle = uniform(-(-size // 2)), uniform(-(-size // 2)).mul_(2 * math.pi)
        radius = radius.log_().mul_(-2).sqrt_()
        parts.append(torch.cat([radius * angle.cos(), radius * angle.sin()])[:size])
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)


def happens(count: int, probability: float) -> Tensor:
    """Draw which of `count` events happen, each with `probability`, independently: Poisson sampling."""
    return (uniform(count) <= probability).nonzero()[:, 0]
