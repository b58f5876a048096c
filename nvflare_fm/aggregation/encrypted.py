"""One round at the server where it cannot read what sites send: admit, weigh, add. Nothing of it needs a value."""

from collections.abc import Callable, Mapping, Sequence

from ..adapter import Adapter, AdapterUpdate, Manifest
from ..config import Aggregation
from . import weigh
from .admit import admit
from .claims import held
from .cohort import Cohort
from .combine import Combined, nothing_left, weighed_by

Add = Callable[[Sequence[Adapter], Sequence[float]], Adapter]


def combine_unread(
    state: Adapter,
    manifest: Manifest | None,
    updates: Sequence[AdapterUpdate],
    aggregation: Aggregation,
    add: Add,
) -> Combined:
    """Add up the sites' updates by their shares; each holds the whole global adapter as the site would have it.

    Args:
        state: the global adapter as the sites received it; its values are not read.
        manifest: what it belongs to; None in the first round.
        updates: trained from `state`.
        aggregation: the weights; `job.legality` refuses a job whose rules would read values.
        add: makes Σ shareₖ · adapterₖ of what sites sent.

    Returns:
        The next global adapter, which nobody here can read, with weights and reasons.
    Raises:
        WireError: no update can be added; every site's reason is in the message.
    """
    accepted, refused = admit(state, manifest, updates)
    if not accepted:
        raise nothing_left(refused)
    accepted, kept_down = held(accepted, weighed_by(aggregation))
    weights = weigh.weigh(aggregation.weigh, Cohort(accepted, state), aggregation.max_weight or 1.0)
    shares: Mapping[str, float] = weights.shares
    return Combined(
        adapter=add([update.adapter for update in accepted], [shares[update.site] for update in accepted]),
        manifest=manifest or accepted[0].manifest,
        weights=shares,
        factors=weights.factors,
        refused=refused,
        held=kept_down,
    )
