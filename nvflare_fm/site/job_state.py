"""What a site keeps of one job from round to round, so that a trainer that is started again goes on as before."""

from dataclasses import dataclass, field
from pathlib import Path

from ..job.at_home import PERSONAL
from .model.own_adapter import GLOBAL, OwnAdapter
from .training.job_events import JobEvents
from .training.kept_state import KeptState


@dataclass
class JobState:
    """Given no folder, all of it is in memory alone.

    Args:
        own: the factor that the site keeps to itself, where a merge rule shares only the other.
        global_adapter: the global adapter, where only the sites can read it.
        personal: the adapter that the site has trained on for itself.
        kept: what transforms keep of the last update.
        events: what the job has cost in privacy so far.
    """

    own: OwnAdapter = field(default_factory=OwnAdapter)
    global_adapter: OwnAdapter = field(default_factory=OwnAdapter)
    personal: OwnAdapter = field(default_factory=OwnAdapter)
    kept: KeptState = field(default_factory=KeptState)
    events: JobEvents = field(default_factory=JobEvents)

    @classmethod
    def at(cls, folder: Path) -> "JobState":
        """In the job's folder at the site."""
        adapters = OwnAdapter(folder), OwnAdapter(folder, GLOBAL), OwnAdapter(folder, PERSONAL)
        return cls(*adapters, KeptState(folder), JobEvents(folder))
