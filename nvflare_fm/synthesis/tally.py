"""The votes of all sites together, where one of them may lie.

A site can write no text by its votes: it chooses among the candidates, of which its own guard is still to let one
through at each site that trains on it.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from ..config import PrivacySettings
from ..privacy import gaussian

FACTOR = 4.0  # as the guard `clip_norm`


def noise(privacy: PrivacySettings) -> float:
    """Compute the noise σ on each number of a site's votes, from below: a site's accountant asks for a bit more."""
    if privacy.noise_multiplier is not None:
        return privacy.noise_multiplier
    assert privacy.epsilon is not None
    return gaussian.noise_multiplier(privacy.epsilon, 1, privacy.delta)


def tally(votes: Mapping[str, Tensor]) -> Tensor:
    """Add up the sites' votes. Votes longer (ℓ₂) than four times the median of all are first scaled down to that, so
    that of three sites or more none decides alone.

    Args:
        votes: site → its noisy votes, finite, one for each candidate.
    """
    sites = sorted(votes)
    lengths = torch.stack([votes[site].double().norm() for site in sites])
    most = FACTOR * lengths.quantile(0.5)
    factors = (most / lengths.clamp(min=1e-30)).clamp(max=1.0)
    return sum((factor * votes[site].double() for factor, site in zip(factors, sites, strict=True)), torch.zeros(()))
