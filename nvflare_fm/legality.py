"""Which choices of a job do not go together, held as data: it refuses a job while it loads, and the docs print it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from .aggregation.asked import named
from .aggregation.merge import MergeRule
from .config import Aggregation, RoundPlan, TrainingSettings
from .errors import ConfigError
from .job.peft import PeftMethod
from .job.tasks import Promises, promises


@dataclass(frozen=True)
class Job:
    """What of a job decides whether its parts go together."""

    plan: RoundPlan  # with the PEFT method's defaults written out
    how: Aggregation
    rule: MergeRule
    method: PeftMethod

    @property
    def task(self) -> Promises:
        return promises(self.plan.task)

    @property
    def step(self) -> str:
        """Asked for by name: where the job leaves it open, nothing clashes."""
        return named(self.how.step or "plain")

    def weighs(self, *names: str) -> bool:
        return any(named(entry) in names for entry in self.how.weigh)


@dataclass(frozen=True)
class Clash:
    """`this` does not go with `that`: where `holds`, the job is refused with `why` and `remedy`."""

    this: str
    that: str
    holds: Callable[[Job], bool]
    why: str
    remedy: str


def _one_rank(job: Job) -> bool:
    return job.method.factored and not (job.rule.mixed_ranks and job.method.side_adapter)


def _shifts_classes(training: TrainingSettings) -> bool:
    return training.restricted_softmax != 1 or bool(training.logit_calibration or training.logit_adjustment)


CLASHES = (
    Clash(
        "a merge rule for one rank, or DoRA",
        "`rank` in `negotiable`",
        lambda job: _one_rank(job) and "rank" in job.plan.negotiable,
        "every site must train at one rank",
        "take rank out of negotiable",
    ),
    Clash(
        "DoRA",
        "`max_rank` other than the plan's rank",
        lambda job: (
            job.method.factored and not job.method.side_adapter and job.how.max_rank not in (0, job.plan.peft["rank"])
        ),
        "more directions than a site trains would have to ride along frozen, and two DoRA adapters do not add",
        "leave max_rank or use_dora off",
    ),
    Clash(
        "`freeze_a`, `alternate`, `share_a`, `stack`",
        "a PEFT method without factors, or DoRA",
        lambda job: (
            not (job.method.factored and job.method.side_adapter)
            and (job.rule.factors != ("AB",) or job.rule.shares != "AB" or job.rule.rest == "all")
        ),
        "the rule is about the factors of plain LoRA",
        "use exact",
    ),
    Clash(
        "a server step other than `plain`",
        "a merge rule that keeps raw factors",
        lambda job: job.step != "plain" and not job.rule.canonical,
        "the step acts on ΔW, and the rule keeps B and A as they are",
        "use plain, or merge = exact",
    ),
    Clash(
        "`normalize_steps`",
        "a merge rule that is not the global adapter plus changes",
        lambda job: job.how.normalize_steps and not job.rule.delta,
        "it scales what the sites changed, and the rule averages what they hold",
        "use exact or stack",
    ),
    Clash(
        "`max_staleness`",
        "a merge rule that is not the global adapter plus changes, or DoRA",
        lambda job: (
            bool(job.how.max_staleness)
            and not (job.rule.delta and (job.method.side_adapter or not job.method.factored))
        ),
        "a late answer counts by what it changed, and the rule averages what the sites hold",
        "use exact or stack",
    ),
    Clash(
        "weight `staleness`",
        "`max_staleness = 0`",
        lambda job: job.weighs("staleness") and not job.how.max_staleness,
        "no update is older than its round",
        "set max_staleness",
    ),
    Clash(
        "`keep_energy` below 1",
        "a merge rule that keeps raw factors",
        lambda job: job.how.keep_energy < 1 and not job.rule.canonical,
        "it counts singular values, and the rule takes none",
        "use exact",
    ),
    Clash(
        "weights `agreement`, `norm`; step `fedexp`",
        "a PEFT method without factors, or `share_a`",
        lambda job: (
            (job.weighs("agreement", "norm") or job.step == "fedexp")
            and not (job.method.factored and job.rule.shares == "AB")
        ),
        "they compare the products the sites send, and there are none",
        "weigh uniform or by examples, step plain",
    ),
    Clash(
        "weight `skew`",
        "a task whose texts do not have exactly one class each",
        lambda job: job.weighs("skew") and not (job.task.exclusive and not job.task.per_token),
        "it needs how each site's rows are spread over the labels, and rows have no one label",
        "weigh uniform or by examples",
    ),
    Clash(
        "`restricted_softmax`, `logit_calibration`, `logit_adjustment`",
        "a task without classes that exclude each other",
        lambda job: not job.task.exclusive and _shifts_classes(job.plan.training),
        "they change how one class is chosen among several, and the task chooses none",
        "leave them out",
    ),
    Clash(
        "`head_lr_ratio`",
        "`optim = sgd`",
        lambda job: bool(job.plan.training.head_lr_ratio) and job.plan.training.optim == "sgd",
        "it is about Adam's second moment, and SGD keeps none",
        "leave it out",
    ),
    Clash(
        "`head_lr_ratio`",
        "a task that writes text",
        lambda job: bool(job.plan.training.head_lr_ratio) and job.task.learns_text,
        "it is about a new head, and the task has none",
        "leave it out",
    ),
    Clash(
        "`dpo_beta`",
        "a task other than `preference`",
        lambda job: job.plan.training.dpo_beta != TrainingSettings().dpo_beta and not job.task.paired,
        "it is about pairs of answers, and the task has none",
        "leave it out",
    ),
    Clash(
        "weight `loss`",
        "`evaluation.before = false`",
        lambda job: job.weighs("loss") and not job.plan.evaluation.before,
        "it needs the loss of the adapter each site received",
        "set evaluation.before",
    ),
)


def check(job: Job) -> None:
    """Refuse combinations of settings that cannot work together.

    Raises:
        ConfigError: two choices of the job do not go together; why, and what to choose instead.
    """
    for clash in CLASHES:
        if clash.holds(job):
            raise ConfigError(
                f"{_chosen(job)}: {clash.this} does not go with {clash.that}: {clash.why}; {clash.remedy}"
            )


def _chosen(job: Job) -> str:
    how = job.how
    parts: Mapping[str, object] = {"merge": how.merge, "weigh": [named(w) for w in how.weigh], "step": job.step}
    return ", ".join(f"{name} = {value}" for name, value in parts.items())
