"""What happened in one round: who answered, who did not and why. A JSON line a round, and what NVFlare's monitor shows.

It stays on the server: nothing in it is ever sent to a site.
"""

import json
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from ..adapter import AdapterUpdate
from ..aggregation.combine import Combined
from ..aggregation.metrics import mean, medians
from ..errors import ModelError
from ..lora import effective_rank
from ..rounds import FILE_NAME


@dataclass
class Ledger:
    """The account of one round, filled as answers come in."""

    round: int
    total_rounds: int
    asked: list[str]
    bytes_down: int  # of the task's tensors as they travel, to each site
    answered: list[str] = field(default_factory=list)  # sites whose update was accepted, in the order they came
    out: dict[str, str] = field(default_factory=dict)  # site → why it does not count in this round
    late: list[str] = field(default_factory=list)  # sites that answered an earlier round during this one
    sites: dict[str, dict[str, Any]] = field(default_factory=dict)  # site → what it contributed
    metrics: dict[str, float] = field(default_factory=dict)  # of the adapter this round started from, their means
    medians: dict[str, float] = field(default_factory=dict)  # of the same: what chooses the best and is monitored
    after: dict[str, float] = field(default_factory=dict)  # of the sites' own adapters, after training
    factors: dict[str, dict[str, float]] = field(default_factory=dict)  # weight factor → site → its value
    guarded: dict[str, dict[str, Any]] = field(default_factory=dict)  # site → share of its change that counts, and why
    held: dict[str, str] = field(default_factory=dict)  # site → what it reported that counts as another number
    error: str = ""  # why nothing was merged and the adapter stayed as it was
    step_size: float | None = None  # η of the server step
    energy_lost: dict[str, float] = field(default_factory=dict)
    spectrum: dict[str, list[float]] = field(default_factory=dict)  # layer → singular values of the merged ΔW
    effective_rank: dict[str, float] = field(default_factory=dict)  # layer → directions that carry its energy
    how: dict[str, Any] = field(default_factory=dict)  # the job's `config.Aggregation`
    started: float = field(default_factory=time.monotonic)

    def usable(self) -> int:
        return len(set(self.answered) - set(self.out))

    def silent(self, reason: str) -> list[str]:
        """Those who were asked and said nothing; `reason` is given for them."""
        sites = sorted(set(self.asked) - set(self.answered) - set(self.out))
        self.out |= dict.fromkeys(sites, f"silent: {reason}")
        return sites

    def reasons(self) -> str:
        return "; ".join(f"{site}: {reason}" for site, reason in sorted(self.out.items())) or "none"

    def close(self, combined: Combined, updates: Mapping[str, AdapterUpdate]) -> None:
        self.out |= {site: f"rejected: {reason}" for site, reason in combined.refused.items()}
        self.guarded = {site: asdict(verdict) for site, verdict in combined.guarded.items()}
        self.held, self.error = dict(combined.held), combined.failed
        self.energy_lost, self.step_size = dict(combined.energy_lost), combined.step_size
        self.factors = {name: dict(values) for name, values in combined.factors.items()}
        self.spectrum = {layer: list(values) for layer, values in combined.spectrum.items()}
        self.effective_rank = {n: effective_rank(torch.tensor(v)) for n, v in combined.spectrum.items()}
        self.sites = {site: _contribution(updates[site], weight) for site, weight in combined.weights.items()}
        measured = received(updates)
        self.metrics, self.medians = mean(measured, combined.weights), medians(measured, combined.weights)
        self.after = mean({s: updates[s].report.after for s in combined.weights}, combined.weights)

    def write(self, run_dir: Path) -> None:
        """Add the round's line to the job's file.

        Raises:
            ModelError: the disk is full, or the folder may not be written to; the adapters are where they were.
        """
        ended = datetime.now(UTC).isoformat(timespec="seconds")
        line = asdict(self) | {"seconds": round(time.monotonic() - self.started, 3), "ended": ended}
        del line["started"]
        try:
            with (run_dir / FILE_NAME).open("a") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise ModelError(
                f"{FILE_NAME} cannot be written: {error.strerror}; make room for it and go on with nvflare-fm resume",
                str(error),
                code="rounds_not_written",
            ) from None

    def progress(self, latest: Mapping[str, float]) -> dict[str, Any]:
        """Flat, because `nvflare job monitor` looks for `round` and for metrics by name."""
        return {
            **latest,
            "round": self.round,
            "num_rounds": self.total_rounds,
            "sites_in": ", ".join(sorted(set(self.answered) - set(self.out))) or "none yet",
            "sites_out": self.reasons(),
            "late": ", ".join(sorted(self.late)) or "none",
            **({"error": self.error} if self.error else {}),
        }


def received(updates: Mapping[str, AdapterUpdate]) -> dict[str, Mapping[str, float]]:
    """What the sites measured of this round's adapter; those who come late measured an older one."""
    return {site: update.report.before for site, update in updates.items() if not update.staleness}


def _contribution(update: AdapterUpdate, weight: float) -> dict[str, Any]:
    told = asdict(update.report) | {"tokens_per_s": update.report.tokens_per_s}
    numbers = {k: v for k, v in told.items() if not isinstance(v, float) or math.isfinite(v)}
    return {"weight": weight, "staleness": update.staleness, "bytes_up": update.adapter.bytes_sent(), **numbers}
