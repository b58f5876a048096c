"""What no site could carry out or the server never decide by: refused while a job is made and when the server loads it.

Knows neither transformers nor peft.
"""

from collections import Counter
from collections.abc import Collection, Mapping

from ..config import RoundPlan, SiteOverrides
from ..errors import ConfigError
from ..registry import nearest
from .aliases import not_an_alias
from .tasks import Promises, promises


def check_plan(plan: RoundPlan, sites: Mapping[str, SiteOverrides] | None = None) -> None:
    """Refuse a plan that no site can carry out.

    Args:
        sites: what single sites are asked differently.
    Raises:
        ConfigError: an unknown task, labels that make no task, or a path where an alias belongs.
    """
    task = promises(plan.task)
    if task.least_labels:
        _check_labels(plan, task)
    _check_numbers(plan, task)
    _check_aliases("", plan.model, plan.data)
    for site, asked in sorted((sites or {}).items()):
        _check_aliases(f"{site}: ", asked.model, asked.data)


def _check_labels(plan: RoundPlan, task: Promises) -> None:
    labels = [label.strip() for label in plan.labels]
    if len(labels) < task.least_labels:
        least = {1: "one label", 2: "two labels"}[task.least_labels]
        what = "all classes" if task.classes else "a name for each number"
        raise ConfigError(
            f"{plan.task} needs at least {least} and the plan has {len(labels)}; list {what} in labels",
            code="too_few_labels",
        )
    if "" in labels:
        raise ConfigError("a label is empty; leave it out of labels or give it a name", code="empty_label")
    if twice := [label for label, times in Counter(labels).items() if times > 1]:
        raise ConfigError("a label is listed twice; list each class once", repr(twice[0]), code="duplicate_label")


def _check_numbers(plan: RoundPlan, task: Promises) -> None:
    for setting, given in (("target_mean", plan.target_mean), ("target_scale", plan.target_scale)):
        if given and not task.numbers:
            raise ConfigError(f"{setting} is for regression, the task is {plan.task}; leave it out", code="no_numbers")
        if given and len(given) != len(plan.labels):
            raise ConfigError(
                f"{setting} has {len(given)} numbers and labels names {len(plan.labels)}; give one for each",
                code="wrong_count",
            )


def _check_aliases(where: str, model: str | None, data: str | None) -> None:
    for setting, name in (("model", model), ("data", data)):
        if name is not None and (kind := not_an_alias(name)):
            raise ConfigError(
                f"{where}{setting} is {kind}; write the alias that the sites' fm_site.yaml has for it",
                repr(name),
                code="not_an_alias",
            )


def check_best(task: str, metric: str, mode: str) -> None:
    """Refuse a metric that cannot choose the best adapter.

    Raises:
        ConfigError: no site reports it for this task, or the wrong end of it would be taken for the best.
    """
    known = promises(task).metrics
    if not metric:
        return
    if metric not in known:
        hint = nearest(metric, list(known))
        raise ConfigError(
            f"no site reports this key_metric for {task}; {hint}known: {sorted(known)}",
            repr(metric),
            code="unknown_metric",
        )
    if mode != known[metric]:
        size = "larger" if known[metric] == "max" else "smaller"
        raise ConfigError(
            f"{metric} is better when it is {size}: set key_metric_mode to {known[metric]}", code="wrong_mode"
        )


def check_sites(named: Collection[str], needed: int, mandatory: Collection[str] = ()) -> None:
    """Refuse a job that waits for sites it does not have.

    Args:
        named: the sites of the job; empty: all that are connected.
        needed: so many must take part.
        mandatory: without which it does not start.
    Raises:
        ConfigError: more are needed than are named, or one that is not.
    """
    if not named:
        return
    if needed > len(named):
        raise ConfigError(
            f"the job needs {needed} sites (min_clients, min_responses) and names {len(named)}; ask for fewer",
            code="too_few_sites",
        )
    if unknown := sorted(set(mandatory) - set(named)):
        hint = nearest(unknown[0], sorted(named))
        raise ConfigError(f"a mandatory client is no site of the job; {hint}", repr(unknown[0]), code="unknown_site")


def check_fewest(sites: int, fewest: int) -> None:
    """Refuse a job whose rounds cannot have as many updates as its guards compare.

    Args:
        sites: of a round at most; 0: nobody knows yet.
        fewest: so many updates the guards need.
    Raises:
        ConfigError: there cannot be so many.
    """
    if 0 < sites < fewest:
        raise ConfigError(
            f"the job's guards need {fewest} updates in a round, for the f that they are set to, and there are at most "
            f"{sites} sites; lower f or leave it out",
            code="too_few_for_guard",
        )
