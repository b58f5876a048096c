"""Guards: how much of a site's update counts where it lies far from the others'. One file a guard."""

from collections.abc import Callable, Mapping, Sequence

from ...config import Rule
from ...record.reason import Verdict as Verdict
from ..asked import RuleRegistry, asked
from ..cohort import Cohort

Guard = Callable[..., Mapping[str, Verdict]]
registry: RuleRegistry[Guard] = RuleRegistry("guard", __name__)


NEAR = 1.5  # spares honest sites that differ: all of banking77's at α = 0.1, all but one of MedQuAD's institutes


def usual(unseen: bool, alike: bool) -> tuple[Rule, ...]:
    """Choose the guards of a job that names none.

    Args:
        unseen: whether the server may not compare what sites send.
        alike: whether the job asks the same work of all sites and adds up what they change, so that a change that lies
            far from the others is not what was asked.
    """
    if unseen:
        return ()
    return ("clip_norm", {"rule": "geometric_median", "mix": "nnm", "near": NEAR}) if alike else ("clip_norm",)


def largest_share(asked: float | None, entries: Sequence[Rule], sites: int) -> float:
    """Choose the largest share that one site may have.

    A guard that judges whole changes counts sites: it holds while few of them are hostile. If one could have most of
    the weight by what it says of itself, such a guard would protect nobody.

    Args:
        asked: by the job; None: nothing.
        entries: guards by name, or with their settings.
        sites: how many answered.
    """
    if asked is not None:
        return asked
    return min(1.0, 2 / sites) if registry.needs(entries).sums else 1.0


def judge(entries: Sequence[Rule], cohort: Cohort) -> dict[str, Verdict]:
    """Ask every guard that a job names for its verdicts, and multiply them.

    Args:
        entries: guards by name, or with their settings; each looks at the updates as they came.
        cohort: the updates of the round.

    Returns:
        A verdict for each site that does not count in full.

    Raises:
        ConfigError: an unknown guard or setting.
    """
    found: dict[str, Verdict] = {}
    for entry in entries:
        for site, said in asked(registry, entry)(cohort).items():
            before = found.get(site)
            found[site] = _both(before, said) if before else said
    return found


def _both(one: Verdict, other: Verdict) -> Verdict:
    reasons = "; ".join(filter(None, (one.reason, other.reason)))
    return Verdict(one.multiplier * other.multiplier, reasons, one.weight * other.weight)
