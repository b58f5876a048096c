"""Differential privacy of each site's whole part in a job, as DP-FedAvg has it (arXiv:1710.06963): what noise it takes,
what it costs, and whether anything can be learned beside it. The server knows all of this before it asks a site.

Neighbours are two runs of a job that differ by the changes of one site, in all rounds: in one of them they are zero.
Whether a site answered is no secret.
"""

import math
from dataclasses import dataclass

from ..adapter import LORA_B, Adapter
from ..config import ClientPrivacySettings
from ..errors import ConfigError
from . import gaussian

HOPELESS = 0.2  # noise on one number to the farthest that all rounds can move the adapter; see docs/privacy.md
FELT = 0.01  # from here on it costs a good part of the accuracy


@dataclass(frozen=True)
class ClientNoise:
    """The noise of a job."""

    noise_multiplier: float  # σ of a round, in multiples of max_norm
    max_norm: float
    expected_sites: int
    delta: float
    rounds: int

    @classmethod
    def of(cls, settings: ClientPrivacySettings, rounds: int) -> "ClientNoise":
        """Derive the noise of each of a job's rounds.

        Raises:
            ConfigError: δ is so large that one site's part could be published as it is.
        """
        if settings.delta * settings.expected_sites >= 1:
            raise ConfigError(
                "client_privacy.delta must be less than one in expected_sites, or it would allow one site's changes to "
                "be published; lower it",
                code="delta_too_large",
            )
        sigma = settings.noise_multiplier
        if sigma is None:
            assert settings.epsilon is not None
            sigma = gaussian.noise_multiplier(settings.epsilon, rounds, settings.delta)
        return cls(sigma, settings.max_norm, settings.expected_sites, settings.delta, rounds)

    @property
    def spread(self) -> float:
        """The standard deviation of the noise on each number of the mean change."""
        return self.noise_multiplier * self.max_norm / self.expected_sites

    def epsilon(self, rounds: int) -> float:
        """Compute the ε that so many rounds cost a site."""
        return gaussian.epsilon(self.noise_multiplier, rounds, self.delta)

    def ratio(self, numbers: int) -> float:
        """Compare the length of a round's noise with the longest that the mean change can be."""
        return self.noise_multiplier * math.sqrt(numbers) / self.expected_sites

    @property
    def per_number(self) -> float:
        """Compare all rounds' noise on one number with the farthest that they can move the adapter."""
        return self.noise_multiplier / (self.expected_sites * math.sqrt(self.rounds))

    def ratio_of_all(self, numbers: int) -> float:
        """Compare the length of all rounds' noise together with the farthest that they can move the adapter."""
        return self.ratio(numbers) / math.sqrt(self.rounds)


def noised_numbers(adapter: Adapter) -> int:
    """Count the numbers that get noise: those of B, and of every tensor without factors."""
    found = adapter.descriptions()
    return sum(math.prod(found[name].shape) for name in (*(layer + LORA_B for layer in adapter.lora), *adapter.dense))


def checked(settings: ClientPrivacySettings, rounds: int, start: Adapter | None) -> ClientNoise:
    """Derive the noise of a job, and refuse a job that would learn nothing beside it.

    Args:
        rounds: of the job, those before a resumed one included.
        start: the adapter that the job brings.

    Raises:
        ConfigError: there is no such adapter, δ is too large, or the noise is.
    """
    if not start:
        raise ConfigError(
            "client_privacy needs an adapter that the job starts from: a first round without one publishes what the "
            "sites sent; train one on data that is no secret, and bring it as initial_adapter",
            code="client_start",
        )
    noise = ClientNoise.of(settings, rounds)
    if noise.per_number > HOPELESS:
        needed = math.ceil(noise.expected_sites * noise.per_number / HOPELESS)
        raise ConfigError(
            f"client_privacy: the noise of all rounds on each single number is {noise.per_number:.3g} times the "
            f"farthest that they can move the whole adapter, and beyond {HOPELESS:g} next to nothing is learned; it "
            f"takes {needed} sites, or a larger epsilon. With few sites, protect records (privacy.epsilon)",
            code="client_noise_hopeless",
        )
    return noise
