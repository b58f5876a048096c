"""What may leave a site that states a floor, decided on plain values; `flare/egress.py` carries the decisions out.

Whatever is not named here stays at the site.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..config import TaskPlan
from ..errors import PolicyError
from ..record.site_report import Report
from .budget import ROW
from .protection import Protection

if TYPE_CHECKING:  # torch, which a site's parent process does without
    from ..adapter import Description

VOTES = "votes"  # the only tensor of a vote
NO_METRICS = "metrics to none: this site keeps them"
_LOWERED = re.compile(r"(rank|batch_size|local_steps) to [0-9]{1,9}")
_CODED = re.compile(r".* \[([a-z0-9_]{1,64})\]", re.DOTALL)

# Reasons that follow from the job and the site file alone. All others may tell something about the rows.
TOLD = frozenset(
    {
        *("above_limit", "not_an_alias", "not_offered", "not_pinned", "not_welcome", "kept_here", "embeddings"),
        *("not_trainable", "refused", "unprotected", "weak_unit", "weak_delta", "epsilon_above_budget", "no_egress"),
        *("metrics_withheld", "submission_withheld", "unasked_message", "other_protection", "votes_off"),
        *("budget_spent", "budget_busy", "budget_damaged", "budget_not_written", "other_base", "too_few_labels"),
        *("no_plan", "other_version", "wrong_setting", "not_the_pinned_weights", "egress_failed"),
        *("private_steps", "private_checkpointing", "private_max_grad_norm", "private_classes", "private_counts"),
        *("private_own_half", "no_context", "context_not_signed"),
        *("counts_rows", "no_secret", "site_file_wrong", "site_file_malformed", "site_file_unreadable"),
    }
)
KEPT = "this site keeps the reason, for it may tell something about the rows; its own log has it [reason_withheld]"


@dataclass(frozen=True)
class Floor:
    """What a site demands of whatever leaves it."""

    max_epsilon: float | None = None  # over all jobs, for a data set
    delta: float = 1e-5
    unit: str = ROW
    required: tuple[str, ...] = ()  # of clip, noise and encryption

    @property
    def needs_noise(self) -> bool:
        return self.max_epsilon is not None or bool({"clip", "noise"} & {*self.required})

    @property
    def needs_encryption(self) -> bool:
        return "encryption" in self.required


@dataclass(frozen=True)
class Asked:
    """The task that a message answers, as the site's gate has decided it."""

    plan: TaskPlan
    round: int
    rounds: int = 1  # of the whole job
    names: frozenset[str] = frozenset()  # of the tensors that came with it


def unprotected(plan: TaskPlan, floor: Floor, encrypts: bool) -> list[PolicyError]:
    """Compare what a plan offers with what the site demands. Reasons name settings only.

    Args:
        encrypts: whether the plan's uplink ends in encryption.

    Returns:
        Why the site refuses; empty where it does not.
    """
    privacy, reasons = plan.privacy, []
    if floor.needs_noise and not privacy.asked:
        what = "required_protection" if {"clip", "noise"} & {*floor.required} else "max_epsilon"
        said = f"this site lets no update leave without differential privacy ({what}); set privacy.epsilon"
        reasons.append(PolicyError(said, code="unprotected"))
    if floor.needs_encryption and not encrypts:
        said = "this site lets no update leave unencrypted (required_protection); add a transform that encrypts to "
        reasons.append(PolicyError(f"{said}uplink", code="unprotected"))
    if not plan.training.local_steps:
        said = "training.local_epochs: the number of steps would tell how many rows this site has; set local_steps"
        reasons.append(PolicyError(said, code="counts_rows"))
    if not privacy.asked:
        return reasons
    reasons += _weaker(privacy.unit, privacy.delta, floor)
    if floor.max_epsilon is not None and privacy.epsilon is not None and privacy.epsilon > floor.max_epsilon:
        said = f"privacy.epsilon is more than the {floor.max_epsilon:g} that this site gives to all jobs together "
        reasons.append(PolicyError(f"{said}(max_epsilon); ask for less", code="epsilon_above_budget"))
    return reasons


def _weaker(unit: str, delta: float, floor: Floor) -> list[PolicyError]:
    reasons = []
    if floor.unit not in (unit, ROW):
        said = f"privacy.unit protects less than the {floor.unit!r} that this site protects (unit); set it to that"
        reasons.append(PolicyError(said, code="weak_unit"))
    if delta > floor.delta:
        said = f"privacy.delta is more than the {floor.delta:g} of this site (delta); lower it"
        reasons.append(PolicyError(said, code="weak_delta"))
    return reasons


def check_update(
    protection: Protection | None,
    floor: Floor,
    asked: Asked | None,
    tensors: "Mapping[str, Description]",
    ranks: Collection[int],
    encrypts: bool,
) -> None:
    """Hold an update that is about to leave against the site's floor and the task that it answers.

    Args:
        protection: what the trainer states.
        tensors: of the update, by PEFT name, as they were before they were encoded.
        ranks: of its pairs.
        encrypts: whether it is encrypted.

    Raises:
        PolicyError: it must not leave.
    """
    if asked is None:
        raise PolicyError("an update that nobody asked for does not leave this site", code="unasked_message")
    if floor.needs_encryption and not encrypts:
        raise PolicyError("the update is not encrypted and does not leave this site", code="unprotected")
    if floor.needs_noise and protection is None:
        raise PolicyError(
            "the trainer states no protection of its update, which does not leave this site; update nvflare_fm there",
            code="unprotected",
        )
    if protection is not None:
        if reasons := _weaker(protection.unit, protection.delta, floor):
            raise reasons[0]
        if protection.data != asked.plan.data:
            raise PolicyError(
                "the trainer states the protection of another data set than the job's", code="other_protection"
            )
        if (protection.mechanism == "votes") != bool(asked.plan.votes):
            raise PolicyError("the trainer states the protection of another kind of answer", code="other_protection")
    unknown = tensors.keys() - asked.names if asked.names and not encrypts else ()  # ciphertexts came by other names
    if asked.plan.votes and {name: its.shape for name, its in tensors.items()} != {VOTES: (asked.plan.votes,)}:
        raise PolicyError(
            "a vote is one number for each candidate; what the trainer sends is another message and does not leave "
            "this site",
            code="unasked_message",
        )
    rank = asked.plan.padded_to or asked.plan.rank
    if unknown or (rank and {*ranks} - {rank}):
        raise PolicyError(
            "the update has other tensors than the job's adapter and does not leave this site", code="unasked_message"
        )


def public_report(report: Report, plan: TaskPlan) -> Report:
    """What of a site's report leaves it under a floor: what the job and the site file say, and nothing of the rows."""
    return Report(
        steps=plan.training.local_steps or None,
        rank=plan.rank,
        quantization=plan.quantization,
        max_weight=report.max_weight,
        lowered=tuple(text for text in report.lowered if text == NO_METRICS or _LOWERED.fullmatch(text)),
    )


def public_reason(reason: str) -> str:
    """What of a refusal's reason leaves a site under a floor."""
    coded = _CODED.fullmatch(reason)
    return reason if coded and coded.group(1) in TOLD else KEPT
