"""What is done to the updates before a guard compares them: each is replaced by a mean of some, y = M u.

As functions of the inner products alone: those of the means are M G Mᵀ, and a weighting β of the means is βM of the
updates.
"""

import hashlib
from collections.abc import Callable, Mapping
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Mix = Literal["none", "nnm", "bucketing"]
Gram = Float[Tensor, "n n"]
BUCKET = 2  # updates to a bucket: more of them hide more from the guard, and fewer smooth nothing
TIED = 1e-9  # of the squared lengths compared: a smaller difference is rounding


def squared_distances(gram: Gram) -> Gram:
    """‖uᵢ − uⱼ‖² of every two updates, from their inner products."""
    squares = gram.diagonal()
    return (squares[:, None] + squares - 2 * gram).clamp(min=0).fill_diagonal_(0.0)


def none(gram: Gram, f: int) -> Gram:
    """Every update stays as it is."""
    return torch.eye(len(gram), dtype=gram.dtype)


def nnm(gram: Gram, f: int) -> Gram:
    """Nearest-neighbour mixing (arXiv:2302.01772): each update becomes the mean of the n − f nearest to it, itself
    among them. Those that lie equally far share what is left, so that the order of sites decides nothing.
    """
    squares, far, count = gram.diagonal(), squared_distances(gram), len(gram) - f
    last = far.kthvalue(count, dim=1, keepdim=True).values
    room = TIED * (squares[:, None] + last)
    near = (far < last - room).double()
    tied = ((far - last).abs() <= room).double()
    return (near + tied * (count - near.sum(1, keepdim=True)) / tied.sum(1, keepdim=True)) / count


def bucketing(gram: Gram, f: int) -> Float[Tensor, "m n"]:
    """Bucketing (arXiv:2006.09365): the updates are dealt into buckets of two, and each bucket becomes its mean.

    The order in which they are dealt follows from the digest of the inner products: no site knows it before all have
    sent, and the same round gives the same.
    """
    digest = hashlib.sha256(gram.contiguous().numpy().tobytes()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    dealt = torch.split(torch.randperm(len(gram), generator=generator), BUCKET)
    means = torch.zeros(len(dealt), len(gram), dtype=gram.dtype)
    for bucket, sites in enumerate(dealt):
        means[bucket, sites] = 1 / len(sites)
    return means


MIXES: Mapping[Mix, Callable[[Gram, int], Tensor]] = {"none": none, "nnm": nnm, "bucketing": bucketing}


def count(mix: Mix, means: int) -> int:
    """How many updates it takes to compare `means` of them."""
    return BUCKET * means - 1 if mix == "bucketing" else means
