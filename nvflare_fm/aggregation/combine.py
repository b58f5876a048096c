"""One round at the server: admit, weigh, merge layer by layer, shorten, report. Pure functions on adapters."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from ..adapter import Adapter, AdapterUpdate, LoraPair, Manifest
from ..config import Aggregation
from ..errors import WireError
from ..lora import refill, shorten, zero
from . import merge
from .cohort import admit
from .weigh import weigh


@dataclass(frozen=True)
class Combined:
    """The next global adapter and how it came to be."""

    adapter: Adapter
    manifest: Manifest
    weights: Mapping[str, float]  # site → share, sums to 1
    refused: Mapping[str, str] = field(default_factory=dict)  # site → reason
    energy_lost: Mapping[str, float] = field(default_factory=dict)  # layer → share of ‖ΔW‖² cut off by shortening


def combine(
    state: Adapter,
    manifest: Manifest | None,
    updates: Sequence[AdapterUpdate],
    how: Aggregation,
    max_rank: int,
) -> Combined:
    """Merges `updates`, trained from `state`, into the next global adapter of at most `max_rank`.

    Sums run over sites sorted by name, in float32, so the result does not depend on the order of arrival; one layer
    of all sites is in memory at a time.

    Raises:
        WireError: no update can be merged; every site's reason is in the message.
    """
    rule = merge.registry[how.merge]
    accepted, refused = admit(state, manifest, updates, rule.mixed_ranks)
    if not accepted:
        raise WireError(f"no update can be merged: {refused or 'no site answered'}")
    weights = weigh(how.weigh, accepted)
    lora, lost = {}, {}
    for layer in sorted(accepted[0].adapter.lora):
        pairs = [u.adapter.lora[layer].to(torch.float32) for u in accepted]
        start = state.lora[layer].to(torch.float32) if state else zero(*pairs[0].shape)
        merged = rule.merge(start, pairs, weights)
        lora[layer], lost[layer] = _finish(merged, rule, how, max_rank, layer)
    return Combined(
        adapter=Adapter(lora, _mean(accepted, weights)),
        manifest=manifest or accepted[0].manifest,
        weights={u.site: w for u, w in zip(accepted, weights, strict=True)},
        refused=refused,
        energy_lost=lost,
    )


def _finish(
    merged: LoraPair, rule: merge.MergeRule, how: Aggregation, max_rank: int, layer: str
) -> tuple[LoraPair, float]:
    if not rule.canonical:
        return merged, 0.0
    short, lost = shorten(merged, max_rank, how.sigma)
    return refill(short, max_rank, layer, how.seed), lost


def _mean(updates: Sequence[AdapterUpdate], weights: Sequence[float]) -> dict[str, torch.Tensor]:
    names = sorted(updates[0].adapter.dense)
    pairs = list(zip(updates, weights, strict=True))
    return {n: sum((w * u.adapter.dense[n].float() for u, w in pairs), torch.zeros(())) for n in names}
