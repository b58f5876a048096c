"""Which sites' sums over features ruin the head, or are of labels that mean something else at the other sites."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from statistics import median, median_high

from torch import Tensor

from ..adapter import AdapterUpdate
from ..errors import WireError
from ..record.reason import Reason
from ..synthesis.features import COUNTS, SUMS, Sums, covariance, drawn, head, precision
from .claims import at_most

FAR = 2.0  # times the median of the other sites' rows, as which a site counts at most
_KNOWN = 5  # rows of a label at the other sites, from which on its mean is compared
_ALIKE = 0.6  # of the middle site's cosine to the others: of honest sites, in any company, the least has 0.71
_HARM = 0.05  # most that a site may take from the share of rows that is read right; honest ones take up to 0.031
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


def harmful(updates: Sequence[AdapterUpdate], rows: Mapping[str, float]) -> dict[str, Reason]:
    """Find the sites whose sums make the head misread the others' rows: the worst first, and the others without it.

    Each site's rows are stood for by points from Gaussians of its own sums, and the middle one of the other sites
    decides: where fewer than half of them lie, none is left out that harms no honest site.
    """
    found: dict[str, Reason] = {}
    points = {u.site: drawn(Sums.read(u.adapter.dense), _POINTS, place) for place, u in enumerate(updates)}
    left = list(updates)
    while len(left) > 2:  # of two nobody can tell who is right
        harm = _harm(left, rows, points)
        site = max(harm, key=lambda site: (harm[site], site))
        if harm[site] <= _HARM:
            break
        found[site] = Reason(
            "rejected",
            f"with its sums the head would misread {harm[site]:.0%} more of the other sites' rows; were they made by "
            "another version of the base model, or on purpose?",
            "harmful_sums",
        )
        _check_most_agree(found, updates)
        left = [update for update in left if update.site != site]
    return found


def _harm(
    updates: Sequence[AdapterUpdate], rows: Mapping[str, float], points: Mapping[str, tuple[Tensor, Tensor]]
) -> dict[str, float]:
    """What each site takes from the share of rows that is read right, at the middle one of the other sites."""
    total, shares = added(updates, rows)

    def right(whole: Sums) -> dict[str, float]:
        answers = head(whole)
        return {u.site: float((answers(points[u.site][0]) == points[u.site][1]).float().mean()) for u in updates}

    now, harm = right(total), {}
    for update in updates:
        without = right(_without(total, update, shares[update.site]))
        harm[update.site] = -median_high(now[site] - without[site] for site in now if site != update.site)
    return harm


def mislabelled(
    updates: Sequence[AdapterUpdate], rows: Mapping[str, float], harmful: Collection[str]
) -> dict[str, Reason]:
    """Find the sites whose labels mean something else than at the others, the least alike first.

    The others are looked at without it: its sums may be why they seem to differ.

    Args:
        harmful: sites that are judged, and judge nobody.
    """
    found: dict[str, Reason] = {}
    while alike := _alike([update for update in updates if update.site not in found], rows, harmful):
        site = min(alike, key=lambda site: (alike[site], site))
        least = _ALIKE * median(alike[other] for other in alike if other not in harmful)
        if alike[site] >= least:
            break
        found[site] = Reason(
            "rejected",
            f"what tells its labels apart is not what does at the other sites (cosine {alike[site]:.2f}, at least "
            f"{least:.2f} is needed); are its labels mapped as theirs are?",
            "other_labels",
        )
        _check_most_agree({*found, *harmful}, updates)
    return found


def _alike(updates: Sequence[AdapterUpdate], rows: Mapping[str, float], harmful: Collection[str]) -> dict[str, float]:
    """Of each site, the cosine of its labels' means with the others', in the metric of the covariance within labels.

    It is looked at without each one of the others in turn, and the highest cosine counts: no other site alone can make
    a site look different.
    """
    found: dict[str, float] = {}
    counted = [update for update in updates if update.site not in harmful]
    total, shares = added(counted, rows)
    for left_out in counted:
        rest = _without(total, left_out, shares[left_out.site])
        metric = precision(rest)
        noise = float((metric * covariance(rest)[0]).sum())  # mean square of a row
        for update in updates:
            if update.site != left_out.site:
                mine = _Labels(update.adapter.dense[COUNTS].double(), update.adapter.dense[SUMS].double())
                share = shares.get(update.site, 0.0)
                others = _Labels(rest.counts - share * mine.counts, rest.sums - share * mine.sums)
                found[update.site] = max(_cosine(mine, others, metric, noise), found.get(update.site, -1.0))
    return found


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


def _without(total: Sums, update: AdapterUpdate, share: float) -> Sums:
    parts = zip(vars(total).values(), vars(Sums.read(update.adapter.dense)).values(), strict=True)
    return Sums(*(whole - share * part for whole, part in parts))


def _check_most_agree(found: Collection[str], updates: Sequence[AdapterUpdate]) -> None:
    """So many may contradict the others as the default guard expects to be hostile (`geometric_median`)."""
    if len(found) > max(1, (len(updates) - 1) // 4):
        raise WireError(
            f"the sums of {', '.join(sorted(found))} contradict the others': too many sites to tell who is right",
            code="sums_contradict",
        )
