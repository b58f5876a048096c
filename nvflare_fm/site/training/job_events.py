"""What a job has cost at this site in privacy so far, kept in the job's folder: the server may send more rounds than it
said it would, and each trainer that it makes restart must know of the rounds before.
"""

from pathlib import Path

from pydantic import ValidationError

from ...at_rest import replacing, standing
from ...errors import ModelError, PolicyError
from ...files import MIB, read_bytes
from ...privacy.accountant import within
from ...privacy.events import EVENTS, Event, together
from ...privacy.protection import Protection
from .distributed import gather, processes

FOLDER, FILE = "privacy", "events.json"


class JobEvents:
    """The events of all rounds that this site has begun in this job.

    Args:
        folder: of the job at this site; nothing: in memory alone, so that a new trainer starts afresh.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder / FOLDER if folder else None
        self._events: tuple[Event, ...] | None = None

    def read(self) -> tuple[Event, ...]:
        """All events so far; none before the first round.

        Raises:
            ModelError: the file is damaged. Going on without it could cost more than the job may.
        """
        if self._events is None:
            self._events = ()
            if self.folder and (file := standing(self.folder) / FILE).exists():
                try:
                    self._events = EVENTS.validate_json(read_bytes(file, MIB))
                except (OSError, ValueError, ValidationError) as error:
                    self._events = None
                    raise ModelError(
                        "the record of what this job has cost in privacy so far is damaged; end the job",
                        f"{file}: {error}",
                        code="events_damaged",
                    ) from None
        return self._events

    def begin(self, protection: Protection, most: float | None) -> None:
        """Note a round before it begins, so that a crash leaves none out.

        Args:
            most: ε that the job may cost in all; None: it does not say.
        Raises:
            PolicyError: with this round the job would cost more.
            ModelError: the record cannot be read or written.
        """
        before = gather(self.read())[0]  # all have read by now, and the first process alone writes
        events = together((*before, *protection.events))
        if most is not None and not within(events, protection.delta, most):
            raise PolicyError(
                "this round would take the job beyond its own privacy.epsilon: the server asks for more rounds or "
                "steps than it said; end the job",
                code="beyond_epsilon",
            )
        self._events = events
        if self.folder and processes()[0] == 0:
            try:
                with replacing(self.folder) as new:
                    (new / FILE).write_bytes(EVENTS.dump_json(events))
            except OSError as error:
                raise ModelError(
                    "what the round costs in privacy cannot be noted; make room in the job's folder",
                    str(error),
                    code="events_not_written",
                ) from None
