"""Candidates: rows that a model wrote from public words, as one file of JSON lines that anybody may have written.

The first line says where the set comes from, each other line is a candidate. Reading it loads no torch.
"""

import hashlib
import json
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, StringConstraints

from ..config import CANDIDATES, Fingerprint, Name, Settings, Whole
from ..config import Text as Label
from ..errors import ConfigError
from ..files import MIB

MOST_ROWS, LONGEST, LARGEST = CANDIDATES, 2000, 16 * MIB  # candidates of a set, characters of a text, bytes of a file


def _plain(text: str) -> str:
    if not text.strip():
        raise ValueError("it is blank")
    if any(unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t" for c in text):
        raise ValueError("it has a control character, or half of a character")
    return text


Text = Annotated[str, StringConstraints(max_length=LONGEST), AfterValidator(_plain)]


class Candidate(Settings):
    """A row that a model wrote.

    Args:
        text: what is to be classified; where `prompt` is given, the answer to it.
        label: that the text was written for; None: the rows have no labels.
        prompt: of a row for instruction tuning.
        votes: sum over the sites, with their noise; None: nobody has voted.
    """

    text: Text
    label: Annotated[Label, AfterValidator(_plain)] | None = None
    prompt: Text | None = None
    votes: Annotated[float, Field(ge=-1e12, le=1e12)] | None = None

    @property
    def whole(self) -> str:
        """All that a reader of the row sees: what is embedded, filtered and compared with private rows."""
        return self.text if self.prompt is None else f"{self.prompt}\n{self.text}"

    @property
    def row(self) -> dict[str, str]:
        """The row as a task reads it."""
        if self.prompt is not None:
            return {"prompt": self.prompt, "completion": self.text}
        return {"text": self.text} if self.label is None else {"text": self.text, "label": self.label}


class Provenance(Settings):
    """Where a set comes from.

    Args:
        generator: name of the model that wrote the texts.
        fingerprint: of that model.
        prompts: SHA-256 of all that the model was told.
        seed: of the sampling.
        parent: digest of the set that this one was chosen or varied from; empty: none.
        epsilon: the largest that a site paid for the votes of this set; None: nobody voted.
    """

    generator: Name = ""
    fingerprint: Fingerprint = ""
    prompts: Fingerprint = ""
    seed: Whole = 0
    parent: Fingerprint = ""
    epsilon: Annotated[float, Field(gt=0, le=1e9)] | None = None


class _Head(Settings):
    """The first line of a file."""

    candidates: Literal[1]  # version of the format
    provenance: Provenance


@dataclass(frozen=True)
class CandidateSet:
    """Candidates and where they come from. A set may be empty: perhaps none got enough votes.

    Raises:
        ConfigError: `too_many_candidates`.
    """

    rows: tuple[Candidate, ...]
    provenance: Provenance

    def __post_init__(self) -> None:
        if len(self.rows) > MOST_ROWS:
            raise ConfigError(
                f"{len(self.rows)} candidates are more than the {MOST_ROWS} of a set; make fewer for each label",
                code="too_many_candidates",
            )

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the file, in hexadecimal."""
        return hashlib.sha256(write(self)).hexdigest()

    @property
    def texts(self) -> list[str]:
        """Of each candidate, `whole`."""
        return [candidate.whole for candidate in self.rows]

    @property
    def labels(self) -> list[str | None]:
        """Of each candidate."""
        return [candidate.label for candidate in self.rows]

    def select(self, places: Sequence[int]) -> tuple[Candidate, ...]:
        """The candidates at these places, in this order."""
        return tuple(self.rows[place] for place in places)


def read(data: bytes, where: str) -> CandidateSet:
    """Read a set, as a stranger may have written it.

    Args:
        data: content of the file.
        where: for errors.
    Raises:
        ConfigError: `candidates_unreadable`; it names the line, and nothing that stands there.
    """
    if len(data) > LARGEST:
        raise _unreadable(where, f"it has more than {LARGEST} bytes")
    head, *lines = data.rstrip(b"\n").split(b"\n")
    if len(lines) > MOST_ROWS:
        raise _unreadable(where, f"it has more than {MOST_ROWS} candidates")
    told = _read(_Head, head, where, 1)
    return CandidateSet(
        tuple(_read(Candidate, line, where, number) for number, line in enumerate(lines, 2)), told.provenance
    )


def write(candidates: CandidateSet) -> bytes:
    """Make the content of a file of which `read` makes the same set.

    Raises:
        ConfigError: `too_many_candidates`: the file would be too large to be read.
    """
    head = _Head(candidates=1, provenance=candidates.provenance)
    lines = [json.dumps(each.model_dump(exclude_none=True), ensure_ascii=False) for each in (head, *candidates.rows)]
    content = "".join(f"{line}\n" for line in lines).encode()
    if len(content) > LARGEST:
        raise ConfigError(
            f"the candidates take more than {LARGEST} bytes; make fewer, or shorter ones", code="too_many_candidates"
        )
    return content


def _read(kind: Any, line: bytes, where: str, number: int) -> Any:
    try:
        found = json.loads(line.decode())
        if not isinstance(found, dict):
            raise ValueError("it is no JSON object")
        return kind.read(found, "it")
    except (ValueError, RecursionError, ConfigError) as error:
        said = error.text if isinstance(error, ConfigError) else ""
        raise _unreadable(f"{where}, line {number}", said or "it is no JSON object in UTF-8") from None


def _unreadable(where: str, reason: str) -> ConfigError:
    return ConfigError(
        f"{where}: this is no set of candidates as nvflare-fm synth writes it: {reason}; make the set again",
        code="candidates_unreadable",
    )
