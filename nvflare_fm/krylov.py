"""The leading directions of a change whose rank is much larger than what is kept, from products with ΔW alone.

Block Krylov iteration after Musco and Musco (arXiv:1504.05477): all blocks are kept, which on flat spectra is far
closer than the last one alone (Halko et al., arXiv:0909.4061). It runs until it gains nothing.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from .adapter import LoraPair
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
    basis, image = (torch.zeros(side, 0, dtype=torch.float64) for side in (pair.A.shape[1], pair.B.shape[0]))
    inner = image.T @ image
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(pair.B.shape[0], rank + OVERSAMPLING, generator=generator, dtype=torch.float64)
    fresh, captured = _new(_times(turned, start), basis), 0.0
    while 0 < fresh.shape[1] <= len(basis) - basis.shape[1]:  # something new, and room for it
        block = _times(pair, fresh)
        basis, image = torch.cat([basis, fresh], dim=1), torch.cat([image, block], dim=1)
        inner = _bordered(inner, image.T @ block)
        before, captured = captured, float(torch.linalg.eigvalsh(inner).flip(0)[:rank].sum())
        if captured - before <= max(GAIN * (energy - captured), NOTHING * energy):
            break
        fresh = _new(_times(turned, block), basis)
    best = torch.linalg.eigh(inner).eigenvectors[:, -start.shape[1] :]
    return LoraPair((basis @ best).T, image @ best)


def _times(pair: LoraPair, x: Float[Tensor, "m n"]) -> Float[Tensor, "d n"]:
    """ΔW x in float64; only a block of the factors is ever copied into it."""
    result = torch.zeros(pair.B.shape[0], x.shape[1], dtype=torch.float64)
    for block in blocks(pair.rank, 64):
        result += pair.B[:, block].double() @ (pair.A[block].double() @ x)
    return pair.scale * result


def _new(x: Float[Tensor, "m n"], basis: Float[Tensor, "m k"]) -> Float[Tensor, "m new"]:
    """An orthonormal basis of what `x` holds beside `basis`; fewer columns than `x` where it holds less."""
    floor = NEW * x.norm()
    for _ in range(2):  # twice is enough (Kahan; Parlett, The Symmetric Eigenvalue Problem)
        x = x - basis @ (basis.T @ x)
    u, lengths, _ = torch.linalg.svd(x, full_matrices=False)
    u = u[:, lengths > floor]
    q: Tensor = torch.linalg.qr(u - basis @ (basis.T @ u))[0]
    return q


def _bordered(inner: Float[Tensor, "k k"], beside: Float[Tensor, "n new"]) -> Float[Tensor, "n n"]:
    """A symmetric matrix with new columns, and the rows that mirror them."""
    return torch.cat([torch.cat([inner, beside[: len(inner)]], dim=1), beside.T])
