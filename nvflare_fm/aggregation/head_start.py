"""The head that a federation starts from: the sites' sums, each held against itself and the others', and added up."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import torch

from ..adapter import Adapter, AdapterUpdate, Manifest
from ..errors import WireError
from ..record.reason import Reason
from ..synthesis.features import COUNTS, NAMES, SQUARES, SUMS, WIDEST, Sums, head, means, precision
from .admit import admit
from .claims import at_most

FAR = 2.0  # times the median of the other sites' rows, as which a site counts at most
_FAR_LENGTH = 4.0  # the same of a row's squared length, which the base model decides and no site
_SLACK = 1e-3  # float32
_KNOWN = 5  # rows of a label at other sites, two of them at least, from which on its mean is compared
_MISREAD, _FEWEST = 0.9, 8  # share and number of labels that a site reads otherwise: honest ones have up to 0.83 of six


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
    lengths, room = sums.squares.diagonal(), 1 + _SLACK
    impossible = (
        bool((sums.counts < 0).any())
        or bool((lengths < 0).any())
        or bool((sums.sums.square().sum(1) > room * sums.counts * lengths.sum() + _SLACK).any())
        or bool((sums.squares.square() > room * torch.outer(lengths, lengths) + _SLACK).any())
    )
    if impossible or not sums.counts.sum():
        raise WireError(f"{update.site} sent sums over features that no rows have", code="sums_impossible")


@dataclass(frozen=True)
class Start:
    """The head that all sites start from.

    Args:
        adapter: dense tensors of `features.START`.
        manifest: of the sites whose sums count.
        refused: why the others do not.
        mislabelled: of these, whose labels mean something else than at the other sites.
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
    the others' has another base model, or lies, and does not count; neither does one whose labels mean something else.

    Args:
        updates: of sites, with sums that `check_sums` let pass.

    Raises:
        WireError: no site is left.
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
    mislabelled = _mislabelled(left, rows)
    total, shares = _added([update for update in left if update.site not in mislabelled], rows)
    start, refused = Adapter(dense=head(total).tensors()), {**refused, **mislabelled}
    return Start(start, left[0].manifest, refused, frozenset(mislabelled), shares)


def _added(updates: Sequence[AdapterUpdate], rows: Mapping[str, float]) -> tuple[Sums, dict[str, float]]:
    """The sum over sites, and how often each row of a site counts in it."""
    most = at_most([rows[update.site] for update in updates], FAR)
    shares = {update.site: counted / rows[update.site] for update, counted in zip(updates, most, strict=True)}
    total = Sums.none(*updates[0].adapter.dense[SUMS].shape)
    for update in updates:  # one at a time: products of thousands of features are large
        for whole, part in zip(vars(total).values(), vars(Sums.read(update.adapter.dense)).values(), strict=True):
            whole.add_(part, alpha=shares[update.site])
    return total, shares


def _mislabelled(updates: Sequence[AdapterUpdate], rows: Mapping[str, float]) -> dict[str, Reason]:
    """Find the sites most of whose labels' texts are, to the others, texts of another label.

    The one of which that holds most goes first, and the others are looked at without it: its sums may be why they
    seem to differ. None is found if it would be half of the sites: then nobody can tell who is right.
    """
    found: dict[str, Reason] = {}
    left = list(updates)
    while others := _misread(left, rows):
        site = max(others, key=lambda site: (others[site][0] / others[site][1], site))
        wrong, compared = others[site]
        found[site] = Reason(
            "rejected",
            f"{wrong} of {compared} labels that can be compared look like other labels of the other sites; are its "
            "labels mapped as theirs are?",
            "other_labels",
        )
        if 2 * len(found) >= len(updates):
            return {}
        left = [update for update in left if update.site != site]
    return found


def _misread(updates: Sequence[AdapterUpdate], rows: Mapping[str, float]) -> dict[str, tuple[int, int]]:
    """Of sites that read most of their labels otherwise: how many, and how many can be compared."""
    total, shares = _added(updates, rows)
    inverse, found = precision(total), {}
    counts = {update.site: update.adapter.dense[COUNTS].double() for update in updates}
    holders = torch.stack([count > 0 for count in counts.values()]).sum(0)
    for update in updates:
        share, mine = shares[update.site], Sums(update.adapter.dense[SUMS].double(), counts[update.site], total.squares)
        others = Sums(total.sums - share * mine.sums, total.counts - share * mine.counts, total.squares)
        known, centers = others.counts >= _KNOWN, means(others)
        compared = ((mine.counts > 0) & known & (holders > 2)).nonzero()[:, 0]
        scores = means(mine)[compared] @ inverse @ centers.T - ((centers @ inverse) * centers).sum(1) / 2
        wrong = int((scores.masked_fill(~known, -torch.inf).argmax(1) != compared).sum())
        if wrong >= _FEWEST and wrong > _MISREAD * len(compared):
            found[update.site] = wrong, len(compared)
    return found
