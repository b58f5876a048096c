"""What happened in one round: who answered, who did not and why. A JSON line a round, and what NVFlare's monitor shows.

It stays on the server: nothing in it is ever sent to a site.
"""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from ..adapter import AdapterUpdate
from ..aggregation.combine import Combined
from ..aggregation.metrics import Measured, mean, medians
from ..algebra.lora import effective_rank
from ..record.reason import Reason, Verdict
from ..record.round import FILE_NAME, SPECTRA, Round, Spectra, append
from ..record.site_report import Contribution


@dataclass
class Ledger:
    """The account of one round, filled as answers come in."""

    round: int
    total_rounds: int
    asked: list[str]
    bytes_down: int  # of the task's tensors as they travel, to each site
    answered: list[str] = field(default_factory=list)  # sites whose update was accepted, in the order they came
    out: dict[str, Reason] = field(default_factory=dict)  # site → why it does not count in this round
    late: list[str] = field(default_factory=list)  # sites that answered an earlier round during this one
    result: dict[str, Any] = field(default_factory=dict)  # what came of it, by the names of `Round`'s fields
    spectra: Mapping[str, tuple[float, ...]] = field(default_factory=dict)  # layer → singular values of the merged ΔW
    started: float = field(default_factory=time.monotonic)

    def usable(self) -> int:
        return len(set(self.answered) - set(self.out))

    def silent(self, reason: str) -> list[str]:
        """Those who were asked and said nothing; `reason` is given for them."""
        sites = sorted(set(self.asked) - set(self.answered) - set(self.out))
        self.out |= dict.fromkeys(sites, Reason("silent", reason))
        return sites

    def reasons(self) -> str:
        return _listed(self.out) or "none"

    def close(self, combined: Combined, updates: Mapping[str, AdapterUpdate], how: Mapping[str, Any] = {}) -> None:
        """Note what the merge made of the updates.

        Args:
            how: the job's `config.Aggregation`.
        """
        weights, measured = combined.weights, received(updates)
        self.out |= combined.refused
        self.spectra = combined.spectrum
        self.result = {
            "sites": {site: _contribution(updates[site], weight) for site, weight in weights.items()},
            "metrics": mean(measured, weights),
            "medians": medians(measured, weights),
            "after": mean({site: updates[site].report.after for site in weights}, weights),
            "factors": combined.factors,
            "guarded": combined.guarded,
            "held": combined.held,
            "noised": combined.noised,
            "chosen": None,
            "error": combined.failed,
            "step_size": combined.step_size,
            "energy_lost": combined.energy_lost,
            "effective_rank": {n: effective_rank(torch.tensor(v)) for n, v in combined.spectrum.items()},
            "how": how,
        }

    def measured(self, metrics: Measured, weights: Mapping[str, float]) -> None:
        """Note what the sites measured in a round in which nobody trains."""
        self.result = {
            "sites": {site: Contribution(before=its) for site, its in sorted(metrics.items())},
            "metrics": mean(metrics, weights),
            "medians": medians(metrics, weights),
        }

    def voted(self, updates: Mapping[str, AdapterUpdate], chosen: int) -> None:
        """Note what the sites' votes chose."""
        self.result = {"sites": {site: _contribution(its) for site, its in sorted(updates.items())}, "chosen": chosen}

    @property
    def line(self) -> Round:
        """The round as it is written down."""
        return Round(
            round=self.round,
            total_rounds=self.total_rounds,
            asked=self.asked,
            bytes_down=self.bytes_down,
            answered=self.answered,
            out=self.out,
            late=self.late,
            seconds=round(time.monotonic() - self.started, 3),
            ended=datetime.now(UTC).isoformat(timespec="seconds"),
            **self.result,
        )

    def write(self, run_dir: Path) -> None:
        """Add the round's line to the job's file, and its singular values to theirs.

        Raises:
            ModelError: the disk is full, or the folder may not be written to; the adapters are where they were.
        """
        if self.spectra:
            append(run_dir / SPECTRA, Spectra(round=self.round, layers=self.spectra))
        append(run_dir / FILE_NAME, self.line)

    def progress(
        self,
        latest: Mapping[str, float],
        scaled: Mapping[str, Verdict] = {},
    ) -> dict[str, Any]:
        """Flat, because `nvflare job monitor` looks for `round` and for metrics by name.

        Args:
            latest: the metrics known last.
            scaled: sites of which a part counts in the round that was merged last.
        """
        error = self.result.get("error")
        spent = {site: f"at most {its.epsilon:g}" for site, its in self.result.get("sites", {}).items() if its.epsilon}
        return {
            **latest,
            "round": self.round,
            "num_rounds": self.total_rounds,
            "sites_in": ", ".join(sorted(set(self.answered) - set(self.out))) or "none yet",
            "sites_out": self.reasons(),
            "late": ", ".join(sorted(self.late)) or "none",
            **({"scaled": _listed(scaled)} if scaled else {}),
            **({"epsilon": _listed(spent)} if spent else {}),
            **({"error": error} if error else {}),
        }


def received(updates: Mapping[str, AdapterUpdate]) -> dict[str, Mapping[str, float]]:
    """What the sites measured of this round's adapter; those who come late measured an older one."""
    return {site: update.report.before for site, update in updates.items() if not update.staleness}


def _contribution(update: AdapterUpdate, weight: float | None = None) -> Contribution:
    return Contribution(
        **asdict(update.report), weight=weight, staleness=update.staleness, bytes_up=update.adapter.bytes_sent()
    )


def _listed(sites: Mapping[str, object]) -> str:
    return "; ".join(f"{site}: {said}" for site, said in sorted(sites.items()))
