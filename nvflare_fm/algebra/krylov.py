"""The leading directions of a change whose rank is much larger than what is kept, from products with ΔW alone.

Block Krylov iteration after Musco and Musco (arXiv:1504.05477): all blocks are kept, which on flat spectra is far
closer than the last one alone (Halko et al., arXiv:0909.4061). It runs until it gains nothing.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from ..adapter import LoraPair
from .inner import blocks

OVERSAMPLING = 8  # columns of a block beyond the rank asked for
GAIN = 1e-6  # stops when a block captures less than this share of what is still lost …
NOTHING = 1e-14  # … or of ‖ΔW‖²
NEW = 1e-13  # a direction counts as new when it is longer than this, relative to its block


def leading(pair: LoraPair, rank: int, energy: float) -> LoraPair:
    """ΔW V Vᵀ in float64, at `rank` + 8 at most, with V orthonormal and the leading right singular vectors of ΔW in it.
    `energy` is ‖ΔW‖². O((d + m)R(rank + 8)) a block. Directions fainter than 1e-7 of the first may be missed.

    Starts from the same columns at any time, and on the side of the layer, so that it sees nothing of how B and A are
    turned inside the rank.
    """
    turned = LoraPair(pair.B.T, pair.A.T, pair.scale)
    basis: list[Tensor] = []  # and what ΔW makes of it, in blocks
    image: list[Tensor] = []
    inner = torch.zeros(0, 0, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(pair.B.shape[0], rank + OVERSAMPLING, generator=generator, dtype=torch.float64)
    fresh, captured = _new(_times(turned, start), basis), 0.0
    while 0 < fresh.shape[1] <= pair.A.shape[1] - len(inner):  # something new, and room for it
        basis.append(fresh)
        image.append(_times(pair, fresh))
        inner = _bordered(inner, torch.cat([block.T @ image[-1] for block in image]))
        before, captured = captured, float(torch.linalg.eigvalsh(inner).flip(0)[:rank].sum())
        if captured - before <= max(GAIN * (energy - captured), NOTHING * energy):
            break
        fresh = _new(_times(turned, image[-1]), basis)
    best = torch.linalg.eigh(inner).eigenvectors[:, -start.shape[1] :]
    fan_out, fan_in = pair.shape
    return LoraPair(_sum(basis, best, fan_in).T, _sum(image, best, fan_out))


def _sum(blocks: list[Tensor], by: Float[Tensor, "n k"], side: int) -> Float[Tensor, "side k"]:
    """[blocks] @ by, where no block is copied."""
    parts = torch.split(by, [block.shape[1] for block in blocks])
    return sum((b @ p for b, p in zip(blocks, parts, strict=True)), torch.zeros(side, by.shape[1], dtype=by.dtype))


def _times(pair: LoraPair, x: Float[Tensor, "m n"]) -> Float[Tensor, "d n"]:
    """ΔW x in float64; only a block of the factors is ever copied into it."""
    result = torch.zeros(pair.B.shape[0], x.shape[1], dtype=torch.float64)
    for block in blocks(pair.rank, 64):
        result += pair.B[:, block].double() @ (pair.A[block].double() @ x)
    return pair.scale * result


def _new(x: Float[Tensor, "m n"], basis: list[Tensor]) -> Float[Tensor, "m new"]:
    """An orthonormal basis of what `x` holds beside `basis`; fewer columns than `x` where it holds less."""
    floor = NEW * x.norm()
    u, lengths, _ = torch.linalg.svd(_beside(_beside(x, basis), basis), full_matrices=False)  # twice is enough: Kahan
    q: Tensor = torch.linalg.qr(_beside(u[:, lengths > floor], basis))[0]
    return q


def _beside(x: Float[Tensor, "m n"], basis: list[Tensor]) -> Float[Tensor, "m n"]:
    """What of `x` is orthogonal to `basis`; `x` is overwritten."""
    for block in basis:
        x -= block @ (block.T @ x)
    return x


def _bordered(inner: Float[Tensor, "k k"], beside: Float[Tensor, "n new"]) -> Float[Tensor, "n n"]:
    """A symmetric matrix with new columns, and the rows that mirror them."""
    return torch.cat([torch.cat([inner, beside[: len(inner)]], dim=1), beside.T])
