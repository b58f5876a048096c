"""How far a language model gives a secret away: the rank of the true one among others that could have stood there.

After Carlini et al., "The Secret Sharer" (arXiv:1802.08232).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import log2

CANDIDATES = 1000  # the true secret among them


@dataclass(frozen=True)
class Exposure:
    """Where a secret stands among its alternatives."""

    rank: float  # 1: no alternative is likelier; ties count half
    candidates: int

    @property
    def bits(self) -> float:
        """log₂ of candidates over rank. Of a secret that was not learned it is above b bits with probability 2⁻ᵇ."""
        return log2(self.candidates / self.rank)


def exposure(secret: float, alternatives: Sequence[float]) -> Exposure:
    """Rank a secret by its loss among alternatives drawn as it was."""
    below = sum(loss < secret for loss in alternatives)
    ties = sum(loss == secret for loss in alternatives)
    return Exposure(1 + below + ties / 2, len(alternatives) + 1)
