"""The federation itself, through NVFlare's simulator; its log goes to a file."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import FmError
from ..record.round import Round
from .trial import JOB, Trial

if TYPE_CHECKING:
    from ..flare.simulation import Simulation


def simulation(trial: Trial) -> "Simulation":
    """The job and its sites, ready to run."""
    from ..flare.environments import set_up
    from ..flare.recipe import FedPEFTRecipe
    from ..flare.simulation import Simulation

    recipe = FedPEFTRecipe(
        JOB,
        num_rounds=trial.rounds,
        min_sites=len(trial.sites),
        sites={site.name: {"rank": site.rank} for site in trial.sites},
        key_metric=trial.subject.metric,
        key_metric_mode=trial.better,
        **trial.plan.model_dump(exclude_defaults=True),
    )
    folder = trial.output / "federation"
    recipe.export(str(folder / "job"))
    offers = {site.name: trial.offer(site.folder) for site in trial.sites}
    set_up(folder / JOB, offers)
    return Simulation(folder / "job" / JOB, folder / JOB, list(offers))


def adapter_folder(run: "Simulation") -> Path:
    """The adapter of the last round: choosing the best round by the test rows would flatter it."""
    return run.results / "adapters" / "last"


def follow(run: "Simulation") -> Iterator[Round]:
    """Each round as the server writes it down, the measurement after the last one included.

    Raises:
        FmError: the simulator ended early, or a site does not count.
    """
    for line in run.run():
        if line.out:
            said = (f"{site} does not count: {reason}" for site, reason in sorted(line.out.items()))
            raise FmError("; ".join(said), str(run.log), code="site_left_out")
        yield line
