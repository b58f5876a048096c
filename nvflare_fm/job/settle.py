"""What follows from a job's choices, decided once, when the job loads: each later stage gets the `SettledPlan`.

Knows neither transformers nor peft, and nothing of a site: the server decides here before it asks any site.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from .. import transforms
from ..aggregation import guard, merge, step
from ..aggregation.admit import Terms
from ..aggregation.asked import Needs, named
from ..aggregation.merge import MergeRule
from ..aggregation.needed import needed
from ..config import Aggregation, RoundPlan, Rule, SiteOverrides, TaskPlan, TrainingSettings, at_rank
from ..errors import ConfigError
from . import legality
from .feasible import check_plan
from .peft import PeftMethod, check_training, complete, read
from .tasks import promises

_FEW_CLASSES = 3
CHECKED = ("rank", "lora_alpha", "local_steps")  # of what a job asks of one site: its updates are held to it


@dataclass(frozen=True)
class SettledPlan:
    """What a job asks, and all that follows from it. Only `settle` makes one.

    Args:
        plan: as the first round sends it, with the PEFT method's defaults, the head's learning rate and what follows
            from the merge rule and the weights.
        aggregation: as the job asks for it, with the server step.
        sites: what single sites do differently, as far as the server knows it.
        method: the PEFT method.
        rule: the merge rule.
        global_rank: the largest that the global adapter, and so any site's, can have; 0: there are no factors.
    """

    plan: TaskPlan
    aggregation: Aggregation
    sites: Mapping[str, SiteOverrides]
    method: PeftMethod
    rule: MergeRule
    global_rank: int

    @property
    def encrypts(self) -> bool:
        """Whether the server adds what sites send without reading it."""
        return transforms.read(self.plan.uplink, "uplink").encrypts

    def of_round(self, number: int) -> TaskPlan:
        """Make the plan that round `number` sends, with the factors that it trains."""
        turns = self.rule.factors
        return self.plan.model_copy(update={"factors": turns[number % len(turns)]})

    @property
    def summing(self) -> TaskPlan:
        """The plan by which sites tell of their features, before the first round. Those that do not tell train all the
        same.
        """
        return self.plan.model_copy(update={"sums": True, "label_statistics": ("features",)})

    def merged_rank(self, ranks: Iterable[int]) -> int:
        """Compute the global adapter's rank after sites have trained at `ranks`.

        Rules with a canonical result fill it up to the global rank; others keep the largest of `ranks`.
        """
        return self.global_rank if self.rule.canonical else max(ranks)

    def terms(self, site: str) -> Terms:
        """Derive what `site` may send: what the job asks of it, and less where the plan lets it lower a setting.

        A site that the job does not list may send any rank up to the global one, at the scale that follows from it.
        """
        listed = self.sites.get(site)
        mine = listed.applied(self.plan) if listed else self.plan
        steps, known = mine.training.local_steps, listed and listed.local_steps
        held = steps and (known or self.aggregation.normalize_steps)
        return Terms(
            task=self.plan.task,
            peft=str(self.plan.peft["method"]),
            base=self.plan.fingerprint,
            pairs=self.method.factored and self.plan.shares == "AB",
            ranks=self._ranks(mine, bool(listed)) if self.method.factored else range(0),
            scale=lambda rank: read(at_rank(mine.peft, rank)).scale,
            padded_to=self.plan.padded_to,
            steps=_up_to(steps, "local_steps" in self.plan.negotiable) if held else None,
        )

    def _ranks(self, mine: RoundPlan, listed: bool) -> range:
        if listed or _one_rank(self.rule, self.method):
            return _up_to(mine.rank, "rank" in mine.negotiable)
        return _up_to(self.global_rank, lowered=True)


def settle(plan: RoundPlan, aggregation: Aggregation, sites: Mapping[str, SiteOverrides] | None = None) -> SettledPlan:
    """Decide all that follows from a job's choices.

    Args:
        plan: as the job has it.
        aggregation: how adapters become one.
        sites: what single sites do differently, as far as the server knows it.

    Raises:
        ConfigError: an unknown name or setting, or choices that do not go together, with the reason.
    """
    sites = dict(sites or {})
    check_plan(plan, sites)
    rule, method = merge.choose(aggregation.merge), read(plan.peft)
    check_training(method, plan.training)
    encrypts = transforms.read(plan.uplink, "uplink").encrypts
    if aggregation.guard is None:
        unseen = encrypts or aggregation.client_privacy.asked
        guards = guard.usual(unseen, _alike(plan, aggregation, rule, method, sites))
        aggregation = aggregation.model_copy(update={"guard": guards})
    needs = needed(aggregation)  # unknown names and settings are refused here, before a round is lost
    transforms.read(plan.downlink, "downlink")
    aggregation = aggregation.model_copy(update={"step": _step(plan, aggregation, rule, method)})
    rule = rule.encrypted() if encrypts and rule.linear_sum else rule
    settled = TaskPlan.read(
        {
            **dict(plan),
            "peft": complete(plan.peft),
            "training": _with_head(plan, method),
            "head_start": _start_of_head(plan, aggregation, encrypts),
            "rest": rule.rest if method.side_adapter else "none",
            "factors": rule.factors[0],
            "shares": rule.shares,
            "label_statistics": needs.labels,
            "counts": _counts(plan, aggregation, needs),
        },
        "plan",
    )
    legality.check(legality.Job(settled, aggregation, rule, method, needs, encrypts))
    if method.factored and _one_rank(rule, method):
        _check_one_rank(settled.rank, sites, "DoRA" if rule.mixed_ranks else named(aggregation.merge))
    widest = _global_rank(settled, aggregation, sites) if method.factored else 0
    settled = settled.model_copy(update={"padded_to": widest if encrypts else 0})
    return SettledPlan(settled, aggregation, sites, method, rule, widest)


def _check_one_rank(rank: int, sites: Mapping[str, SiteOverrides], needing: str) -> None:
    for site, overrides in sorted(sites.items()):
        if overrides.rank not in (None, rank):
            raise ConfigError(
                f"{site} is to train at rank {overrides.rank}, and {needing} needs one rank everywhere; "
                + ("leave use_dora out" if needing == "DoRA" else "use exact"),
                code="one_rank",
            )


def _alike(
    plan: RoundPlan,
    aggregation: Aggregation,
    rule: MergeRule,
    method: PeftMethod,
    sites: Mapping[str, SiteOverrides],
) -> bool:
    """Whether honest sites' changes differ by their rows and ranks alone, and the rule adds them up. A site that takes
    more steps than others, adds more noise, or started from an older adapter may lie far off and yet be honest.
    """
    sums = rule.sums or not method.factored
    steps = plan.training.local_steps and not any(asked.local_steps for asked in sites.values())
    vary = "local_steps" in plan.negotiable or aggregation.normalize_steps or aggregation.max_staleness
    return bool(sums and steps and not vary and not plan.privacy.asked)


def _step(plan: RoundPlan, aggregation: Aggregation, rule: MergeRule, method: PeftMethod) -> Rule:
    """The server's step: the job's own, or the one that is usual for its task and rule."""
    return aggregation.step or step.usual(promises(plan.task).learns_text, rule if method.factored else None)


def _global_rank(plan: RoundPlan, aggregation: Aggregation, sites: Mapping[str, SiteOverrides]) -> int:
    """The job's `max_rank`, or the largest rank that it asks of any site: what a site trains is never cut unasked.

    Raises:
        ConfigError: a site would train at more than `max_rank`.
    """
    ranks = {"peft": plan.rank, **{site: asked.rank for site, asked in sorted(sites.items()) if asked.rank}}
    widest = max(ranks, key=lambda where: ranks[where])
    if aggregation.max_rank and ranks[widest] > aggregation.max_rank:
        raise ConfigError(
            f"{widest}: rank {ranks[widest]} is above max_rank {aggregation.max_rank}, so the global adapter could not "
            "hold what is trained; raise max_rank, lower the rank, or leave max_rank out",
            code="rank_above_global",
        )
    return aggregation.max_rank or ranks[widest]


def _counts(plan: RoundPlan, aggregation: Aggregation, needs: Needs) -> tuple[str, ...]:
    """What the sites must tell of their rows and steps, so that they can be weighed."""
    steps = aggregation.normalize_steps and not plan.training.local_steps  # else the plan says how many
    return (*needs.counts, *(["steps"] if steps else []))


def _with_head(plan: RoundPlan, method: PeftMethod) -> TrainingSettings:
    """How far a head moves where the job does not say: a fresh one hears little of most classes in a round, but where
    texts have one of two or three, each batch holds all. Methods without factors want rates of their own, at which
    eight times would be too far; a head alone has no other rate. Under privacy it takes few steps of many rows, and so
    longer ones.
    """
    given = plan.training
    if given.head_lr_ratio is not None:
        return given
    task = promises(plan.task)
    few = method.adapts and task.one_label and len(plan.labels) <= _FEW_CLASSES
    apart = task.classes and not few and given.optim != "sgd" and (method.factored or not method.adapts)
    ratio = (48.0 if plan.privacy.asked and not method.adapts else 8.0) if apart else 0.0
    return given.model_copy(update={"head_lr_ratio": ratio})


def _start_of_head(plan: RoundPlan, aggregation: Aggregation, encrypts: bool) -> str:
    """Where a new head starts: the job's own choice, or from features where it may; the sites decide what they tell."""
    kept = plan.privacy.asked or aggregation.client_privacy.asked or encrypts
    return plan.head_start or ("features" if promises(plan.task).one_label and not kept else "random")


def _one_rank(rule: MergeRule, method: PeftMethod) -> bool:
    return not (rule.mixed_ranks and method.side_adapter)


def _up_to(most: int, lowered: bool) -> range:
    return range(1 if lowered else most, most + 1)
