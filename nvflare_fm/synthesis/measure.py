"""What synthetic rows are worth and what they tell: variety, coverage, copies, and whether they give away members."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ..privacy.audit.membership import auc
from .keep import nearest_distance, words


def distinct_2(texts: Sequence[str]) -> float:
    """The share of different pairs of neighbouring words among all pairs (arXiv:1510.03055); 0 where there are none."""
    pairs = [pair for said in map(words, texts) for pair in pairwise(said)]
    return len(set(pairs)) / len(pairs) if pairs else 0.0


def coverage(real: Tensor, made: Tensor, neighbours: int = 5) -> float:
    """The share of real points with a made one no farther than their own `neighbours`-th real neighbour.

    After Naeem et al., Reliable fidelity and diversity metrics (arXiv:2002.09797).

    Args:
        real: unit vectors, more than `neighbours`.
        made: unit vectors.
    """
    if not len(made):
        return 0.0
    reach = torch.cat([(1 - some @ real.T).kthvalue(neighbours + 1, dim=1).values for some in torch.split(real, 1024)])
    return float((nearest_distance(real, made) <= reach).double().mean())


@dataclass(frozen=True)
class Copying:
    """How near made rows are to private ones, beside how near held-out rows are, in 1 − cosine.

    Args:
        made: the median distance of a made row to the nearest private one.
        held_out: the same of rows that are as real, and of the same source, but not among the private ones.
        nearest: the share of made rows that are nearer than all but a twentieth of the held-out ones. Where made rows
            are no copies, it is at most a twentieth.
    """

    made: float
    held_out: float
    nearest: float


def copying(made: Tensor, private: Tensor, held_out: Tensor) -> Copying:
    """Compare how near made and held-out rows are to private ones.

    Args:
        made, private, held_out: unit vectors, at least one of each.
    """
    mine, theirs = nearest_distance(made, private), nearest_distance(held_out, private)
    near = torch.quantile(theirs, 0.05)
    return Copying(float(mine.median()), float(theirs.median()), float((mine < near).double().mean()))


def membership_auc(made: Tensor, members: Tensor, others: Tensor) -> float:
    """How well the distance to the nearest made row tells private rows from others: 0.5 is a guess, 1 always right.

    Args:
        made: unit vectors of what leaves the site.
        members: of the private rows.
        others: of rows of the same source that had no part in it.
    """
    return auc((-nearest_distance(members, made)).numpy(), (-nearest_distance(others, made)).numpy())
