"""Features instead of texts: class-conditional Gaussians of a frozen encoder's embeddings, under DP, start a head.

After FedPFT (arXiv:2402.01862). Each site sends, once, sums over its rows: of the embeddings of each class, of the rows
of each class, and of the squares of all embeddings, for one diagonal covariance that the classes share. Whoever adds or
removes one unit moves all of that together by at most 1 in ℓ₂, so one Gaussian mechanism protects it (`vote.noised`).
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

COUNTS, SQUARES = 0.5, 0.5  # weights beside the sums' 1: what is not spent on sums makes counts and spread less noisy
_SCALE = (1 + COUNTS**2 + SQUARES**2) ** -0.5
_LEAST_SPREAD = 1e-6


@dataclass(frozen=True)
class Gaussians:
    """What a class's embeddings look like.

    Args:
        means: a row for each class; of a class without enough rows it is 0.
        counts: rows of each class, as the noise leaves them, at least 0.
        variance: of each coordinate, for all classes.
    """

    means: Tensor
    counts: Tensor
    variance: Tensor


def moments(points: Tensor, labels: Sequence[int], units: Sequence[Hashable], classes: int) -> Tensor:
    """Sum up what a site sends, before noise.

    Args:
        points: embeddings; one longer than 1 is cut to length 1.
        labels: of the points, 0 to below `classes`.
        units: whose each point is; those of one unit share its weight.
        classes: how many there are.
    Returns:
        One vector in float64, of classes · (width + 1) + width numbers: sums, counts and squares, each times its
        weight. It moves by at most 1 in ℓ₂ with a unit.
    """
    width = points.shape[1]
    inside = points.double() / points.double().norm(dim=1, keepdim=True).clamp(min=1)
    rows_of: dict[Hashable, int] = {}
    for unit in units:
        rows_of[unit] = rows_of.get(unit, 0) + 1
    shares = torch.tensor([1 / rows_of[unit] for unit in units], dtype=torch.float64)
    places = torch.tensor(list(labels), dtype=torch.long)
    sums = torch.zeros(classes, width, dtype=torch.float64).index_add_(0, places, inside * shares[:, None])
    counts = torch.zeros(classes, dtype=torch.float64).index_add_(0, places, shares)
    squares = (inside.square() * shares[:, None]).sum(0)
    sent: Tensor = _SCALE * torch.cat([sums.flatten(), COUNTS * counts, SQUARES * squares])
    return sent


def gaussians(total: Tensor, classes: int, sigma: float) -> Gaussians:
    """Read the sum over all sites, with its noise, as Gaussians.

    Args:
        total: sum of the sites' noised `moments`.
        sigma: standard deviation of the noise on each number of it. A class whose count is within twice of what noise
            makes of none is taken for absent.
    """
    width = (len(total) - classes) // (classes + 1)
    plain = total.double() / _SCALE
    sums, rest = plain[: classes * width].view(classes, width), plain[classes * width :]
    counts, squares = rest[:classes] / COUNTS, rest[classes:] / SQUARES
    there = counts > max(2 * sigma / (_SCALE * COUNTS), 0.5)
    counts = torch.where(there, counts, 0.0)
    means = torch.where(there[:, None], sums / counts.clamp(min=1e-9)[:, None], 0.0)
    means = means / means.norm(dim=1, keepdim=True).clamp(min=1)  # no mean of points in the ball lies outside
    rows = counts.sum().clamp(min=1)
    between = (counts[:, None] * means.square()).sum(0) / rows
    return Gaussians(means, counts, (squares / rows - between).clamp(min=_LEAST_SPREAD, max=1.0))


def drawn(found: Gaussians, per_class: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw points of each class that is there, so many of each.

    Returns:
        Points, and their classes.
    """
    labels = (found.counts > 0).nonzero()[:, 0].repeat_interleave(per_class)
    noise = torch.randn(len(labels), found.means.shape[1], generator=generator, dtype=torch.float64)
    return found.means[labels] + noise * found.variance.sqrt(), labels


def head(points: Tensor, labels: Tensor, classes: int, decay: float = 1e-4, steps: int = 100) -> tuple[Tensor, Tensor]:
    """Fit a linear head to points by logistic regression, from zero.

    Args:
        decay: of the weights.
        steps: of L-BFGS.
    Returns:
        Weight and bias, in float32.
    """
    weight = torch.zeros(classes, points.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(classes, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=steps, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = cross_entropy(points.double() @ weight.T + bias, labels) + decay * weight.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    if len(points):
        optimizer.step(closure)  # type: ignore[no-untyped-call]
    return weight.detach().float(), bias.detach().float()
