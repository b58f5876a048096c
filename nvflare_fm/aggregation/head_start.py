"""The head that a federation starts from: the sites' sums, each held against itself and the others', and added up."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from ..adapter import Adapter, AdapterUpdate, Manifest
from ..errors import WireError
from ..record.reason import Reason
from ..synthesis.features import COUNTS, NAMES, SQUARES, SUMS, WIDEST, Sums, head, of_rows
from . import false_sums
from .admit import admit

_FAR_LENGTH = 4.0  # times the median of a row's squared length, which the base model decides and no site


def check_sums(update: AdapterUpdate, classes: int) -> None:
    """Refuse what cannot be sums over rows. Its values are finite.

    Raises:
        WireError: names the site and what is wrong.
    """
    found = {name: each.shape for name, each in update.adapter.descriptions().items()}
    width = found[SUMS][-1] if len(found[SUMS]) == 2 else 0
    wanted = {SUMS: (classes, width), COUNTS: (classes,), SQUARES: (width, width)}
    if not 0 < width <= WIDEST or found != wanted:
        raise WireError(
            f"{update.site} sent sums over features of the shapes {[found[name] for name in NAMES]}; {classes} classes "
            f"are asked of it, and at most {WIDEST} features",
            code="sums_shape",
        )
    sums = Sums.read(update.adapter.dense)
    if not sums.counts.sum() or not of_rows(sums):
        raise WireError(f"{update.site} sent sums over features that no rows have", code="sums_impossible")


@dataclass(frozen=True)
class Start:
    """The head that all sites start from.

    Args:
        adapter: dense tensors of `features.START`.
        manifest: of the sites whose sums count.
        refused: why the others do not.
        mislabelled: sites whose labels mean something else than at the others.
        shares: of each site that counts, how often each of its rows does.
    """

    adapter: Adapter
    manifest: Manifest
    refused: Mapping[str, Reason]
    mislabelled: frozenset[str]
    shares: Mapping[str, float]


def head_start(updates: Sequence[AdapterUpdate]) -> Start:
    """Fit the head that all sites start from.

    A site counts as twice the median of the other sites' rows at most. One whose rows are far longer or shorter than
    the others' has another base model, or lies, and does not count; neither does one whose labels mean something else,
    or whose sums take from the head what it knows of the other sites' rows.

    Args:
        updates: of sites, with sums that `check_sums` let pass.

    Raises:
        WireError: no site is left, or too many contradict the others.
    """
    updates, refused = admit(Adapter(), None, updates)
    rows = {update.site: float(update.adapter.dense[COUNTS].double().sum()) for update in updates}
    lengths = {u.site: float(u.adapter.dense[SQUARES].diagonal().double().sum()) / rows[u.site] for u in updates}
    middle = median(lengths.values()) if lengths else 0.0
    far = Reason(
        "rejected", "its features are of another size than the others'; is its base model whole?", "other_features"
    )
    refused |= {site: far for site in rows if not middle / _FAR_LENGTH <= lengths[site] <= middle * _FAR_LENGTH}
    left = [update for update in updates if update.site not in refused]
    if not left:
        raise WireError("no site sent features that a head could start from", code="no_head_start")
    false, mislabelled = false_sums.found_among(left, rows)
    refused |= false
    total, shares = false_sums.added([update for update in left if update.site not in refused], rows)
    return Start(Adapter(dense=head(total).tensors()), left[0].manifest, refused, frozenset(mislabelled), shares)
