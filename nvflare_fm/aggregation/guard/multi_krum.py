"""Multi-Krum (arXiv:1703.02757): the mean of the n − f changes that lie closest to their neighbours."""

from ..cohort import Cohort
from ..mixing import TIED, Gram, squared_distances
from ..robust import Bad, Beta, Mixed, Near, needs, weighed
from . import Verdict, registry


def fewest(f: int) -> int:
    """Each of the chosen needs a neighbour that is honest."""
    return 2 * f + 3


@registry.register("multi_krum", needs(fewest))
def multi_krum(cohort: Cohort, *, f: Bad = None, mix: Mixed = "none", near: Near = 0.0) -> dict[str, Verdict]:
    """A site's score is the sum of the squared distances to its n − f − 2 nearest neighbours. The n − f sites with the
    lowest scores count the same, and so do those that score the same as the last of them; the others are left out.
    """
    return weighed(cohort, chosen, fewest, f, mix, near)


def chosen(gram: Gram, f: int) -> Beta:
    """1 for the points that are chosen, 0 for the others."""
    nearest = squared_distances(gram).sort(dim=1).values[:, 1 : len(gram) - f - 1]
    scores = nearest.sum(1)
    last = scores.kthvalue(len(gram) - f).values
    return (scores <= last + TIED * (last + gram.diagonal().median())).double()
