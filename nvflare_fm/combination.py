"""What a plan must say for its merge rule, and which plan each round sends. Checked when a job loads.

Knows neither transformers nor peft: the server asks here before any site is bothered.
"""

from collections.abc import Mapping

from . import legality, transforms
from .aggregation import merge
from .aggregation.admit import Terms
from .aggregation.asked import Needs, named
from .aggregation.needed import needed
from .config import Aggregation, RoundPlan, SiteOverrides, TrainingSettings, at_rank
from .errors import ConfigError
from .feasible import check_plan
from .site.peft_methods import PeftMethod, check_training, complete, read

CHECKED = ("rank", "lora_alpha", "local_steps")  # of what a job asks of one site: its updates are held to it


def settle(plan: RoundPlan, how: Aggregation, sites: Mapping[str, SiteOverrides] | None = None) -> RoundPlan:
    """The plan as it is sent: the method's defaults written out, and what follows from the merge rule.

    Args:
        sites: what the job asks of single sites differently, as far as the server knows it.

    Raises:
        ConfigError: an unknown name or setting, or choices that do not go together, with the reason.
    """
    check_plan(plan, sites)
    rule, method = merge.choose(how.merge), read(plan.peft)
    check_training(method, plan.training)
    needs = needed(how)  # unknown names and settings are refused here, before a round is lost
    transforms.read(plan.uplink, "uplink")
    transforms.read(plan.downlink, "downlink")
    rest = rule.rest if method.side_adapter else "none"
    plan = plan.model_copy(
        update={
            "peft": complete(plan.peft),
            "training": _with_head(plan, method),
            "rest": rest,
            "shares": rule.shares,
            "label_statistics": needs.labels,
            "counts": _counts(plan, how, needs),
        }
    )
    legality.check(legality.Job(plan, how, rule, method, needs))
    if method.factored:
        for site, overrides in sorted((sites or {}).items()):
            _check_rank(site, overrides.rank, plan, how)
    return plan


def _counts(plan: RoundPlan, how: Aggregation, needs: Needs) -> tuple[str, ...]:
    """What the sites must tell of their rows and steps, so that they can be weighed."""
    steps = how.normalize_steps and not plan.training.local_steps  # else the plan says how many
    return (*needs.counts, *(["steps"] if steps else []))


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
    turns = merge.choose(how.merge).factors
    return plan.model_copy(update={"factors": turns[number % len(turns)]})


def max_rank(plan: RoundPlan, how: Aggregation) -> int:
    """Of the global adapter of a settled plan."""
    return how.max_rank or plan.rank


def terms(plan: RoundPlan, how: Aggregation, site: str, sites: Mapping[str, SiteOverrides]) -> Terms:
    """What `site` may send in answer to a settled plan: what it was asked for, less what it may lower.

    Args:
        sites: what the job asks of single sites differently, as far as the server knows it. Of a site that is not among
            them the server takes any rank up to the global adapter's or the plan's, and at each the scale that follows.
    """
    method, listed = read(plan.peft), sites.get(site)
    mine = listed.applied(plan) if listed else plan
    steps, known = mine.training.local_steps, listed and listed.local_steps
    return Terms(
        task=plan.task,
        peft=str(plan.peft["method"]),
        base=plan.fingerprint,
        pairs=method.factored and plan.shares == "AB",
        ranks=_ranks(mine, how, bool(listed)) if method.factored else range(0),
        scale=lambda rank: read(at_rank(mine.peft, rank)).scale,
        steps=_up_to(steps, "local_steps" in plan.negotiable) if steps and (known or how.normalize_steps) else None,
    )


def _ranks(mine: RoundPlan, how: Aggregation, listed: bool) -> range:
    rank = mine.rank
    if listed or not merge.choose(how.merge).mixed_ranks or mine.peft.get("use_dora"):
        return _up_to(rank, "rank" in mine.negotiable)
    return _up_to(max(rank, how.max_rank), lowered=True)


def _up_to(most: int, lowered: bool) -> range:
    return range(1 if lowered else most, most + 1)


def _check_rank(site: str, rank: int | None, plan: RoundPlan, how: Aggregation) -> None:
    if rank in (None, plan.peft["rank"]):
        return
    if not merge.choose(how.merge).mixed_ranks:
        raise ConfigError(
            f"{site} is to train at rank {rank}, and {named(how.merge)} needs one rank everywhere; leave merge out",
            code="one_rank",
        )
    if plan.peft.get("use_dora"):
        raise ConfigError(f"{site} is to train at rank {rank}, and DoRA needs one rank everywhere; leave it out")
