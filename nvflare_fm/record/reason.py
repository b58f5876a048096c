"""Why a site does not count in a round, or not in full: in words for a person, with a code that stays."""

import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field

from ..untrusted import Share

LONGEST = 20_000  # characters of a text; whoever shows it cuts and escapes it
Words = Annotated[str, Field(strict=True, max_length=LONGEST)]
Kind = Literal["refused", "rejected", "stopped", "silent", "late", "guard"]
_CODED = re.compile(r"(.*) \[([a-z0-9_]{1,64})\]", re.DOTALL)


@dataclass(frozen=True)
class Reason:
    """Why a site does not count in a round.

    Args:
        kind: the site "refused" or "stopped", or was "silent" or "late"; the server "rejected" its update, or a "guard"
            left it out.
        text: the reason, for a person.
        code: of the error behind it, if there is one; users look it up, and programs compare it.
    """

    kind: Kind
    text: Words
    code: Annotated[str, Field(strict=True, pattern=r"^[a-z0-9_]{0,64}$")] = ""

    @classmethod
    def of(cls, kind: Kind, message: str) -> "Reason":
        """Read the reason from an error's message, which ends with the code in brackets."""
        coded = _CODED.fullmatch(message[:LONGEST])
        return cls(kind, *coded.groups()) if coded else cls(kind, message[:LONGEST])

    def __str__(self) -> str:
        return f"{self.kind}: {self.text}" + (f" [{self.code}]" if self.code else "")


def _as_once_written(said: Any) -> Any:
    """Earlier versions wrote "kind: message"."""
    if isinstance(said, str):
        for kind in get_args(Kind):
            if said.startswith(f"{kind}: "):
                return Reason.of(kind, said.removeprefix(f"{kind}: "))
    return said


Written = Annotated[Reason, BeforeValidator(_as_once_written)]


@dataclass(frozen=True)
class Verdict:
    """What a guard decides about a site."""

    multiplier: Share  # of what the site changed; 0: its update does not count at all
    reason: Words  # empty where it counts about as much as the others
    weight: Share = 1.0  # of its weight, before the weights are divided by their sum; 0: it does not count at all

    @property
    def left_out(self) -> bool:
        """Whether nothing of the site counts."""
        return self.multiplier * self.weight == 0

    def __str__(self) -> str:
        parts = {"change": self.multiplier, "weight": self.weight}
        counts = [f"{part:.3g} of its {of}" for of, part in parts.items() if part < 1]
        return f"{' and '.join(counts)} counts: {self.reason}"
