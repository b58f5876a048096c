"""Which merge rule goes with which PEFT method, and what a plan must say for it. Checked when a job loads.

Knows neither transformers nor peft: the server asks here before any site is bothered.
"""

from collections.abc import Mapping

from .aggregation import merge, weigh
from .config import Aggregation, RoundPlan, SiteOverrides
from .errors import ConfigError
from .site.peft_methods import check_training, complete, read


def settle(plan: RoundPlan, how: Aggregation, sites: Mapping[str, SiteOverrides] | None = None) -> RoundPlan:
    """The plan as it is sent: the method's defaults written out, and `rest` as the merge rule promises it.

    Args:
        sites: what the job asks of single sites differently, as far as the server knows it.

    Raises:
        ConfigError: an unknown name or setting, or a rule that cannot serve what the plan asks, with the reason.
    """
    rule, method = merge.registry[how.merge], read(plan.peft)
    check_training(method, plan.training)
    for name in how.weigh:
        weigh.registry[name]
    plan = plan.model_copy(update={"peft": complete(plan.peft), "rest": rule.rest and method.side_adapter})
    if method.factored:
        for site, overrides in sorted((sites or {}).items()):
            _check_rank(site, overrides.rank, plan, how)
        if "rank" in plan.negotiable and not (rule.mixed_ranks and method.side_adapter):
            raise ConfigError(f"{how.merge} with {plan.peft} needs one rank everywhere; take rank out of negotiable")
        if not method.side_adapter and max_rank(plan, how) != plan.peft["rank"]:
            raise ConfigError(
                f"max_rank {max_rank(plan, how)} needs directions frozen beside the trained ones, which DoRA cannot "
                f"have; use max_rank = {plan.peft['rank']} or leave use_dora off"
            )
    return plan


def max_rank(plan: RoundPlan, how: Aggregation) -> int:
    """Of the global adapter of a settled plan."""
    return how.max_rank or int(plan.peft.get("rank", 0))


def _check_rank(site: str, rank: int | None, plan: RoundPlan, how: Aggregation) -> None:
    if rank in (None, plan.peft["rank"]):
        return
    if not merge.registry[how.merge].mixed_ranks:
        raise ConfigError(f"{site} is to train at rank {rank}, and {how.merge} needs one rank everywhere; use exact")
    if plan.peft.get("use_dora"):
        raise ConfigError(f"{site} is to train at rank {rank}, and DoRA needs one rank everywhere; leave it out")
