"""What a site tells of one round of training, and what the server makes of it."""

from dataclasses import dataclass, field
from typing import Annotated

from pydantic import Field

from ..config import Quantization
from ..untrusted import Amount, Count, Metrics, Number, Share, Text


@dataclass(frozen=True)
class Report:
    """What a site reports of one round of training. Nothing else about its data leaves the site. None: not reported."""

    examples: Annotated[int, Field(strict=True, ge=1, le=10**9)] | None = None  # training examples at the site
    tokens: Count | None = None  # tokens seen in this round, padding not counted
    steps: Count | None = None  # optimizer steps taken
    loss: Number = float("nan")  # mean training loss over the round
    seconds: Amount = 0.0  # training alone, without loading or evaluation
    peak_memory_mib: Amount = 0.0  # of the training process (GPU memory where there is one)
    rank: Count = 0
    quantization: Quantization = "fp32"
    before: Metrics = field(default_factory=dict)  # metrics of the adapter received
    after: Metrics = field(default_factory=dict)  # metrics after local training
    bad_rows: Count | None = None  # rows of the site's files that could not be used; its own log says which and why
    label_skew: Share | None = None  # ℓ₂ distance of the label distribution to the uniform one, where the site tells it
    max_weight: Annotated[Share, Field(gt=0)] = 1.0  # the largest share of the merge this site wants
    lowered: Annotated[tuple[Text, ...], Field(max_length=16)] = ()  # what the site gave less of: "rank 16 → 8"
    epsilon: Amount | None = None  # most ε that the job costs a record of the site; None: no protection

    @property
    def tokens_per_s(self) -> float | None:
        """The speed of training; None: the site does not report tokens."""
        if self.tokens is None:
            return None
        return self.tokens / self.seconds if self.seconds > 0 else 0.0


@dataclass(frozen=True)
class Contribution(Report):
    """A site's report as the server records it. A site that only measured has no weight."""

    weight: Number | None = None
    staleness: Count = 0  # rounds since the adapter it was trained from was sent
    bytes_up: Count = 0  # of its tensors
