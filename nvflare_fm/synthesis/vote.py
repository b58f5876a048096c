"""Private rows vote for the candidates that are most like them, and the count is noised: Aug-PE, arXiv:2403.01749.

Of the private rows, this is all that leaves a site. Whoever adds or removes one unit (a row, or all rows of a patient)
moves the count by at most 1 in ℓ₂, however many rows the unit has, so one Gaussian mechanism protects it.
"""

import math
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from ..privacy.chance import normal

_AT_ONCE = 2048  # rows compared with all candidates of their label


def votes(
    rows: Tensor,
    row_labels: Sequence[str | None],
    units: Sequence[Hashable],
    candidates: Tensor,
    candidate_labels: Sequence[str | None],
    nearest: int = 1,
) -> Tensor:
    """Count for each candidate how many rows of its own label are nearest to it.

    A unit has one vote, which its rows share. With `nearest` above 1, a row votes for so many candidates, 1/√nearest
    for each: the votes of a unit still have a length of at most 1 in ℓ₂, and more of them stand against the same noise.

    Args:
        rows: embeddings of the private rows, one unit vector each.
        row_labels: None where rows have none; a row of a label without candidates does not vote.
        units: whose each row is.
        candidates: embeddings of the candidates, likewise.
        candidate_labels: of the candidates.
        nearest: candidates that a row votes for.
    Returns:
        Votes of each candidate, in float64.
    """
    total = torch.zeros(len(candidates), dtype=torch.float64)
    voters: dict[str | None, list[int]] = {}
    for place, label in enumerate(row_labels):
        voters.setdefault(label, []).append(place)
    choices: dict[str | None, list[int]] = {}
    for place, label in enumerate(candidate_labels):
        choices.setdefault(label, []).append(place)
    voting = [place for label in voters.keys() & choices.keys() for place in voters[label]]
    rows_of: dict[Hashable, int] = {}
    for place in voting:
        rows_of[units[place]] = rows_of.get(units[place], 0) + 1
    shares = torch.tensor([1 / rows_of.get(unit, 1) for unit in units], dtype=torch.float64)
    for label in voters.keys() & choices.keys():
        open_to = torch.tensor(choices[label])
        count = min(nearest, len(open_to))
        for some in torch.split(torch.tensor(voters[label]), _AT_ONCE):
            alike = (rows[some] @ candidates[open_to].T).nan_to_num(nan=-math.inf)
            chosen = open_to[alike.topk(count, dim=1).indices]
            weight = (shares[some] / math.sqrt(count))[:, None].expand(-1, count)
            total.index_add_(0, chosen.flatten(), weight.flatten())
    return total


def noised(counts: Tensor, sigma: float, draw: Callable[[int], Tensor] = normal) -> Tensor:
    """Add noise to a count, as the Gaussian mechanism does.

    Args:
        counts: what `votes` returned.
        sigma: the noise's standard deviation; as the count moves by at most 1, it is the noise multiplier, too.
        draw: standard normal numbers; by default from the operating system, so that nobody can draw them again.
    Returns:
        The count with noise, rounded to float32 as `privacy.chance` asks.
    """
    return (counts.double() + sigma * draw(len(counts)).double()).float()
