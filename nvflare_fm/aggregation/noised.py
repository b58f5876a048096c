"""One round at the server under differential privacy of each site's whole part: admit, clip, add, noise, step.

DP-FedAvg (arXiv:1710.06963) where all sites take part. What is clipped is what gets the noise, number by number:
scale · B beside an A that stays as it is, and the tensors without factors. So one site moves the sum by at most
`max_norm`, whatever it sends and whatever the others do. The divisor is that of the job, not the number of answers, and
no weight follows from what sites report. All that comes after the noise costs nothing.
"""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ..adapter import Adapter, AdapterUpdate, LoraPair, Manifest
from ..config import Aggregation
from ..privacy.chance import normal
from ..privacy.clients import ClientNoise, noised_numbers
from ..record.noised import Noised
from ..record.reason import Reason
from . import step
from .admit import admit
from .cohort import Cohort, Held, TrainedPairs
from .combine import Combined, nothing_left
from .downlink import restored, restored_tensor
from .guard import Verdict
from .step import Memory

_ROUNDING = 1 - 1e-9  # of max_norm, so that no rounding makes a clipped change longer


def combine_noised(
    state: Adapter,
    manifest: Manifest,
    updates: Sequence[AdapterUpdate],
    aggregation: Aggregation,
    noise: ClientNoise,
    number: int,
    max_rank: int,
    memory: Memory | None = None,
    whole: Adapter | None = None,
) -> Combined:
    """Make the next global adapter: the old one plus the noised mean of the sites' changes, each clipped as a whole.

    Args:
        state: the global adapter as the sites received it; there is one, for no site is to say where it began.
        manifest: what it belongs to.
        updates: trained from `state`.
        aggregation: the server step; `job.legality` refuses rules by which one site decides what another counts.
        noise: of the job.
        number: of the round, from 0.
        max_rank: see `combine`.
        memory: see `combine`.
        whole: see `combine`.

    Returns:
        The next global adapter, with the sites that were clipped.
    Raises:
        WireError: no update can be merged; every site's reason is in the message.
    """
    accepted, refused = admit(state, manifest, updates, mixed_ranks=False)
    lengths = {update.site: _length(update.adapter, state) for update in accepted}
    strange = Reason("rejected", "what it changed has no finite length; its training diverged", "not_finite")
    refused |= {site: strange for site, length in lengths.items() if not math.isfinite(length)}
    accepted = [update for update in accepted if update.site not in refused]
    if not accepted:
        raise nothing_left(refused)
    shares = {
        u.site: min(1 / noise.expected_sites, aggregation.max_weight or 1.0, u.report.max_weight) for u in accepted
    }
    left = {site: _left(lengths[site], noise.max_norm) for site in shares}
    counts = [share * left[site] for site, share in shares.items()]
    taken = step.choose(aggregation.step or "plain", Cohort(accepted, state), list(shares.values()))
    mover = step.Mover(taken, memory or Memory(), max_rank)
    lora, dense = {}, {}
    for layer in sorted(state.lora):
        start = state.lora[layer].to(torch.float32)
        before = _in_product(start)
        changes = (_in_product(pair) - before for pair in TrainedPairs(accepted, layer))
        after = (before + noised_sum(changes, counts, before, noise.spread)) / start.scale
        merged = mover.pair(layer, start, LoraPair(start.A, after.float(), start.scale))
        lora[layer] = restored(merged, whole.lora[layer].to(torch.float32), start, canonical=False) if whole else merged
    for name in sorted(state.dense):
        before = state.dense[name].float().double()
        moved = before + noised_sum((t.double() - before for t in Held(accepted, name)), counts, before, noise.spread)
        dense[name] = mover.tensor(name, before.float(), moved.float())
        if whole:
            dense[name] = restored_tensor(dense[name], whole.dense[name], before.float())
    clipped = {site: factor for site, factor in left.items() if factor < 1}
    return Combined(
        adapter=Adapter(lora, dense),
        manifest=manifest,
        weights=shares,
        refused=refused,
        guarded={site: _verdict(lengths[site], factor, noise) for site, factor in clipped.items()},
        step_size=taken.size,
        memory=mover.memory(),
        noised=Noised(
            noise_multiplier=noise.noise_multiplier,
            max_norm=noise.max_norm,
            expected_sites=noise.expected_sites,
            clipped=len(clipped),
            ratio=noise.ratio(noised_numbers(state)),
            epsilon=noise.epsilon(number + 1),
            delta=noise.delta,
        ),
    )


def noised_sum(changes: Iterable[Tensor], counts: Sequence[float], like: Tensor, spread: float) -> Tensor:
    """Add up one tensor's changes, each times how much of it counts, and noise of standard deviation `spread`."""
    total = torch.zeros_like(like)
    for change, count in zip(changes, counts, strict=True):
        total += count * change
    return total + spread * normal(like.numel()).reshape(like.shape)


def _in_product(pair: LoraPair) -> Tensor:
    """scale · B: the part of ΔW = (scale · B) A that changes."""
    return pair.scale * pair.B.double()


def _length(adapter: Adapter, start: Adapter) -> float:
    """How far an update is from where it started, in the numbers that get noise, all of them together."""
    square = 0.0
    for layer in sorted(start.lora):
        before, after = (_in_product(each.lora[layer].to(torch.float32)) for each in (start, adapter))
        square += _square(after - before)
    for name in sorted(start.dense):
        square += _square(adapter.dense[name].float().double() - start.dense[name].float().double())
    return math.sqrt(square)


def _square(change: Tensor) -> float:
    return float(torch.linalg.vector_norm(change)) ** 2


def _left(length: float, max_norm: float) -> float:
    """How much of a change counts."""
    return 1.0 if length <= max_norm * _ROUNDING else _ROUNDING * max_norm / length


def _verdict(length: float, factor: float, noise: ClientNoise) -> Verdict:
    return Verdict(factor, f"its change is {length:.3g} long; it is clipped to max_norm = {noise.max_norm:g}")
