"""What noise the server added to a round's mean change, where a job protects each site's whole part."""

from dataclasses import dataclass

from ..untrusted import Amount, Count


@dataclass(frozen=True)
class Noised:
    """The noise of one round and what it has cost."""

    noise_multiplier: Amount  # σ, in multiples of max_norm
    max_norm: Amount  # to which each site's change was clipped
    expected_sites: Count  # that the sum was divided by
    clipped: Count  # sites whose change was longer
    ratio: Amount  # the noise's length to the longest that the mean change can be
    epsilon: Amount  # of all rounds so far, to each site
    delta: Amount

    def __str__(self) -> str:
        return (
            f"{self.clipped} changes clipped to {self.max_norm:g}, noise of {self.ratio:.3g} times that length "
            f"(σ {self.noise_multiplier:.3g}), ε of a site {self.epsilon:.3g} so far"
        )
