"""Synthetic rows in a job: the file that brings them, what goes together with them, and the plan by which sites vote.

Every app of the job has the same file in its folder of configuration, so NVFlare takes it to the server and to each
site once, and no round sends it again.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..config import RoundPlan, TaskPlan
from ..errors import ConfigError
from ..files import read_bytes
from ..synthesis import candidates
from ..synthesis.candidates import CandidateSet
from .feasible import check_plan
from .tasks import promises

FILE = "synthetic.jsonl"  # in the folder of an app's configuration


def takes(task: str) -> bool:
    """Whether a task can use synthetic rows: it writes a text, or chooses one label for a text."""
    known = promises(task)
    return (known.learns_text and not known.paired) or known.one_label


def read_brought(folder: Path, digest: str) -> CandidateSet:
    """Read the synthetic rows that a job brings.

    Args:
        folder: of an app's configuration.
        digest: of the rows that the plan names.
    Raises:
        ConfigError: there are none, they cannot be read, or they are others.
    """
    if not digest:
        raise ConfigError("a vote needs candidates: add synthetic=FILE", code="no_candidates")
    found = read_rows(folder / FILE)
    if found.digest != digest:
        raise ConfigError(
            f"{FILE} holds other rows than the plan's synthetic.digest names; make the job again with nvflare-fm new "
            "and synthetic=FILE",
            f"it holds {found.digest}",
            code="other_synthetic_rows",
        )
    return found


def read_rows(file: Path) -> CandidateSet:
    """Read a file of synthetic rows.

    Raises:
        ConfigError: it cannot be read, or is none.
    """
    try:
        return candidates.read(read_bytes(file, candidates.LARGEST), file.name)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"there is no file of synthetic rows that can be read as {file.name}; where a job's plan names some, each "
            f"of its apps has them as config/{FILE}: make the job with nvflare-fm new and synthetic=FILE",
            f"{file}: {error}",
            code="no_synthetic_rows",
        ) from None


def naming(plan: Mapping[str, Any], rows: CandidateSet) -> dict[str, Any]:
    """Have a plan name the synthetic rows that its job brings."""
    return {**plan, "synthetic": {**plan.get("synthetic", {}), "digest": rows.digest}}


def nothing_brought(digest: str) -> CandidateSet:
    """Stand in for `read_brought` where no job can bring anything.

    Raises:
        ConfigError: always.
    """
    raise ConfigError("the plan names synthetic rows, and nobody brought any", code="no_synthetic_rows")


def check_labels(plan: RoundPlan, rows: CandidateSet) -> None:
    """Refuse rows that a plan cannot use.

    Raises:
        ConfigError: there are none, or the task is one of classes and a row has a label that is none of the plan's.
    """
    if not rows.rows:
        raise ConfigError(f"{FILE} holds no row; make candidates with nvflare-fm synth generate", code="no_candidates")
    if promises(plan.task).classes and (others := {*rows.labels} - {*plan.labels}):
        raise ConfigError(
            f"{FILE} has rows of {len(others)} labels that are none of the plan's, or without a label; list them in "
            "labels, or make the rows for these labels",
            repr(sorted(map(str, others))[:5]),
            code="synthetic_labels",
        )


def check_votes(plan: RoundPlan) -> None:
    """Refuse a plan by which no site would vote.

    Raises:
        ConfigError: it asks for no noise, or asks for what goes with training alone.
    """
    check_plan(plan)
    if not takes(plan.task):
        raise ConfigError(
            f"synthetic rows are for causal_lm and sequence_classification, the task is {plan.task}",
            code="synthetic_task",
        )
    if not plan.privacy.asked:
        raise ConfigError(
            "votes leave a site under noise alone; set privacy.epsilon, which each site pays from its budget",
            code="votes_unprotected",
        )
    if plan.uplink or plan.downlink:
        raise ConfigError(
            "votes travel as they are, and the server reads their sum to choose; leave uplink and downlink out",
            code="votes_encoded",
        )


def voting(plan: RoundPlan, rows: CandidateSet) -> TaskPlan:
    """Make the plan that has sites vote on these rows.

    Raises:
        ConfigError: as `check_votes` and `check_labels`.
    """
    check_votes(plan)
    check_labels(plan, rows)
    nothing_trained = {"method": "lora", "rank": 1}  # no site's limit on ranks is below
    return TaskPlan.read({**dict(plan), "peft": nothing_trained, "votes": len(rows.rows)}, "plan")
