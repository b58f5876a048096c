"""What differential privacy takes: the noise of a site, before anything runs."""

from dataclasses import dataclass

from ..config import TaskPlan
from ..job import private
from .accountant import epsilon, noise_multiplier
from .events import Event


@dataclass(frozen=True)
class Noise:
    """What a job's privacy means at one site."""

    site: str
    records: int
    records_per_step: float  # in the mean
    steps: int  # of the whole job
    noise_multiplier: float  # σ, in clipping norms
    epsilon_rdp: float  # of all steps, by Rényi differential privacy
    epsilon_prv: float  # by numerical composition
    ratio: float | None  # a step's noise to the longest that its mean gradient can be; None: not known


def noise(site: str, plan: TaskPlan, records: int, rounds: int, processes: int, numbers: int | None) -> Noise:
    """Derive the noise of a site as its trainer will.

    Args:
        plan: as this site is to carry it out.
        records: that the site trains on.
        processes: that train together.
        numbers: that are trained; None: not known.
    Raises:
        ConfigError: δ is too large for so few records, or no noise is enough.
    """
    private.check_delta(plan, records)
    settings, rate, steps = plan.privacy, private.sample_rate(plan, records, processes), plan.training.local_steps
    sigma, expected = settings.noise_multiplier, rate * records
    if sigma is None:
        assert settings.epsilon is not None
        sigma = noise_multiplier(settings.epsilon, settings.delta, rate, steps * rounds)
    events = [Event(sigma, rate, steps * rounds)]
    return Noise(
        site=site,
        records=records,
        records_per_step=expected,
        steps=steps * rounds,
        noise_multiplier=sigma,
        epsilon_rdp=epsilon(events, settings.delta, "rdp"),
        epsilon_prv=epsilon(events, settings.delta, "prv"),
        ratio=None if numbers is None else sigma * numbers**0.5 / expected,
    )
