"""What a plan must say for its merge rule, and which plan each round sends. Checked when a job loads.

Knows neither transformers nor peft: the server asks here before any site is bothered.
"""

from collections.abc import Mapping

from . import legality
from .aggregation import merge, step, weigh
from .aggregation.asked import asked
from .config import Aggregation, RoundPlan, SiteOverrides, TrainingSettings
from .errors import ConfigError
from .site.peft_methods import PeftMethod, check_training, complete, read


def settle(plan: RoundPlan, how: Aggregation, sites: Mapping[str, SiteOverrides] | None = None) -> RoundPlan:
    """The plan as it is sent: the method's defaults written out, and what follows from the merge rule.

    Args:
        sites: what the job asks of single sites differently, as far as the server knows it.

    Raises:
        ConfigError: an unknown name or setting, or choices that do not go together, with the reason.
    """
    rule, method = merge.registry[how.merge], read(plan.peft)
    check_training(method, plan.training)
    for entry in how.weigh:
        asked(weigh.registry, entry)  # unknown names and settings are refused here, before a round is lost
    if how.step is not None:
        asked(step.registry, how.step)
    rest = rule.rest if method.side_adapter else "none"
    plan = plan.model_copy(
        update={
            "peft": complete(plan.peft),
            "training": _with_head(plan, method),
            "rest": rest,
            "shares": rule.shares,
            "label_statistics": ("skew",) if "skew" in map(legality.named, how.weigh) else (),
            "counts": _counts(plan, how),
        }
    )
    legality.check(legality.Job(plan, how, rule, method))
    if method.factored:
        for site, overrides in sorted((sites or {}).items()):
            _check_rank(site, overrides.rank, plan, how)
    return plan


def _counts(plan: RoundPlan, how: Aggregation) -> tuple[str, ...]:
    """What the sites must tell of their rows and steps, so that they can be weighed."""
    needed = {
        "examples": bool({"examples", "skew"} & {*map(legality.named, how.weigh)}),
        "steps": how.normalize_steps and not plan.training.local_steps,  # else the plan says how many
    }
    return tuple(name for name, needs in needed.items() if needs)


def _with_head(plan: RoundPlan, method: PeftMethod) -> TrainingSettings:
    """How far a head moves where the job does not say: a fresh one hears little of most classes in a round. Methods
    without factors want rates of their own, at which eight times would be too far.
    """
    given = plan.training
    if given.head_lr_ratio is not None:
        return given
    ratio = 8.0 if plan.task != "causal_lm" and method.factored and given.optim != "sgd" else 0.0
    return given.model_copy(update={"head_lr_ratio": ratio})


def of_round(plan: RoundPlan, how: Aggregation, number: int) -> RoundPlan:
    """The settled plan for one round: the factors whose turn it is."""
    turns = merge.registry[how.merge].factors
    return plan.model_copy(update={"factors": turns[number % len(turns)]})


def max_rank(plan: RoundPlan, how: Aggregation) -> int:
    """Of the global adapter of a settled plan."""
    return how.max_rank or plan.rank


def _check_rank(site: str, rank: int | None, plan: RoundPlan, how: Aggregation) -> None:
    if rank in (None, plan.peft["rank"]):
        return
    if not merge.registry[how.merge].mixed_ranks:
        raise ConfigError(f"{site} is to train at rank {rank}, and {how.merge} needs one rank everywhere; use exact")
    if plan.peft.get("use_dora"):
        raise ConfigError(f"{site} is to train at rank {rank}, and DoRA needs one rank everywhere; leave it out")
