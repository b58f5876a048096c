"""Inner products of changes, ⟨ΔW, ΔW'⟩ = tr((BᵀB')(A'Aᵀ)), over panels of the rank.

Besides the factors they need room for two panels of products, PANEL × rank each, however large the layer is.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from ..adapter import LoraPair

DIRECT = 256  # the largest rank that is multiplied in one piece
PANEL = 512  # directions of a longer sum that are multiplied with all others at a time
ROWS = 1024  # of a factor that are held in the wider type at a time


def blocks(rank: int, size: int) -> list[slice]:
    """Cut the directions of a pair into slices of `size`."""
    return [slice(at, min(at + size, rank)) for at in range(0, rank, size)]


def of_sums(
    terms: LoraPair, shares: Float[Tensor, "rank k"], precision: torch.dtype = torch.float64
) -> Float[Tensor, "k k"]:
    """Compute ⟨Dᵢ, Dⱼ⟩ for every two of Dₖ = scale · Σ_c shares[c, k] · B[:, c] A[c], summed in float64.

    It takes O((d + m)R²) operations, half of the products, as the matrix is symmetric.

    Args:
        terms: the directions that all D share.
        shares: how much of each direction each D has.
        precision: of the products.
    """
    shares = terms.scale * shares.double()
    total = torch.zeros(shares.shape[1], shares.shape[1], dtype=torch.float64)
    panel, rows = (PANEL, ROWS) if terms.rank > DIRECT else (DIRECT, max(terms.shape))
    for start in range(0, terms.rank, panel):
        of_b = _products(terms.B[:, start:], panel, rows, precision)
        of_a = _products(terms.A[start:].T, panel, rows, precision)
        products = (of_b * of_a).double()
        its, beyond = shares[start : start + panel], shares[start + panel :]
        total += its.T @ products[:, : len(its)] @ its
        if len(beyond):
            part = its.T @ products[:, len(its) :] @ beyond
            total += part + part.T
    return total


def _products(factor: Float[Tensor, "side rank"], panel: int, rows: int, precision: torch.dtype) -> Tensor:
    """The inner products of a factor's first directions with all of them. Each row is converted once."""
    total: Tensor | None = None
    for some in torch.split(factor, rows):
        wide = some.to(precision)
        part = wide[:, :panel].T @ wide
        total = part if total is None else total.add_(part)
    return factor.new_zeros(min(panel, factor.shape[1]), factor.shape[1]) if total is None else total


def energy(pair: LoraPair, precision: torch.dtype = torch.float64) -> float:
    """Compute ‖ΔW‖² without singular values."""
    return float(of_sums(pair, torch.ones(pair.rank, 1), precision))
