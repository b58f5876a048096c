"""Updates that come after their round, as in buffered asynchronous aggregation (FedBuff, arXiv:2106.06639)."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from ..adapter import Adapter, AdapterUpdate, Lazy, LoraPair, RoundTask, Waiting, WaitingPair
from ..algebra.lora import head
from ..config import Rest


def trained_from(sent: RoundTask, update: AdapterUpdate, now: RoundTask) -> AdapterUpdate:
    """`update`, marked with the adapter it was trained from where that is not the one of `now`."""
    late = now.round - sent.round
    return replace(update, start=sent.adapter, staleness=late) if late else update


def rebased(update: AdapterUpdate, state: Adapter, rest: Rest) -> AdapterUpdate:
    """What a site changed of the earlier global adapter that it began with, as if it had changed it of `state`, whole.

    Args:
        rest: of the merge rule, see `MergeRule`; not "none".

    Returns:
        For "tail" G + ΔWₖ − ΔW⁰ₖ in each layer, at the rank of G and twice the site's, with G of `state` and ΔW⁰ₖ the
        part of the earlier adapter that the site trained; for "all" ΔWₖ, which is the change. Made when it is read.
    """
    start, theirs = update.start, update.adapter
    if start is None:
        return update

    def pair(layer: str) -> LoraPair:
        trained = theirs.lora[layer].to(torch.float32)
        today, before = state.lora[layer].to(torch.float32), start.lora[layer].to(torch.float32)
        terms = [(today, 1.0), (trained, 1.0), (head(before, trained.rank), -1.0)]
        (fan_out, fan_in), rank = today.shape, sum(term.rank for term, _ in terms)
        return WaitingPair(
            Waiting((rank, fan_in), torch.float32, lambda: torch.cat([t.A for t, _ in terms])),
            Waiting((fan_out, rank), torch.float32, lambda: torch.cat([s * t.scale * t.B for t, s in terms], dim=1)),
        )

    def tensor(name: str) -> torch.Tensor:
        change: torch.Tensor = theirs.dense[name].float() - start.dense[name].float()
        return state.dense[name].float() + change

    lora: Mapping[str, Any] = theirs.lora if rest == "all" else Lazy(theirs.lora, pair)
    return replace(update, adapter=Adapter(lora, Lazy(theirs.dense, tensor)))
