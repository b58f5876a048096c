"""Inner products of changes, ⟨ΔW, ΔW'⟩ = tr((BᵀB')(A'Aᵀ)), over blocks of the rank.

Besides the factors they need room for two blocks, however many sites there are.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from ..adapter import LoraPair


def blocks(rank: int, size: int = 256) -> list[slice]:
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
    for one in blocks(terms.rank):
        a, b = terms.A[one].to(precision), terms.B[:, one].to(precision)
        for other in filter(lambda block: block.start >= one.start, blocks(terms.rank)):
            products = (b.T @ terms.B[:, other].to(precision)) * (a @ terms.A[other].to(precision).T)
            part = shares[one].T @ products.double() @ shares[other]
            total += part if other == one else part + part.T
    return total


def energy(pair: LoraPair, precision: torch.dtype = torch.float64) -> float:
    """Compute ‖ΔW‖² without singular values."""
    return float(of_sums(pair, torch.ones(pair.rank, 1), precision))
