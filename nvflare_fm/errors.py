"""The errors of this package. Every message names the site or tensor and the remedy.

FmError
├── ConfigError    a setting nobody knows, or a combination that cannot work
├── PolicyError    the site does not allow what the job asks
├── ModelError     a base model that is missing, unsafe or not the one the federation trains
├── DataError      a file or row that cannot be trained on
├── WireError      a message that is incomplete, malformed or not finite
└── TrainingError  training that diverged or ran out of memory
"""

from functools import partial
from typing import Any


class FmError(Exception):
    """An error that a person can act on.

    Args:
        message: what happened and the remedy. It may leave the site, so it has no path, no data and no host name.
        local: more detail, such as a path, for the site's own log only.
        code: a name for this kind of error, such as "adapter_damaged", which stays when the wording changes. It ends
            the message, in brackets. Users look it up, and tests match it.
    """

    def __init__(self, message: str, local: str = "", *, code: str) -> None:
        self.text, self.local, self.code = message, local, code
        self.message = f"{message} [{code}]"
        super().__init__(f"{self.message} [{local}]" if local else self.message)

    def __reduce__(self) -> tuple[Any, ...]:
        """Errors cross processes whole; by Exception's own rule they would lose their code."""
        return partial(type(self), code=self.code), (self.text, self.local)


class ConfigError(FmError):
    """An unknown setting, a value out of range, or a combination that cannot work."""


class PolicyError(FmError):
    """The site does not allow what the job asks."""


class ModelError(FmError):
    """A base model or an adapter that is missing, unsafe, damaged, or another than the one expected."""


class DataError(FmError):
    """A file or row that cannot be used."""


class WireError(FmError):
    """A message that is incomplete, malformed or not finite."""


class TrainingError(FmError):
    """Training that diverged or ran out of memory."""
