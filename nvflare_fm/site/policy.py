"""A site's word on a job: accepted, lowered where its plan says that is negotiable, or refused with the reason.

What the site offers and allows is `site_config`.
"""

from collections.abc import Collection
from dataclasses import dataclass

from ..config import RoundPlan, at_rank
from ..errors import PolicyError
from .peft_methods import complete
from .site_config import FILE_NAME, Limits, Privacy, SiteConfig, Welcome


@dataclass(frozen=True)
class Submitter:
    """Who asks, as NVFlare authenticated them."""

    name: str = ""
    org: str = ""


@dataclass(frozen=True)
class Decision:
    """What the site says to a plan: the plan as it will be carried out, what it lowered, and why it refuses."""

    plan: RoundPlan
    lowered: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()

    def __str__(self) -> str:
        if self.refused:
            return "refused: " + "; ".join(self.refused)
        return "lowered: " + "; ".join(self.lowered) if self.lowered else "accepted"


def decide(plan: RoundPlan, site: SiteConfig, who: Submitter) -> Decision:
    """The site's whole word on a job.

    Raises:
        ConfigError: the plan's PEFT settings say nothing.
    """
    decision = fit(plan, site)
    return Decision(decision.plan, decision.lowered, (*_unwelcome(plan, site.welcome, who), *decision.refused))


def fit(plan: RoundPlan, site: SiteConfig) -> Decision:
    """The plan within the site's limits, whoever asks.

    Raises:
        ConfigError: the plan's PEFT settings say nothing.
    """
    plan = plan.model_copy(update={"peft": complete(plan.peft)})
    plan, lowered, refused = _within(plan, site.limits)
    return Decision(plan, lowered, (*refused, *_not_offered(plan, site), *_unprotected(site.privacy)))


def accept(decision: Decision) -> Decision:
    """
    Raises:
        PolicyError: the site refuses; every reason is named at once.
    """
    if decision.refused:
        raise PolicyError("; ".join(decision.refused))
    return decision


def _within(plan: RoundPlan, limits: Limits) -> tuple[RoundPlan, tuple[str, ...], tuple[str, ...]]:
    training = plan.training
    asked = {
        "rank": (int(plan.peft.get("rank", 0)), limits.max_rank),
        "batch_size": (training.batch_size, limits.max_batch_size),
        "local_steps": (training.local_steps, limits.max_steps_per_round),
    }
    over = {name: pair for name, pair in asked.items() if pair[0] > pair[1]}
    refused = tuple(
        f"{name} {value} is more than the {most} this site allows; ask for less, or list {name} as negotiable"
        for name, (value, most) in over.items()
        if name not in plan.negotiable
    )
    given = {name: _less(name, *over[name]) for name in over if name in plan.negotiable}
    lowered = tuple(f"{name} {asked[name][0]} → {value}" for name, value in given.items())
    changes: dict[str, int] = {name: value for name, value in given.items() if name != "rank"}
    if "batch_size" in given:  # as many examples a step as before, in smaller portions
        changes["gradient_accumulation_steps"] = (
            training.gradient_accumulation_steps * training.batch_size // given["batch_size"]
        )
    peft = at_rank(plan.peft, given["rank"]) if "rank" in given else plan.peft
    return plan.model_copy(update={"peft": peft, "training": training.model_copy(update=changes)}), lowered, refused


def _less(name: str, value: int, most: int) -> int:
    return max(d for d in range(1, most + 1) if value % d == 0) if name == "batch_size" else most


def _not_offered(plan: RoundPlan, site: SiteConfig) -> list[str]:
    reasons = []
    allowed = site.limits.quantizations
    try:
        model = site.model(plan.model)
        allowed = allowed if model.quantizations is None else model.quantizations
        if site.limits.pinned_only and not model.fingerprint:
            reasons.append(
                f"model {plan.model!r} is not pinned at this site; ask its admin to add its fingerprint to {FILE_NAME}"
            )
    except PolicyError as error:
        reasons.append(error.message)
    if plan.quantization not in allowed:
        reasons.append(f"quantization {plan.quantization!r} is not among {list(allowed)} at this site; choose one")
    try:
        site.data_set(plan.data)
    except PolicyError as error:
        reasons.append(error.message)
    return reasons


def _unprotected(privacy: Privacy) -> list[str]:
    """No plan can ask for a protection yet, so none that a site requires is there."""
    return [
        f"this site lets no update leave without {protection}, which no job can give yet; leave this site out"
        for protection in privacy.required_protection
    ]


def _unwelcome(plan: RoundPlan, welcome: Welcome, who: Submitter) -> list[str]:
    asked = [
        ("submitter", who.name, welcome.submitters),
        ("organisation", who.org, welcome.orgs),
        ("job template", plan.template, welcome.templates),
        ("task", plan.task, welcome.tasks),
    ]
    return [
        f"{kind} {value or 'unknown'!r} is not welcome at this site; ask its admin, or leave this site out"
        for kind, value, listed in asked
        if listed is not None and value not in listed
    ]


def check_processes(processes: int, site: SiteConfig) -> None:
    """
    Raises:
        PolicyError: a job wants more trainer processes than the site gives.
    """
    if processes > site.limits.max_processes:
        raise PolicyError(
            f"processes {processes} is more than the {site.limits.max_processes} this site allows; ask for fewer"
        )


def check_examples(examples: int, site: SiteConfig) -> None:
    """
    Raises:
        PolicyError: fewer than the site's floor; how many it has is not told.
    """
    if examples < site.privacy.min_examples:
        raise PolicyError(
            f"this site trains on no fewer than {site.privacy.min_examples} examples and the data set has fewer; "
            "choose a larger one, or leave this site out"
        )


def check_label_statistics(asked: Collection[str], site: SiteConfig) -> None:
    """For whatever would tell the server how often labels occur at a site.

    Raises:
        PolicyError: the site does not let all of `asked` leave.
    """
    if kept := sorted({*asked} - {*site.privacy.label_statistics}):
        raise PolicyError(f"this site tells no {' and no '.join(kept)} of its labels; ask for a weight without it")
