"""The algebra of B @ A: sum, shorten, inner product, slice and refill, without ever forming a dense ΔW.

Everything acts on products ΔW = scale · B @ A, which do not change when B and A are rotated inside the rank.
"""

import hashlib
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from ..adapter import LoraPair
from . import inner
from .krylov import leading

Sigma = Literal["B", "balanced", "A"]  # which factor holds the singular values
_SHARE_OF_B: dict[str, float] = {"B": 1.0, "balanced": 0.5, "A": 0.0}
DIRECT = 256  # the largest rank whose singular values are all computed; above it QR's copies and time grow too much


def zero(fan_out: int, fan_in: int, dtype: torch.dtype = torch.float32) -> LoraPair:
    """Make the pair ΔW = 0, at rank 0."""
    return LoraPair(torch.zeros(0, fan_in, dtype=dtype), torch.zeros(fan_out, 0, dtype=dtype))


class Joined(Sequence[LoraPair]):
    """One sequence after another, without reading what is in them."""

    def __init__(self, *parts: Sequence[LoraPair]) -> None:
        self.parts = parts

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def __getitem__(self, index: Any) -> Any:
        for part in self.parts:
            if index < len(part):
                return part[index]
            index -= len(part)
        raise IndexError("no pair is left")


class Stack:
    """A sum of pairs: Σ wₖΔWₖ, exactly, at rank Σ rₖ: [w₁s₁B₁ w₂s₂B₂] @ [A₁; A₂] (FLoRA, arXiv:2409.05976).

    It is made pair by pair, in the precision of the first. Each factor is read once.

    Args:
        ranks: of the pairs that will be added, in that order.
    """

    def __init__(self, ranks: Sequence[int]) -> None:
        self._rank, self._ends = sum(ranks), accumulate(ranks)
        self._sum: LoraPair | None = None

    def add(self, pair: LoraPair, weight: float = 1.0) -> None:
        """Copy the next pair into its place. The caller need not keep it."""
        (fan_out, fan_in), a, b = pair.shape, pair.A, weight * pair.scale * pair.B
        if self._sum is None:
            self._sum = LoraPair(a.new_empty(self._rank, fan_in), b.new_empty(fan_out, self._rank))
        end = next(self._ends)
        self._sum.A[end - pair.rank : end] = a
        self._sum.B[:, end - pair.rank : end] = b

    @property
    def sum(self) -> LoraPair:
        """The sum of all pairs that were added, at least one."""
        assert self._sum is not None
        return self._sum


def stack(pairs: Sequence[LoraPair], weights: Sequence[float]) -> LoraPair:
    """Add up pairs with weights, exactly, by stacking their factors (see `Stack`).

    If `pairs` reads its items at access, one of them is in memory beside the result.
    """
    whole = Stack([p.rank for p in pairs])
    for pair, weight in zip(pairs, weights, strict=True):
        whole.add(pair, weight)
    return whole.sum


def svd(
    pair: LoraPair, rank: int | None = None
) -> tuple[Float[Tensor, "d n"], Float[Tensor, " k"], Float[Tensor, "n m"]]:
    """Compute U, Σ, Vᵀ of ΔW: QR of both factors and SVD of the small core, in float64.

    It takes O((d + m)R² + R³) operations, the SVD of the dense ΔW O(dm·min(d, m)). The largest entry of each left
    vector is positive, so equal changes have equal signs.

    Args:
        pair: of any rank.
        rank: return only the first `rank` directions of U and Vᵀ; None: all.
    """
    q_b, r_b = torch.linalg.qr(pair.B.double())
    q_a, r_a = torch.linalg.qr(pair.A.T.double())
    u, sigma, vt = torch.linalg.svd(pair.scale * r_b @ r_a.T, full_matrices=False)
    u, vt = q_b @ u[:, :rank], vt[:rank] @ q_a.T
    signs = torch.sign(u.gather(0, u.abs().argmax(dim=0, keepdim=True)))
    return (u * signs).to(pair.B.dtype), sigma, (vt * signs.T).to(pair.A.dtype)


def shorten(
    pair: LoraPair, rank: int, sigma: Sigma = "B", keep_energy: float = 1.0, direct: int = DIRECT
) -> tuple[LoraPair, float]:
    """Find the closest pair of at most `rank` (Eckart-Young), in canonical form.

    Canonical form is ΔW = U Σ Vᵀ with singular values falling. Directions that are empty are left out.

    Args:
        pair: of any rank.
        rank: the largest rank of the result.
        sigma: the factor that holds Σ. The default, B = UΣ and A = Vᵀ, is the form that LoRA itself starts in.
        keep_energy: below 1, keep no more directions than hold this share of ‖ΔW‖².
        direct: of a pair of a larger rank, compute only the leading directions. The energy lost is measured against
            ‖ΔW‖² all the same.

    Returns:
        The shorter pair, and the share of ‖ΔW‖² that is lost.
    """
    u, values, vt, beside = _spectral(pair, rank, direct)
    energy = values.square()
    whole = float(energy.sum()) + beside
    floor = 8 * torch.finfo(pair.B.dtype).eps * values[:1]  # a few rounding errors; not grown with the layer's width
    kept = min(rank, int((values > floor).sum()))
    if keep_energy < 1 and kept:
        kept = min(kept, 1 + int((energy.cumsum(0) < keep_energy * whole).sum()))
    lost = (float(energy[kept:].sum()) + beside) / whole if whole > 0 else 0.0
    root = values[:kept].to(u.dtype)
    in_b = _SHARE_OF_B[sigma]
    return LoraPair(A=root[:, None] ** (1 - in_b) * vt[:kept], B=u[:, :kept] * root**in_b), lost


def _spectral(pair: LoraPair, rank: int, direct: int) -> tuple[Tensor, Tensor, Tensor, float]:
    """U, Σ, Vᵀ of ΔW or, where it is longer than `direct`, of its leading part; and the energy that is not in them."""
    if pair.rank <= max(direct, rank):
        return *svd(pair, rank), 0.0
    energy = inner.energy(pair, pair.B.dtype)
    u, values, vt = svd(leading(pair, rank, energy), rank)
    return u.to(pair.B.dtype), values, vt.to(pair.A.dtype), max(energy - float(values.square().sum()), 0.0)


def spectrum(pair: LoraPair) -> Float[Tensor, " rank"]:
    """Read the singular values of a canonical pair, whichever factor holds them."""
    values: Tensor = pair.scale * pair.B.norm(dim=0) * pair.A.norm(dim=1)
    return values


def effective_rank(values: Float[Tensor, " rank"]) -> float:
    """Compute exp of the entropy of the energy over the directions (Roy and Vetterli, 2007); 0 without energy."""
    energy = values.double().square()
    if not energy.sum() > 0:
        return 0.0
    return float(torch.special.entr(energy / energy.sum()).sum().exp())


def head(pair: LoraPair, rank: int) -> LoraPair:
    """Take the first `rank` directions: of a canonical pair, its best approximation at that rank."""
    return LoraPair(pair.A[:rank], pair.B[:, :rank], pair.scale)


def tail(pair: LoraPair, rank: int) -> LoraPair:
    """Take the directions after the first `rank`: head + tail = pair."""
    return LoraPair(pair.A[rank:], pair.B[:, rank:], pair.scale)


def owners(ranks: Sequence[int]) -> Float[Tensor, "rank k"]:
    """Mark which pair each direction of a stack comes from: 1 in the column of its pair, 0 elsewhere."""
    return torch.eye(len(ranks), dtype=torch.float64).repeat_interleave(torch.tensor(ranks), dim=0)


def fresh_rows(layer: str, fan_in: int, rows: range, seed: int, beside: Tensor | None = None) -> Float[Tensor, "r m"]:
    """Make orthonormal rows of A for empty directions, from `seed`, the layer's name and each row's index.

    Rows are nested: a site of rank 4 makes bit for bit the first four rows of a site of rank 16. They are orthogonal
    to those in `beside` too, as far as the layer is wide enough; further rows have length 1 only.
    """
    basis = torch.empty(0, fan_in) if beside is None else torch.nn.functional.normalize(beside.float(), dim=1)
    for row in rows:
        digest = hashlib.sha256(f"{seed}/{layer}/{row}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        fresh = torch.empty(fan_in).uniform_(-1, 1, generator=generator)
        if len(basis) < fan_in:
            for _ in range(2):  # twice is enough (Kahan; Parlett, The Symmetric Eigenvalue Problem)
                fresh = fresh - (basis @ fresh) @ basis
        basis = torch.cat([basis, torch.nn.functional.normalize(fresh, dim=0)[None]])
    return basis[len(basis) - len(rows) :]


def refill(pair: LoraPair, rank: int, layer: str, seed: int) -> LoraPair:
    """Write the same ΔW at `rank` directions: the missing ones get fresh rows of A and zero columns of B.

    A direction that is zero in both factors would never receive a gradient again.
    """
    missing = range(pair.rank, rank)
    rows = fresh_rows(layer, pair.shape[1], missing, seed, beside=pair.A).to(pair.A)
    columns = pair.B.new_zeros(pair.shape[0], len(missing))
    return LoraPair(torch.cat([pair.A, rows]), torch.cat([pair.B, columns], dim=1), pair.scale)
