"""One round at the server: admit, guard, weigh, merge layer by layer, step, shorten, report. All pure functions."""

import ctypes
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..adapter import Adapter, AdapterUpdate, LoraPair, Manifest
from ..algebra.lora import refill, shorten, spectrum, zero
from ..config import Aggregation
from ..errors import ConfigError, WireError
from ..record.noised import Noised
from ..record.reason import Reason
from . import guard, merge, step, weigh
from .admit import admit
from .claims import held
from .cohort import Cohort, Held, TrainedPairs
from .downlink import restored, restored_tensor
from .late import rebased
from .needed import needed
from .step import Memory


@dataclass(frozen=True)
class Combined:
    """The next global adapter and how it came to be."""

    adapter: Adapter
    manifest: Manifest | None  # none where no round has made an adapter yet
    weights: Mapping[str, float]  # site → share; they sum to 1 where a mean is taken over those that answered
    factors: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # weight factor → site → its value
    refused: Mapping[str, Reason] = field(default_factory=dict)  # sites that do not count, and why
    guarded: Mapping[str, guard.Verdict] = field(default_factory=dict)  # sites that count less than they sent, and why
    held: Mapping[str, str] = field(default_factory=dict)  # site → numbers it reported that count as others
    energy_lost: Mapping[str, float] = field(default_factory=dict)  # layer → share of ‖ΔW‖² cut off by shortening
    spectrum: Mapping[str, tuple[float, ...]] = field(default_factory=dict)  # layer → singular values of ΔW, falling
    step_size: float | None = 1.0  # η of the server step; none where it has one for each layer
    memory: Memory = field(default_factory=Memory)  # what the server step needs in the next round
    noised: Noised | None = None  # the noise on the mean change; None: there is none
    failed: str = ""  # why nothing could be merged, so that the adapter is still that of the round before


def combine(
    state: Adapter,
    manifest: Manifest | None,
    updates: Sequence[AdapterUpdate],
    aggregation: Aggregation,
    max_rank: int,
    memory: Memory | None = None,
    whole: Adapter | None = None,
) -> Combined:
    """Merge the sites' updates into the next global adapter.

    Sums run over the sites sorted by name, in float32, so the result does not depend on the order of arrival. One layer
    of all sites is in memory at a time.

    Args:
        state: the global adapter as the sites received it.
        manifest: what it belongs to; None in the first round.
        updates: trained from `state`.
        aggregation: merge rule, weights, guards and server step.
        max_rank: of the result.
        memory: what the server step remembers of earlier rounds.
        whole: the global adapter as the server keeps it, if a transform encoded what was sent; None: it is `state`.

    Returns:
        The next global adapter, with weights and reasons.
    Raises:
        WireError: no update can be merged; every site's reason is in the message.
        ConfigError: the job asks for noise, and `aggregation.noised` adds it.
    """
    if aggregation.client_privacy.asked:
        raise ConfigError("client_privacy: this merge adds no noise; leave it out here", code="merge_without_noise")
    rule = merge.choose(aggregation.merge)
    accepted, refused = admit(state, manifest, updates, rule.mixed_ranks)
    if not accepted:
        raise nothing_left(refused)
    accepted, kept_down = held([rebased(update, state, rule.rest) for update in accepted], weighed_by(aggregation))
    asked = aggregation.step or "plain"  # a settled plan names one, and the guards
    guards = guard.usual(unseen=False, alike=False) if aggregation.guard is None else aggregation.guard
    aggregation = aggregation.model_copy(update={"guard": guards})
    everyone = Cohort(accepted, state, rule.rest, (needed(aggregation) | step.registry.needs([asked])).reads)
    verdicts = guard.judge(guards, everyone)
    refused |= {site: Reason("guard", verdict.reason) for site, verdict in verdicts.items() if verdict.left_out}
    cohort = everyone.counting({s: 0.0 if v.left_out else v.multiplier for s, v in verdicts.items()})
    if not cohort.updates:
        raise nothing_left(refused)
    accepted, left = [*cohort.updates], cohort.multipliers or [1.0] * len(cohort.updates)
    most = guard.largest_share(aggregation.max_weight, guards, len(everyone.updates))
    weights = weigh.weigh(aggregation.weigh, cohort, most, {s: v.weight for s, v in verdicts.items()})
    shares = list(weights.shares.values())
    counted = per_step(shares, accepted) if aggregation.normalize_steps else shares
    counts = [c * m for c, m in zip(counted, left, strict=True)]
    taken = step.choose(asked, cohort, shares)
    mover = step.Mover(taken, memory or Memory(), max_rank)
    lora, lost, spectra = {}, {}, {}
    for layer in sorted(accepted[0].adapter.lora):
        pairs = TrainedPairs(accepted, layer)
        start = state.lora[layer].to(torch.float32) if state else zero(*pairs[0].shape)
        merged = mover.pair(layer, start, rule.merge(start, pairs, counts))
        if whole:
            merged = restored(merged, whole.lora[layer].to(torch.float32), start, rule.canonical)
        if rule.canonical:
            short, lost[layer] = shorten(merged, max_rank, aggregation.sigma, aggregation.keep_energy)
            spectra[layer] = tuple(spectrum(short).tolist())
            fixed = aggregation.keep_energy == 1 and rule.rest != "all"  # what nobody trains needs no empty directions
            merged = refill(short, max_rank, layer, aggregation.seed) if fixed else short
        lora[layer] = merged
        _give_back()
    first = _first(shares, left)  # of what no round has made yet there is no change that could count less
    parts = counts if state else first
    dense = {name: rule.tensor(Held(accepted, name), parts) for name in sorted(accepted[0].adapter.dense)}
    for name in dense if state else ():
        before = state.dense[name].float()
        dense[name] = mover.tensor(name, before, dense[name] + (1 - sum(counts)) * before)
        if whole:
            dense[name] = restored_tensor(dense[name], whole.dense[name], before)
    _check_finite(lora, dense)
    return Combined(
        adapter=Adapter(lora, dense),
        manifest=manifest or accepted[0].manifest,
        weights=weights.shares,
        factors=weights.factors,
        refused=refused,
        guarded={site: verdict for site, verdict in verdicts.items() if verdict.reason},
        held=kept_down,
        energy_lost=lost,
        spectrum=spectra,
        step_size=taken.size,
        memory=mover.memory(),
    )


def nothing_left(refused: Mapping[str, Reason]) -> WireError:
    """Make the error of a round of which nothing counts."""
    why = "; ".join(f"{site}: {reason}" for site, reason in sorted(refused.items())) or "no site answered"
    return WireError(f"no update can be merged: {why}", code="nothing_to_merge")


def weighed_by(aggregation: Aggregation) -> set[str]:
    """What of a site's report decides how much it counts."""
    needs = needed(aggregation)
    return {
        *needs.counts,
        *needs.labels,
        *(["loss"] if needs.loss else []),
        *(["steps"] if aggregation.normalize_steps else []),
    }


def _first(shares: Sequence[float], left: Sequence[float]) -> list[float]:
    """Shares by which tensors are averaged that start from nothing; they sum to 1 whatever guards leave."""
    if min(left) == 1:
        return list(shares)
    parts = [share * m for share, m in zip(shares, left, strict=True)]
    return [part / sum(parts) for part in parts]


def _check_finite(lora: Mapping[str, LoraPair], dense: Mapping[str, Tensor]) -> None:
    """Hold a merged adapter's values to being finite.

    Raises:
        WireError: names the tensor; nothing of the round may be kept then.
    """
    tensors = {**{f"{n}.B": p.B for n, p in lora.items()}, **{f"{n}.A": p.A for n, p in lora.items()}, **dense}
    for name, tensor in tensors.items():
        if not math.isfinite(torch.linalg.vector_norm(tensor, dtype=torch.float64)):
            raise WireError(f"merging gives values in {name!r} that are not finite", code="merge_not_finite")


def per_step(shares: Sequence[float], updates: Sequence[AdapterUpdate]) -> list[float]:
    """FedNova (arXiv:2007.07481): wₖ·τ̄/τₖ with τₖ site k's steps and τ̄ = Σ wₖτₖ. The mean change is then that of
    sites which all take τ̄ steps. Does not sum to 1: it counts changes, not adapters.

    Raises:
        WireError: a site does not say how many steps it took.
    """
    steps = [update.report.steps or 0 for update in updates]
    for update, taken in zip(updates, steps, strict=True):
        if taken < 1:
            raise WireError(f"{update.site} reports no steps; leave normalize_steps off", code="no_count")
    usual = sum(share * taken for share, taken in zip(shares, steps, strict=True))
    return [share * usual / taken for share, taken in zip(shares, steps, strict=True)]


def _give_back() -> None:
    """Hands what a layer needed back to the system; glibc would keep it, in holes between the new adapter's tensors."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)
