"""Which choices of a job do not go together, held as data: it refuses a job while it loads, and the docs print it.

Rules state promises and needs; no rule is known here by its name.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

from .. import transforms
from ..aggregation.asked import Needs, named
from ..aggregation.merge import MergeRule
from ..config import Aggregation, TaskPlan, TrainingSettings
from ..errors import ConfigError
from . import private
from .peft import PeftMethod
from .synthetic import takes
from .tasks import Promises, promises

_MERGE = f"leave merge out, which is {named(Aggregation().merge)}"  # remedy: it promises all there is


@dataclass(frozen=True)
class Job:
    """What of a job decides whether its parts go together."""

    plan: TaskPlan  # with the PEFT method's defaults written out
    aggregation: Aggregation
    rule: MergeRule
    method: PeftMethod
    needs: Needs  # of the rules it names: where it leaves the server step open, nothing clashes
    encrypts: bool = False  # whether the server adds what it cannot read

    @property
    def plain_lora(self) -> bool:
        """Whether products B @ A are trained that can be added up."""
        return self.method.factored and self.method.side_adapter

    @property
    def task(self) -> Promises:
        return promises(self.plan.task)


@dataclass(frozen=True)
class Clash:
    """`this` does not go with `that`: where `holds`, the job is refused with `why` and `remedy`."""

    code: str
    this: str
    that: str
    holds: Callable[[Job], bool]
    why: str
    remedy: str


def _shifts_classes(training: TrainingSettings) -> bool:
    return training.restricted_softmax != 1 or bool(training.logit_calibration or training.logit_adjustment)


def _unfit(each: private.Unfit, job: Job) -> bool:
    return job.plan.privacy.asked and each.holds(job.plan)


def _noised(job: Job) -> bool:
    return job.aggregation.client_privacy.asked


def _starts(job: Job) -> bool:
    return job.plan.head_start == "features"


def _reads(needs: Needs) -> bool:
    return replace(needs, canonical=False) != Needs()


CLASHES = (
    Clash(
        "rank_is_fixed",
        "a merge rule for one rank, or DoRA",
        "`rank` in `negotiable`",
        lambda job: (
            "rank" in job.plan.negotiable
            and job.method.factored
            and not (job.rule.mixed_ranks and job.method.side_adapter)
        ),
        "every site must train at one rank",
        "take rank out of negotiable",
    ),
    Clash(
        "dora_max_rank",
        "DoRA",
        "`max_rank` other than the plan's rank",
        lambda job: (
            job.method.factored
            and not job.method.side_adapter
            and job.aggregation.max_rank not in (0, job.plan.peft["rank"])
        ),
        "a site would hold more directions than it trains frozen beside them, and two DoRA adapters do not add",
        "leave max_rank or use_dora out",
    ),
    Clash(
        "needs_plain_lora",
        "a merge rule that trains or shares one factor, or has sites train fresh pairs",
        "a PEFT method without factors, or DoRA",
        lambda job: (
            not job.plain_lora and (job.rule.factors != ("AB",) or job.rule.shares != "AB" or job.rule.rest == "all")
        ),
        "the rule is about the factors of plain LoRA",
        _MERGE,
    ),
    Clash(
        "step_needs_canonical",
        "a server step that changes the mean",
        "a merge rule that keeps raw factors",
        lambda job: job.needs.canonical and not job.rule.canonical,
        "the step acts on ΔW, and the rule keeps B and A as they are",
        f"leave step out, or {_MERGE}",
    ),
    Clash(
        "steps_need_delta",
        "`normalize_steps`",
        "a merge rule that is not the global adapter plus changes",
        lambda job: job.aggregation.normalize_steps and not job.rule.delta,
        "it scales what the sites changed, and the rule averages what they hold",
        _MERGE,
    ),
    Clash(
        "late_needs_delta",
        "`max_staleness`",
        "a merge rule that is not the global adapter plus changes, or DoRA",
        lambda job: (
            bool(job.aggregation.max_staleness)
            and not (job.rule.delta and (job.method.side_adapter or not job.method.factored))
        ),
        "a late answer counts by what it changed, and the rule averages what the sites hold",
        _MERGE,
    ),
    Clash(
        "nothing_late",
        "a rule that needs to know how late an update is",
        "`max_staleness = 0`",
        lambda job: job.needs.lateness and not job.aggregation.max_staleness,
        "no update is older than its round",
        "set max_staleness",
    ),
    Clash(
        "energy_needs_canonical",
        "`keep_energy` below 1",
        "a merge rule that keeps raw factors",
        lambda job: job.aggregation.keep_energy < 1 and not job.rule.canonical,
        "it counts singular values, and the rule takes none",
        _MERGE,
    ),
    Clash(
        "no_products",
        "a rule that needs the products ΔW",
        "a PEFT method without factors, or a merge rule that shares one factor",
        lambda job: job.needs.products and not (job.method.factored and job.rule.shares == "AB"),
        "it compares the products the sites send, and there are none",
        "leave weigh and step out",
    ),
    Clash(
        "guard_needs_sum",
        "a guard that weighs sites by where their changes lie",
        "a merge rule that is no weighted sum of what sites send",
        lambda job: job.needs.sums and job.method.factored and job.rule.shares == "AB" and not job.rule.sums,
        "it compares products ΔW, and there a site can spoil the result by factors whose product looks sound",
        f"{_MERGE}, or take a guard that leaves sites out by the length of their factors",
    ),
    Clash(
        "no_label_per_row",
        "a rule that needs label statistics",
        "a task whose texts do not have exactly one class each",
        lambda job: bool(job.needs.labels) and not (job.task.exclusive and not job.task.per_token),
        "it needs how each site's rows are spread over the labels, and rows have no one label",
        "leave weigh out, or weigh by counts",
    ),
    Clash(
        "no_classes",
        "`restricted_softmax`, `logit_calibration`, `logit_adjustment`",
        "a task without classes that exclude each other",
        lambda job: not job.task.exclusive and _shifts_classes(job.plan.training),
        "they change how one class is chosen among several, and the task chooses none",
        "leave them out",
    ),
    Clash(
        "head_needs_adam",
        "`head_lr_ratio`",
        "`optim = sgd`",
        lambda job: bool(job.plan.training.head_lr_ratio) and job.plan.training.optim == "sgd",
        "it is about Adam's second moment, and SGD keeps none",
        "leave it out",
    ),
    Clash(
        "no_head",
        "`head_lr_ratio`",
        "a task that writes text",
        lambda job: bool(job.plan.training.head_lr_ratio) and job.task.learns_text,
        "it is about a new head, and the task has none",
        "leave it out",
    ),
    Clash(
        "nothing_trained",
        "a PEFT method that trains the head alone",
        "a task that writes text",
        lambda job: not job.method.adapts and job.task.learns_text and not job.method.trained_whole,
        "it is about a new head, and the task has none",
        "use lora, or name modules_to_save",
    ),
    Clash(
        "no_pairs",
        "`dpo_beta`",
        "a task other than `preference`",
        lambda job: job.plan.training.dpo_beta != TrainingSettings().dpo_beta and not job.task.paired,
        "it is about pairs of answers, and the task has none",
        "leave it out",
    ),
    Clash(
        "synthetic_task",
        "`synthetic`",
        "a task other than `causal_lm` and `sequence_classification`",
        lambda job: job.plan.synthetic.asked and not takes(job.plan.task),
        "a synthetic row is a text, or a text with one label",
        "leave it out",
    ),
    Clash(
        "needs_loss_before",
        "a rule that needs the loss of the received adapter",
        "`evaluation.before = false`",
        lambda job: job.needs.loss and not job.plan.evaluation.before,
        "no site measures it",
        "set evaluation.before",
    ),
    Clash(
        "private_loss",
        "a rule that needs the loss of the received adapter",
        "`privacy`",
        lambda job: job.needs.loss and job.plan.privacy.asked,
        "no noise covers the loss on a site's own rows",
        "leave weigh out, which is uniform",
    ),
    Clash(
        "head_start_task",
        "`head_start = features`",
        "a task other than `sequence_classification`",
        lambda job: _starts(job) and not job.task.one_label,
        "it is about texts that have one label each",
        "leave it out",
    ),
    *(Clash(each.code, "`privacy`", each.that, partial(_unfit, each), each.why, each.remedy) for each in private.UNFIT),
    Clash(
        "no_linear_sum",
        "an encrypted uplink",
        "a merge rule that does more than add B beside a frozen A",
        lambda job: job.encrypts and job.method.factored and not job.rule.linear_sum,
        "the server adds what it cannot read, and the rule needs to read it",
        "choose a merge rule with a linear sum, of those in docs/reference/rules.md",
    ),
    Clash(
        "nothing_readable",
        "an encrypted uplink",
        "a guard, weight or server step that reads what sites send",
        lambda job: job.encrypts and bool(job.needs.reads),
        "the server cannot read it",
        "leave guard out, and weigh equally or by what sites report",
    ),
    Clash(
        "encrypted_changes",
        "an encrypted uplink",
        "`normalize_steps`, `max_staleness`",
        lambda job: job.encrypts and bool(job.aggregation.normalize_steps or job.aggregation.max_staleness),
        "the server would have to tell what a site changed from what it holds, and can read neither",
        "leave them out",
    ),
    Clash(
        "encrypted_downlink",
        "an encrypted uplink",
        "a downlink",
        lambda job: job.encrypts and bool(job.plan.downlink),
        "the server sends the sum back as it is, encrypted",
        "leave downlink out",
    ),
    Clash(
        "encrypted_head_start",
        "an encrypted uplink",
        "`head_start = features`",
        lambda job: job.encrypts and _starts(job),
        "the server fits the head to sums that it must read",
        "leave head_start out",
    ),
    Clash(
        "uplink_only",
        "an encrypted downlink",
        "any job",
        lambda job: transforms.read(job.plan.downlink, "downlink").encrypts,
        "the server has no key to encrypt with, and sends back what it added",
        "encrypt the uplink",
    ),
    Clash(
        "client_not_linear",
        "`client_privacy`",
        "a merge rule that does more than add B beside a frozen A",
        lambda job: _noised(job) and job.method.factored and not job.rule.linear_sum,
        "noise on one factor is no noise of known size on the product, unless the other one stays as it is",
        "choose a merge rule with a linear sum, of those in docs/reference/rules.md",
    ),
    Clash(
        "client_guard",
        "`client_privacy`",
        "a guard",
        lambda job: _noised(job) and bool(job.aggregation.guard),
        "what it makes of one site follows from what others sent, so that site could move the mean by more than it "
        "may; each change is clipped to client_privacy.max_norm all the same",
        "leave guard out",
    ),
    Clash(
        "client_weights",
        "`client_privacy`",
        "a weight or server step that reads what sites send or report",
        lambda job: _noised(job) and _reads(job.needs),
        "no noise covers what it reads, and one site's weight would follow from another's data",
        "leave weigh out, which is uniform, and step",
    ),
    Clash(
        "client_changes",
        "`client_privacy`",
        "`normalize_steps`, `max_staleness`",
        lambda job: _noised(job) and bool(job.aggregation.normalize_steps or job.aggregation.max_staleness),
        "each change counts the same, once, in its own round",
        "leave them out",
    ),
    Clash(
        "client_head_start",
        "`client_privacy`",
        "`head_start = features`",
        lambda job: _noised(job) and _starts(job),
        "no noise covers the sums that the head follows from",
        "leave head_start out",
    ),
    Clash(
        "client_encrypted",
        "`client_privacy`",
        "an encrypted uplink",
        lambda job: _noised(job) and job.encrypts,
        "the server cannot clip what it cannot read",
        "leave uplink out, or protect records at the sites (privacy.epsilon)",
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
                f"{_chosen(job.aggregation)}: {clash.this} does not go with {clash.that}: {clash.why}; {clash.remedy}",
                code=clash.code,
            )


def _chosen(aggregation: Aggregation) -> str:
    parts: Mapping[str, object] = {
        "merge": named(aggregation.merge),
        "weigh": [named(entry) for entry in aggregation.weigh],
        "step": named(aggregation.step) if aggregation.step is not None else "by task",
    }
    return ", ".join(f"{name} = {value}" for name, value in parts.items())
