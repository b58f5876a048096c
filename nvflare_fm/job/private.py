"""What goes together with differential privacy, as far as a plan alone tells: the server and each site hold to it."""

from collections.abc import Callable
from dataclasses import dataclass

from ..config import TaskPlan, TrainingSettings
from ..errors import ConfigError


@dataclass(frozen=True)
class Unfit:
    """A choice that does not go with `privacy`: where `holds`, the plan is refused with `why` and `remedy`."""

    code: str
    that: str
    holds: Callable[[TaskPlan], bool]
    why: str
    remedy: str


UNFIT = (
    Unfit(
        "private_steps",
        "`local_steps = 0`",
        lambda plan: not plan.training.local_steps,
        "the steps of a round, and so the noise, would follow from a site's number of rows",
        "set local_steps",
    ),
    Unfit(
        "private_checkpointing",
        "`gradient_checkpointing`",
        lambda plan: plan.training.gradient_checkpointing,
        "a layer that runs twice would count a row's gradient twice",
        "leave it out; a smaller batch_size saves memory as well, and does not change the size of a step",
    ),
    Unfit(
        "private_max_grad_norm",
        "`training.max_grad_norm`",
        lambda plan: plan.training.max_grad_norm != TrainingSettings().max_grad_norm,
        "each record's gradient is clipped to privacy.max_grad_norm, and the sum is not clipped again",
        "leave it out, and set privacy.max_grad_norm",
    ),
    Unfit(
        "private_classes",
        "`restricted_softmax`, `logit_calibration`, `logit_adjustment`",
        lambda plan: (
            plan.training.restricted_softmax != 1
            or bool(plan.training.logit_calibration or plan.training.logit_adjustment)
        ),
        "they use how often each class occurs at a site, and no noise covers that",
        "leave them out",
    ),
    Unfit(
        "private_head_start",
        "`head_start = features`",
        lambda plan: plan.head_start == "features",
        "no noise covers the sums that a site would send",
        "leave head_start out",
    ),
    Unfit(
        "private_counts",
        "a rule that needs counts or label statistics of a site",
        lambda plan: bool(plan.counts or plan.label_statistics),
        "no noise covers what a site tells of its rows",
        "leave weigh out, which is uniform",
    ),
    Unfit(
        "private_own_half",
        "a merge rule that shares one factor",
        lambda plan: plan.shares != "AB",
        "the factor that stays at a site would hold rounds whose updates never left, and which nobody has paid for",
        "leave merge out",
    ),
    Unfit(
        "private_synthetic",
        "`synthetic`",
        lambda plan: plan.synthetic.asked,
        "which synthetic rows a site adds follows from how many rows it has of each class, and no noise covers that",
        "leave synthetic out",
    ),
)


def check(plan: TaskPlan) -> None:
    """Refuse a plan with privacy that asks for what would undo it.

    Raises:
        ConfigError: why, and what to choose instead.
    """
    for unfit in UNFIT if plan.privacy.asked else ():
        if unfit.holds(plan):
            raise ConfigError(f"privacy does not go with {unfit.that}: {unfit.why}; {unfit.remedy}", code=unfit.code)


def check_delta(plan: TaskPlan, records: int) -> None:
    """Refuse a δ at which one of the records could be published as it is.

    Raises:
        ConfigError: δ is one in the number of records, or more.
    """
    if plan.privacy.delta * records >= 1:
        raise ConfigError(
            "privacy.delta must be less than one in the number of the site's records, or it would allow one of them to "
            "be published; lower it",
            code="delta_too_large",
        )


def rows_per_step(plan: TaskPlan, processes: int = 1) -> int:
    """How many records a step is to see, where a site has enough."""
    return plan.training.batch_size * plan.training.gradient_accumulation_steps * processes


def sample_rate(plan: TaskPlan, records: int, processes: int = 1) -> float:
    """The probability with which a step sees a record."""
    return min(1.0, rows_per_step(plan, processes) / records)
