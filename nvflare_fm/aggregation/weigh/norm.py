"""HetLoRA's sparsity-weighted aggregation (arXiv:2401.06432): in proportion to the norm of a site's product."""

from ..asked import Needs
from ..claims import FAR_LOSS, at_most
from ..cohort import Cohort
from . import registry


@registry.register("norm", Needs(reads=("norms",), products=True))
def norm(cohort: Cohort) -> list[float]:
    """‖ΔWₖ‖ over all layers: what a site holds, not how far it moved, and no more than three times the median of
    the others'. The same for all where nobody holds anything.
    """
    norms = at_most([float(n) for n in cohort.norms], FAR_LOSS)
    return norms if any(norms) else [1.0] * len(norms)
