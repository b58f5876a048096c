"""A site's word on a job: accepted, lowered where its plan says that is negotiable, or refused with the reason.

What the site offers and allows is `site_config`. All that the plan alone tells is decided here, before anything is
loaded; what takes the base model's layers or the site's rows to know is decided by the worker, with the same words.
A reason names a setting and what is allowed, never what the job says: that may come from the site's own files.
"""

from collections.abc import Callable
from dataclasses import dataclass

from ...config import SyntheticSettings, TaskPlan, at_rank
from ...errors import PolicyError
from ...job.cost import AdapterShape, BaseShape, trained_bytes
from ...job.peft import complete
from ...privacy.egress import NO_METRICS, unprotected
from ...transforms import read
from .confine import GIB
from .site_config import ANYONE, FILE_NAME, Limits, Privacy, SiteConfig, Synthetic, Welcome


@dataclass(frozen=True)
class Submitter:
    """Who asks, as NVFlare authenticated them."""

    name: str = ""
    org: str = ""


@dataclass(frozen=True)
class Decision:
    """What the site says to a plan: the plan as it will be carried out, what it lowered, and why it refuses."""

    plan: TaskPlan
    lowered: tuple[str, ...] = ()
    refused: tuple[PolicyError, ...] = ()

    def __str__(self) -> str:
        if self.refused:
            return "refused: " + "; ".join(reason.message for reason in self.refused)
        return "lowered: " + "; ".join(self.lowered) if self.lowered else "accepted"


MEASURING = "evaluation.batch_size"  # smaller batches give the same metrics


@dataclass(frozen=True)
class Bound:
    """What a plan asks in one place, and the site's limit on it."""

    setting: str  # as a job writes it
    limit: str  # the field of `Limits`
    requested: Callable[[TaskPlan, int], int]  # of a plan that this many processes carry out
    trains: bool = True  # it matters in training alone
    negotiable: str = ""  # what a plan calls it where a site may lower it; MEASURING: it always may


def _rows_per_step(plan: TaskPlan, processes: int) -> int:
    return plan.training.batch_size * plan.training.gradient_accumulation_steps * processes


def _of_method(name: str) -> Callable[[TaskPlan, int], int]:
    """A whole number among the PEFT method's settings; 0 where it has none of that name."""

    def requested(plan: TaskPlan, processes: int) -> int:
        count = plan.peft.get(name)
        return count if isinstance(count, int) else 0

    return requested


def _steps(plan: TaskPlan, processes: int) -> int:
    return plan.training.local_steps


BOUNDS = (
    Bound("peft.rank", "max_rank", lambda plan, _: plan.rank, False, "rank"),
    Bound("peft.r", "max_vera_rank", _of_method("r"), False),
    Bound("peft.num_virtual_tokens", "max_virtual_tokens", _of_method("num_virtual_tokens"), False),
    Bound("labels", "max_labels", lambda plan, _: len(plan.labels), False),
    Bound("max_length", "max_length", lambda plan, _: plan.max_length, False),
    Bound(MEASURING, "max_batch_size", lambda plan, _: plan.evaluation.batch_size, False, MEASURING),
    Bound("training.batch_size", "max_batch_size", lambda plan, _: plan.training.batch_size, negotiable="batch_size"),
    Bound("training.batch_size × gradient_accumulation_steps × processes", "max_rows_per_step", _rows_per_step),
    Bound("training.local_steps", "max_steps_per_round", _steps, negotiable="local_steps"),
    Bound("processes", "max_processes", lambda _, processes: processes, False),
)


def decide(
    plan: TaskPlan, site: SiteConfig, who: Submitter, processes: int = 1, trains: bool = True, sends: bool = True
) -> Decision:
    """The site's whole word on a job.

    Args:
        processes: trainer processes that the job asks for here.
        trains: whether the task is to train; else it is to measure.
        sends: whether anything that comes of it leaves; else the site trains for itself, by a plan `at_home`.

    Raises:
        ConfigError: the plan's PEFT settings say nothing.
    """
    decision = fit(plan, site, processes, trains, sends)
    return Decision(decision.plan, decision.lowered, (*_unwelcome(plan, site.welcome, who), *decision.refused))


def fit(plan: TaskPlan, site: SiteConfig, processes: int = 1, trains: bool = True, sends: bool = True) -> Decision:
    """The plan within the site's limits, whoever asks. What fits already stays as it is.

    Raises:
        ConfigError: the plan's PEFT settings say nothing.
    """
    answers = trains  # with what is learned of the rows
    trains = trains and not (plan.votes or plan.sums)  # by training on them
    plan = plan.model_copy(update={"peft": complete(plan.peft)})
    plan, lowered, refused = _within(plan, site.limits, processes, trains)
    plan, more, closed = _synthetic(plan, site.synthetic, answers)
    if site.privacy.floor and trains and (plan.evaluation.before or plan.evaluation.after):
        unmeasured = plan.evaluation.model_copy(update={"before": False, "after": False})
        plan, lowered = plan.model_copy(update={"evaluation": unmeasured}), (*lowered, NO_METRICS)
    return Decision(
        plan,
        (*lowered, *more),
        (
            *refused,
            *closed,
            *_not_offered(plan, site),
            *_too_few_rows(plan, site.privacy, processes, trains),
            *_not_told(plan, site.privacy),
            *(_unprotected(plan, site.privacy, answers) if sends else _not_for_itself(plan, site.limits)),
        ),
    )


def accept(decision: Decision) -> Decision:
    """Give a decision back in which nothing is refused.

    Raises:
        PolicyError: the site refuses; every reason is named at once.
    """
    if len(decision.refused) == 1:
        raise decision.refused[0]
    if decision.refused:
        message = "; ".join(reason.message for reason in decision.refused)
        raise PolicyError(message, "; ".join(r.local for r in decision.refused if r.local), code="refused")
    return decision


def _within(
    plan: TaskPlan, limits: Limits, processes: int, trains: bool
) -> tuple[TaskPlan, tuple[str, ...], tuple[PolicyError, ...]]:
    lowered, refused = [], []
    for bound in BOUNDS:
        most = getattr(limits, bound.limit)
        if bound.requested(plan, processes) <= most or (bound.trains and not trains):
            continue
        if bound.negotiable == MEASURING:
            evaluation = plan.evaluation.model_copy(update={"batch_size": most})
            plan = plan.model_copy(update={"evaluation": evaluation})
        elif bound.negotiable and bound.negotiable in plan.negotiable:
            value = _divisor(plan.training.batch_size, most) if bound.negotiable == "batch_size" else most
            plan = _lowered(plan, bound.negotiable, value)
            lowered.append(f"{bound.negotiable} to {value}")
        else:
            remedy = f", or list {bound.negotiable} as negotiable" if bound.negotiable else ""
            said = f"{bound.setting} is more than the {most} this site allows ({bound.limit}); ask for less{remedy}"
            refused.append(PolicyError(said, code="above_limit"))
    return plan, tuple(lowered), tuple(refused)


def _synthetic(
    plan: TaskPlan, allowed: Synthetic, answers: bool
) -> tuple[TaskPlan, tuple[str, ...], list[PolicyError]]:
    """The plan with as many synthetic rows as the site accepts, and why it does not vote or train."""
    asked = plan.synthetic
    if not answers or not (asked.asked or plan.votes):
        return plan, (), []
    if plan.votes:
        return plan, (), _no_vote(plan, allowed)
    if allowed.accepts:
        if asked.share <= allowed.max_share:
            return plan, (), []
        less = asked.model_copy(update={"share": allowed.max_share})
        return plan.model_copy(update={"synthetic": less}), (f"synthetic.share to {allowed.max_share:g}",), []
    if asked.required:
        said = (
            "this site trains on no synthetic rows (synthetic.accepts), and the plan requires them; set "
            "synthetic.required = false, or leave this site out"
        )
        return plan, (), [PolicyError(said, code="synthetic_off")]
    without = plan.model_copy(update={"synthetic": SyntheticSettings()})
    return without, ("synthetic rows to none: this site accepts none",), []


def _no_vote(plan: TaskPlan, allowed: Synthetic) -> list[PolicyError]:
    if not allowed.votes:
        said = "this site's rows do not vote on synthetic rows (synthetic.votes); leave this site out"
        return [PolicyError(said, code="votes_off")]
    if plan.votes > allowed.max_rows:
        said = (
            f"the candidates are more than the {allowed.max_rows} synthetic rows that this site looks at "
            "(synthetic.max_rows); bring fewer"
        )
        return [PolicyError(said, code="above_limit")]
    return []


def _divisor(value: int, most: int) -> int:
    """The largest divisor of `value` up to `most`, so that no example of a step is lost."""
    return max(d for d in range(1, most + 1) if value % d == 0)


def _lowered(plan: TaskPlan, name: str, value: int) -> TaskPlan:
    if name == "rank":
        return plan.model_copy(update={"peft": at_rank(plan.peft, value)})
    changes = {name: value}
    if name == "batch_size":  # as many examples a step as before, in smaller portions
        changes["gradient_accumulation_steps"] = _rows_per_step(plan, 1) // value
    return plan.model_copy(update={"training": plan.training.model_copy(update=changes)})


def _not_offered(plan: TaskPlan, site: SiteConfig) -> list[PolicyError]:
    reasons = []
    allowed = site.limits.quantizations
    try:
        model = site.model(plan.model)
        allowed = allowed if model.quantizations is None else model.quantizations
        if site.limits.pinned_only and not model.fingerprint:
            said = (
                f"model: what it names is not pinned at this site; ask its admin to add its fingerprint to {FILE_NAME}"
            )
            reasons.append(PolicyError(said, code="not_pinned"))
    except PolicyError as error:
        reasons.append(error)
    if plan.quantization not in allowed:
        said = f"quantization is not among {list(allowed)} at this site; choose one"
        reasons.append(PolicyError(said, code="not_offered"))
    try:
        site.data_set(plan.data)
    except PolicyError as error:
        reasons.append(error)
    return reasons


def _too_few_rows(plan: TaskPlan, privacy: Privacy, processes: int, trains: bool) -> list[PolicyError]:
    """What the plan alone tells of the floors; the worker counts how many of the rows are different."""
    reasons = []
    if trains and 0 < plan.training.local_steps * _rows_per_step(plan, processes) < privacy.min_update_rows:
        reasons.append(few_update_rows(privacy))
    if 0 < plan.evaluation.max_examples < privacy.min_metric_rows:
        said = f"evaluation.max_examples is less than the {privacy.min_metric_rows} this site measures on; raise it"
        reasons.append(PolicyError(said, code="few_rows"))
    return reasons


def check_shapes(
    base: BaseShape, adapter: AdapterShape, plan: TaskPlan, site: SiteConfig, processes: int, trains: bool
) -> None:
    """What the base model's layers tell, before its weights are loaded.

    Raises:
        PolicyError: the adapter trains what it may not, or takes more memory than the site gives.
    """
    limits, rank = site.limits, plan.rank
    check_trained(adapter.whole, adapter.embeddings, limits)
    if adapter.size(plan.padded_to or rank) > limits.max_adapter_mib * 2**20:
        raise PolicyError(
            f"the adapter is larger than the {limits.max_adapter_mib:g} MiB this site allows (max_adapter_mib); lower "
            "peft.rank, or adapt fewer modules",
            code="above_limit",
        )
    needs = base.size(plan) + (trained_bytes(adapter, plan, rank, rank) if trains else 0)
    if needs > limits.memory_gib * GIB / processes:
        raise PolicyError(
            f"the base model and the adapter alone take more than the {limits.memory_gib:g} GiB this site gives "
            "(memory_gib); quantize to fewer bits, lower peft.rank or the number of processes",
            code="above_limit",
        )


def check_trained(whole: tuple[str, ...], embeddings: tuple[str, ...], limits: Limits) -> None:
    """Hold what an adapter would train whole, or of embeddings, against the site's limits.

    Args:
        whole, embeddings: see `AdapterShape`.

    Raises:
        PolicyError: the site does not let a job train them.
    """
    if [name for name in whole if not any(f".{name}".endswith(f".{end}") for end in limits.trainable_modules)]:
        raise PolicyError(
            f"peft.modules_to_save: this site lets a job train whole a new head of its own and of other modules "
            f"{list(limits.trainable_modules) or 'none'} (trainable_modules); leave them out",
            code="not_trainable",
        )
    if embeddings and not limits.train_embeddings:
        raise PolicyError(
            "peft: the adapter would train word embeddings, which tells the words of this site's texts, and the site "
            "does not allow it (train_embeddings); take them out of target_modules and modules_to_save",
            code="embeddings",
        )


def few_update_rows(privacy: Privacy) -> PolicyError:
    """Make the refusal of a round that would use too few rows."""
    return PolicyError(
        f"a round would see fewer different rows than the {privacy.min_update_rows} that this site wants behind an "
        "update; raise local_steps, batch_size or gradient_accumulation_steps",
        code="few_rows",
    )


def few_examples(privacy: Privacy) -> PolicyError:
    """Make the refusal of a data set that is too small."""
    return PolicyError(
        f"this site trains on no fewer than {privacy.min_examples} different examples and the data set has fewer; "
        "choose a larger one, or leave this site out",
        code="few_rows",
    )


def few_metric_rows(privacy: Privacy) -> PolicyError:
    """Make the refusal to measure on too few rows."""
    return PolicyError(
        f"this site tells metrics of no fewer than {privacy.min_metric_rows} different rows and has fewer to measure "
        "on; choose a larger data set, or leave this site out",
        code="few_rows",
    )


def _not_told(plan: TaskPlan, privacy: Privacy) -> list[PolicyError]:
    """What the job's weights need to know of the rows and the site does not tell."""
    floor = privacy.floor is not None
    asked: dict[str, set[str]] = {"counts": {*plan.counts}, "label_statistics": {*plan.label_statistics}}
    asked["label_statistics"] |= {"features"} if plan.sums else set()  # whatever the server says of it
    return [
        PolicyError(
            f"this site does not tell {' and '.join(kept)}, which the job asks for; choose other weights, "
            f"or ask its admin to list it under privacy.{name}",
            code="kept_here",
        )
        for name, told in asked.items()
        if (kept := sorted(told - {*(() if floor else getattr(privacy, name))}))
    ]


def _unprotected(plan: TaskPlan, privacy: Privacy, trains: bool) -> list[PolicyError]:
    """What a plan lacks of the protection that the site demands."""
    if (floor := privacy.floor_of(plan)) is None:
        return []
    if not trains:
        said = "this site has a privacy floor and tells no metrics; leave it out of measurements"
        return [PolicyError(said, code="metrics_withheld")]
    return unprotected(plan, floor, read(plan.uplink, "uplink").encrypts)


def _not_for_itself(plan: TaskPlan, limits: Limits) -> list[PolicyError]:
    """Why the site does not train an adapter for itself."""
    if not limits.personalize:
        said = (
            "this site makes no adapter of its own (limits.personalize); leave personalize out, or this site as it is"
        )
        return [PolicyError(said, code="personalize_off")]
    if not plan.personalize.steps:
        said = "the rounds are over, and the plan asks for no adapter of the site's own; set personalize.steps"
        return [PolicyError(said, code="nothing_to_personalize")]
    return []


def _unwelcome(plan: TaskPlan, welcome: Welcome, who: Submitter) -> list[PolicyError]:
    if welcome.submitters is None and welcome.orgs is None:
        said = f"this site works for nobody yet; ask its admin to name submitters or orgs under welcome in {FILE_NAME}"
        return [PolicyError(said, code="not_welcome")]
    requested = [
        ("the job's submitter", who.name, welcome.submitters),
        ("the submitter's organisation", who.org, welcome.orgs),
        ("the job's template", plan.template, welcome.templates),
        ("the job's task", plan.task, welcome.tasks),
    ]
    return [
        PolicyError(f"{kind} is not welcome at this site; ask its admin, or leave this site out", code="not_welcome")
        for kind, value, listed in requested
        if listed is not None and ANYONE not in listed and value not in listed
    ]
