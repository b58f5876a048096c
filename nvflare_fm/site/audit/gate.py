"""Holds back an update whose losses tell which rows it was trained on, where the site file sets `max_membership_auc`.

The rows of the round are compared with validation rows. The upper end of the AUC's interval must be within the limit:
an update leaves where the rows show that it tells little, not where they are too few to show anything.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Any

from ...adapter import Adapter
from ...errors import PolicyError
from ...privacy.audit.membership import LEAST, by_chance, membership
from ..data.loading import SiteData
from ..training.evaluation import losses

if TYPE_CHECKING:
    from ..worker import Job

OFF, MOST = 1.0, 200  # rows of either side
Stop = Callable[[], bool]


@dataclass(frozen=True)
class Compared:
    """The rows that are compared: places of the examples of each."""

    members: Sequence[Sequence[int]]
    held_out: Sequence[Sequence[int]]
    largest: float  # AUC that an update may have


def compared(data: SiteData, chosen: Sequence[int], largest: float) -> Compared | None:
    """Choose the rows to compare; None where the site sets no limit.

    Args:
        chosen: examples of the round.
        largest: the site's `max_membership_auc`.
    Raises:
        PolicyError: they are so few that an update which tells nothing would be held back, too.
    """
    if largest == OFF:
        return None
    train, validation = data.different
    seen = {data.contents[0][place] for place in chosen}
    members = [places for content, places in train.items() if content in seen and content not in validation]
    held_out = [places for content, places in validation.items() if content not in train]
    some, others = (Random(0).sample(rows, min(MOST, len(rows))) for rows in (members, held_out))
    if min(len(some), len(others)) < LEAST or 0.5 + by_chance(len(some), len(others)) > largest:
        raise PolicyError(
            "this site measures what an update tells of its rows before it leaves (max_membership_auc), and the round "
            "has too few rows for its limit, or the validation file has; raise local_steps or batch_size, or ask the "
            "site's admin for more validation rows",
            f"{len(some)} rows of the round, {len(others)} held out, max_membership_auc {largest:g}",
            code="few_rows",
        )
    return Compared(some, others, largest)


def reference(job: "Job", should_stop: Stop) -> tuple[list[float], list[float]] | None:
    """Measure the model as it was before its first round."""
    if job.compared is None:
        return None
    with job.base.lent():
        return _losses(job.attachment.attach(job.base, Adapter(), job.plan), job, job.compared, should_stop)


def check(model: Any, job: "Job", before: tuple[list[float], list[float]] | None, should_stop: Stop) -> None:
    """Measure the trained model.

    Args:
        before: what `reference` found.
    Raises:
        PolicyError: the update tells the rows of the round from validation rows better than the site allows.
    """
    if job.compared is None or before is None:
        return
    after = _losses(model, job, job.compared, should_stop)
    members, held_out = ([b - a for b, a in zip(*pair, strict=True)] for pair in zip(before, after, strict=True))
    found = membership(members, held_out)
    if found.high > job.compared.largest:
        raise PolicyError(
            "the update tells which rows it was trained on better than this site allows (max_membership_auc), and does "
            "not leave; ask for privacy.epsilon, fewer local_steps, a lower learning_rate or a lower rank",
            f"AUC {found.auc:.3f}, interval {found.low:.3f} to {found.high:.3f}; {found.members} rows of the round, "
            f"{found.held_out} held out",
            code="tells_members",
        )


def _losses(model: Any, job: "Job", rows: Compared, should_stop: Stop) -> tuple[list[float], list[float]]:
    data, base, plan = job.data, job.base, job.plan
    return (
        losses(model, base, data.train, rows.members, plan, should_stop),
        losses(model, base, data.validation, rows.held_out, plan, should_stop),
    )
