"""What can go wrong, as a small tree; every message names the site or tensor and the remedy.

FmError
├── ConfigError    a setting nobody knows, or a combination that cannot work
├── PolicyError    the site does not allow what the job asks
├── ModelError     a base model that is missing, unsafe or not the one the federation trains
├── DataError      a file or row that cannot be trained on
├── WireError      a message that is incomplete, malformed or not finite
└── TrainingError  training that diverged or ran out of memory
"""


class FmError(Exception):
    """An error a person can act on.

    Args:
        message: what happened and the remedy; safe to leave the site (no path, no data, no host name).
        local: more detail, such as a path, for the site's own log only.
        code: a name for this kind of error, such as "adapter_damaged", that stays when its wording changes: users look
            it up, tests match it. It ends the message, in brackets.
    """

    def __init__(self, message: str, local: str = "", *, code: str = "") -> None:
        message = f"{message} [{code}]" if code else message
        super().__init__(f"{message} [{local}]" if local else message)
        self.message, self.local, self.code = message, local, code


class ConfigError(FmError):
    pass


class PolicyError(FmError):
    pass


class ModelError(FmError):
    pass


class DataError(FmError):
    pass


class WireError(FmError):
    pass


class TrainingError(FmError):
    pass
