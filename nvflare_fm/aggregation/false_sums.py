"""Which sites' sums over features ruin the head, or are of labels that mean something else at the other sites."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median, median_low

from torch import Tensor

from ..adapter import AdapterUpdate
from ..errors import WireError
from ..record.reason import Reason
from ..synthesis.features import COUNTS, SUMS, Head, Sums, covariance, drawn, head, precision
from .claims import at_most

FAR = 2.0  # times the median of the other sites' rows, as which a site counts at most
_KNOWN = 5  # rows of a label at the other sites, from which on its mean is compared
_ALIKE = 0.6  # of the middle site's cosine to the others: of honest sites, in any company, the least has 0.71
_HARM = 0.05  # most that a site may take from the share of rows that is read right; honest ones take up to 0.031
_SPREAD = 4.0  # times the others' variance that logits may have within labels; honest ones have up to 2.1
_POINTS = 512  # that stand for a site's rows


def added(updates: Sequence[AdapterUpdate], rows: Mapping[str, float]) -> tuple[Sums, dict[str, float]]:
    """The sum over sites, and how often each row of a site counts in it."""
    most = at_most([rows[update.site] for update in updates], FAR)
    shares = {update.site: counted / rows[update.site] for update, counted in zip(updates, most, strict=True)}
    total = Sums.none(*updates[0].adapter.dense[SUMS].shape)
    for update in updates:  # one at a time: products of thousands of features are large
        for whole, part in zip(vars(total).values(), vars(Sums.read(update.adapter.dense)).values(), strict=True):
            whole.add_(part, alpha=shares[update.site])
    return total, shares


def without(total: Sums, update: AdapterUpdate, share: float) -> Sums:
    """What is left of a sum over sites without one of them, each row of which counts as `share` in it."""
    parts = zip(vars(total).values(), vars(Sums.read(update.adapter.dense)).values(), strict=True)
    return Sums(*(whole - share * part for whole, part in parts))


def found_among(updates: Sequence[AdapterUpdate], rows: Mapping[str, float]) -> tuple[dict[str, Reason], set[str]]:
    """Find the sites whose sums harm the others, the worst first, and those whose labels mean something else.

    The others are looked at anew without each that is found: its sums may be why they seem to differ. Where rows are
    fewer than features any of them may change much, so limits are wider by features / rows.

    Args:
        rows: of each site.

    Returns:
        Why their sums do not count, and of which the labels mean something else.
    Raises:
        WireError: too many contradict the others.
    """
    found: dict[str, Reason] = {}
    mislabelled: set[str] = set()
    points = {u.site: drawn(Sums.read(u.adapter.dense), _POINTS, place) for place, u in enumerate(updates)}
    while True:
        counted = [update for update in updates if update.site not in found]
        judged = [update for update in updates if update.site not in mislabelled]
        harm, spread, alike = _held(counted, judged, rows, points)
        worst, widest = (max(of, key=lambda site: (of[site], site)) for of in (harm, spread))
        other = min(alike, key=lambda site: (alike[site], site), default=worst)
        least = _ALIKE * median(alike.get(update.site, 1.0) for update in counted)
        told_apart = len(counted) > 2  # of two nobody can tell who is right
        room = 1 + updates[0].adapter.dense[SUMS].shape[1] / sum(rows[update.site] for update in counted)
        if told_apart and spread[widest] > room * _SPREAD * max(1.0, median(spread.values())):
            found[widest] = Reason(
                "rejected",
                f"its rows of one label would differ {spread[widest]:.0f} times as much as the other sites' in what "
                "tells labels apart; were its sums made by another version of the base model, or on purpose?",
                "harmful_sums",
            )
        elif told_apart and harm[worst] > room * _HARM:
            found[worst] = Reason(
                "rejected",
                f"with its sums the head would misread {harm[worst]:.0%} more of the other sites' rows; were they made "
                "by another version of the base model, or on purpose?",
                "harmful_sums",
            )
        elif alike.get(other, 1.0) < least:
            found[other] = Reason(
                "rejected",
                f"what tells its labels apart is not what does at the other sites (cosine {alike[other]:.2f}, at least "
                f"{least:.2f} is needed); are its labels mapped as theirs are?",
                "other_labels",
            )
            mislabelled.add(other)
        else:
            return found, mislabelled
        if len(found) > max(1, (len(updates) - 1) // 4):  # as many as `geometric_median` expects to be hostile
            raise WireError(
                f"the sums of {', '.join(sorted(found))} contradict the others': too many sites to tell who is right",
                code="sums_contradict",
            )


def _held(
    counted: Sequence[AdapterUpdate],
    judged: Sequence[AdapterUpdate],
    rows: Mapping[str, float],
    points: Mapping[str, tuple[Tensor, Tensor]],
) -> tuple[dict[str, float], dict[str, float], dict[str, float]]:
    """Hold each site against the others.

    Its harm is what its sums take from the share of points that is read right, at the middle one of the others: where
    fewer than half of them lie, that is no more than they do to some honest site.

    Its spread is the variance of its rows' logits within labels, in multiples of the others': what is large there hides
    what tells labels apart.

    Its likeness is the cosine of its labels' means with the others', in the metric of the covariance within labels. It
    is looked at without each one of the others in turn, and the highest counts: no other site alone can make a site
    look different.

    Args:
        counted: the sites whose sums count.
        judged: these, and more.
        points: that stand for each site's rows, and their labels.

    Returns:
        The harm and the spread of each that counts, and the likeness of each that is judged and can be compared.
    """
    total, shares = added(counted, rows)
    now = _right(head(total), shares, points)
    harm, spread, alike = dict[str, float](), dict[str, float](), dict[str, float]()
    for left_out in counted:
        rest = without(total, left_out, shares[left_out.site])
        metric, within = precision(rest), covariance(rest)[0]
        from_rest = head(rest, metric)
        then = _right(from_rest, shares, points)
        lost = [then[site] - now[site] for site in shares if site != left_out.site]
        harm[left_out.site] = median_low(lost) if lost else 0.0
        own = covariance(Sums.read(left_out.adapter.dense))[0]
        spread[left_out.site] = _variance(from_rest, own, rest) / max(_variance(from_rest, within, rest), 1e-12)
        noise = float((metric * within).sum())  # mean square of a row
        for update in judged:
            if update.site != left_out.site:
                mine = _Labels(update.adapter.dense[COUNTS].double(), update.adapter.dense[SUMS].double())
                share = shares.get(update.site, 0.0)
                others = _Labels(rest.counts - share * mine.counts, rest.sums - share * mine.sums)
                alike[update.site] = max(_cosine(mine, others, metric, noise), alike.get(update.site, -1.0))
    return harm, spread, alike


def _variance(found: Head, within: Tensor, rows: Sums) -> float:
    """The variance of logits within labels, where each label counts as often as it has rows."""
    weight = found.weight.double()
    return float(rows.counts @ ((weight @ within) * weight).sum(1) / rows.counts.sum())


def _right(found: Head, sites: Iterable[str], points: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, float]:
    """The share of each site's points that a head reads right."""
    return {site: float((found(points[site][0]) == points[site][1]).float().mean()) for site in sites}


@dataclass(frozen=True)
class _Labels:
    """Rows of each label, (classes,), and the sums of their features, (classes, width)."""

    counts: Tensor
    sums: Tensor


def _cosine(mine: _Labels, others: _Labels, metric: Tensor, noise: float) -> float:
    """The cosine of two sites' means of the labels that both have; 1 where these are too few to tell.

    What few rows add to the length of means is subtracted, so that small sites are as alike as large ones.

    Args:
        metric: (width, width).
        noise: mean square of a row's distance from its label's mean.
    """
    compared = ((mine.counts > 0) & (others.counts >= _KNOWN)).nonzero()[:, 0]
    few = [each.counts[compared] for each in (mine, others)]
    weight = few[0] * few[1] / (few[0] + few[1])
    weight = weight / weight.sum()
    means = [each.sums[compared] / rows[:, None] for each, rows in zip((mine, others), few, strict=True)]
    one, other = (each - weight @ each for each in means)

    def product(left: Tensor, right: Tensor) -> float:
        return float((weight * ((left @ metric) * right).sum(1)).sum())

    lengths = [
        product(each, each) - noise * float((weight * (1 - weight) / rows).sum())
        for each, rows in zip((one, other), few, strict=True)
    ]
    return min(1.0, product(one, other) / (lengths[0] * lengths[1]) ** 0.5) if min(lengths) > 0 else 1.0
