"""A head in closed form: sums over what a frozen base model makes of each class's texts, instead of texts.

Sites' sums add up to those of all rows in one place, and the head follows from the sums alone: it is that of pooled
rows, however labels and topics are spread over sites (Fed3R, arXiv:2402.07155; FedPFT, arXiv:2402.01862). The classes
are taken for Gaussians of one covariance, which makes the head a linear discriminant analysis.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SUMS, COUNTS, SQUARES = NAMES = "head_start.sums", "head_start.counts", "head_start.squares"  # as they travel
WEIGHT, BIAS, CONSTANT = START = "head_start.weight", "head_start.bias", "head_start.constant"
_PRECISION = 1e-4  # of a feature's mean square; rounding makes up to 1e-5 of it at the greatest width
WIDEST = 2**13  # features; their products are 256 MiB


@dataclass(frozen=True)
class Sums:
    """What a site tells of its rows' features.

    Args:
        sums: of each class, (classes, width).
        counts: rows of each class, (classes,).
        squares: the sum over all rows of the products of two features, (width, width).
    """

    sums: Tensor
    counts: Tensor
    squares: Tensor

    @classmethod
    def none(cls, classes: int, width: int) -> "Sums":
        """Those of no row, in float64."""
        shapes = (classes, width), (classes,), (width, width)
        return cls(*(torch.zeros(shape, dtype=torch.float64) for shape in shapes))

    @classmethod
    def read(cls, tensors: Mapping[str, Tensor]) -> "Sums":
        """The inverse of `tensors`, in float64."""
        return cls(*(tensors[name].double() for name in NAMES))

    def tensors(self) -> dict[str, Tensor]:
        """As they travel, in float32."""
        return {name: value.float() for name, value in zip(NAMES, vars(self).values(), strict=True)}

    def add(self, features: Tensor, labels: Sequence[int]) -> None:
        """Add rows, in place.

        Args:
            features: (rows, width).
            labels: of the rows, 0 to below the number of classes.
        """
        points, places = features.double(), torch.tensor(list(labels), dtype=torch.long)
        self.sums.index_add_(0, places, points)
        self.counts.index_add_(0, places, torch.ones(len(points), dtype=torch.float64))
        self.squares.addmm_(points.T, points)


@dataclass(frozen=True)
class Head:
    """A linear head: logits = features · weightᵀ + bias.

    Args:
        weight: (classes, width).
        bias: (classes,).
        constant: (width,); its product with any row's features is near 1, for heads that have no bias of their own.
    """

    weight: Tensor
    bias: Tensor
    constant: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        """The labels that it reads in features of (rows, width): (rows,)."""
        return (features.float() @ self.weight.T + self.bias).argmax(1)

    @classmethod
    def read(cls, tensors: Mapping[str, Tensor]) -> "Head":
        """The inverse of `tensors`."""
        return cls(*(tensors[name].float() for name in START))

    def tensors(self) -> dict[str, Tensor]:
        """As they travel, in float32."""
        return dict(zip(START, vars(self).values(), strict=True))

    @property
    def without_bias(self) -> Tensor:
        """The weight of a head that has no bias and answers nearly the same."""
        return self.weight + self.bias[:, None] * self.constant


def means(total: Sums) -> Tensor:
    """The mean of each class, (classes, width); of a class without rows it is 0."""
    there = (total.counts > 0)[:, None]
    return torch.where(there, total.sums / total.counts.clamp(min=1e-9)[:, None], 0.0)


def covariance(total: Sums) -> tuple[Tensor, Tensor]:
    """The covariance within the classes, (width, width), and of each feature the least variance that float32 sums can
    tell from 0, (width,).
    """
    rows, centers = total.counts.sum().clamp(min=1), means(total)
    products = (total.squares + total.squares.T) / 2
    found = (products - (total.counts[:, None] * centers).T @ centers) / rows
    return found, (_PRECISION * products.diagonal() / rows).clamp(min=1e-12)


def of_rows(total: Sums) -> bool:
    """Whether there can be rows with such sums: whole numbers of them, and no variance within a class below 0."""
    counts = total.counts
    if (counts < 0).any() or (counts != counts.round()).any() or total.sums[counts == 0].any():
        return False
    within, least = covariance(total)
    return not torch.linalg.cholesky_ex(within + (least / 2).diag()).info


def precision(total: Sums) -> Tensor:
    """The inverse of the covariance within the classes, (width, width), of sums `of_rows`.

    The covariance is shrunk towards a multiple of the identity by width / rows: the fewer rows, the less is known.
    """
    within, least = covariance(total)
    shrunk = within.diagonal().mean().clamp(min=0) * len(within) / total.counts.sum().clamp(min=1)
    return torch.cholesky_inverse(torch.linalg.cholesky(within + torch.maximum(least, shrunk).diag()))


def drawn(total: Sums, points: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw features from the Gaussians that sums `of_rows` stand for.

    Returns:
        Features, (points, width), and their labels, (points,).
    """
    generator = torch.Generator().manual_seed(seed)
    labels = torch.multinomial(total.counts, points, replacement=True, generator=generator)
    within, least = covariance(total)
    factor = torch.linalg.cholesky(within + least.diag())
    noise = torch.randn(points, len(factor), generator=generator, dtype=torch.float64)
    return means(total)[labels] + noise @ factor.T, labels


def head(total: Sums, inverse: Tensor | None = None) -> Head:
    """Fit the head to the sum over all sites: a linear discriminant analysis. A class without rows lies in the middle.

    Args:
        inverse: their `precision`, where it is there already.

    Returns:
        It, in float32.
    """
    rows = total.counts.sum().clamp(min=1)
    inverse = precision(total) if inverse is None else inverse
    middle = total.sums.sum(0) / rows
    apart = torch.where((total.counts > 0)[:, None], means(total) - middle, 0.0)
    weight = apart @ inverse
    bias = ((total.counts + 0.5) / rows).log() - (weight * apart).sum(1) / 2 - weight @ middle
    towards = inverse @ middle
    constant = towards / (middle @ towards).clamp(min=1e-12)
    return Head(*(tensor.float() for tensor in (weight, bias, constant)))
