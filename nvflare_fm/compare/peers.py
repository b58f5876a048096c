"""Faithful versions of what other people's rules do where ours would do better than theirs, for comparison alone."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import dequantize_4bit
from torch import Tensor

from ..adapter import Adapter, AdapterUpdate, LoraPair, Manifest, RoundTask, from_tensors
from ..aggregation.combine import Combined
from ..algebra.lora import head, tail
from ..job.peft import read
from ..site.model.attach import LOCAL
from ..site.peft_methods.lora import LoraAttachment
from ..site.worker import Job, Worker

GAMMA, LAMBDA = 0.99, 5e-3  # of HetLoRA, which tunes λ


class ScaleBlindWorker(Worker):
    """HLoRA as NVFlare's published example has it: sites send B @ A without its scale, and each multiplies what comes
    back by its own. With one α over mixed ranks, ΔW changes at every site and in every round.
    """

    def _mine(self, task: RoundTask) -> RoundTask:
        plan = self.overrides.applied(task.plan)
        scale = read(plan.peft).scale
        pairs = {n: LoraPair(p.A, p.B, p.scale * scale) for n, p in task.adapter.lora.items()}
        return replace(task, adapter=Adapter(pairs, task.adapter.dense))

    def train(self, task: RoundTask) -> AdapterUpdate:
        update = super().train(self._mine(task))
        raw = {n: replace(update.adapter.lora[n], scale=1.0) for n in update.adapter.lora}
        return replace(update, adapter=Adapter(raw, update.adapter.dense))

    def validate(self, task: RoundTask) -> dict[str, float]:
        return super().validate(self._mine(task))


class SelfPruningWorker(Worker):
    """HetLoRA's rank self-pruning (arXiv:2401.06432, section 4): the last directions of a site, those from γ·r on, are
    pulled to zero, and a site whose training made them smaller goes on at rank γ·r. That is a number like 1.98, and a
    rank is a whole one: it is rounded, and the next γ is of the number.
    """

    def _job(self, task: RoundTask, trains: bool, sends: bool = True) -> Job:
        job = super()._job(task, trains, sends)
        return replace(job, attachment=Penalised(job.attachment.method))

    exact_rank = 0.0  # before it is rounded; 0: not pruned yet

    def train(self, task: RoundTask) -> AdapterUpdate:
        update, rank = super().train(task), self.overrides.rank or task.plan.rank
        if task.adapter and _last(update.adapter.lora, rank) < _last(task.adapter.lora, rank):
            self.exact_rank = GAMMA * (self.exact_rank or rank)
            self.overrides = self.overrides.model_copy(update={"rank": max(1, round(self.exact_rank))})
        return update


class Penalised(LoraAttachment):
    """LoRA with λ · ‖B[:, γr:]‖ · ‖A[γr:]‖ of each layer beside the loss."""

    def attach(self, *args: Any, **kwargs: Any) -> Any:
        model, start = super().attach(*args, **kwargs), int(GAMMA * self.method.rank)
        named = dict(model.named_parameters())
        for name in [n for n in named if f".lora_A.{LOCAL}." in n]:
            a, b = named[name], named[name.replace(".lora_A.", ".lora_B.")]
            a.register_hook(lambda grad, a=a, b=b: _pulled(grad, a, b[:, start:], start))
            b.register_hook(lambda grad, a=a, b=b: _pulled(grad.T, b.T, a[start:], start).T)
        return model


@torch.no_grad()
def _pulled(grad: Tensor, factor: Tensor, other: Tensor, start: int) -> Tensor:
    """A factor's gradient and that of λ · ‖its rows from `start` on‖ · ‖other‖."""
    grad, rows = grad.clone(), factor[start:]
    grad[start:] += LAMBDA * other.norm() * rows / rows.norm().clamp(min=1e-12)
    return grad


def _last(pairs: Mapping[str, LoraPair], rank: int) -> float:
    """Σ ‖B[:, γr:]‖ · ‖A[γr:]‖ over the layers of a site of rank r, their scales counted."""
    last = (tail(head(pairs[n], rank), int(GAMMA * rank)) for n in pairs)
    return sum(p.scale * float(p.B.norm() * p.A.norm()) for p in last)


def fold(combined: Combined, worker: Worker, task: RoundTask) -> tuple[Adapter, Manifest | None]:
    """FLoRA (arXiv:2409.05976): the stacked ΔW is added to the base, which is quantized again; sites start afresh.

    Changes the shared base model in place.
    """
    base = worker._job(task, trains=True).base.model
    modules = dict(base.named_modules())
    for layer, pair in combined.adapter.lora.items():
        module = modules[layer.removeprefix("base_model.model.")]
        delta = pair.delta()
        if isinstance(module, bnb.nn.Linear4bit):
            state = module.weight.quant_state
            whole = dequantize_4bit(module.weight.data, state).float() + delta
            packed = bnb.nn.Params4bit(
                whole, requires_grad=False, quant_type=state.quant_type, compress_statistics=state.nested
            )
            module.weight = packed.to(module.weight.device)
            module.weight.quant_state.dtype = state.dtype
        else:
            with torch.no_grad():
                module.weight += delta
    empty = {n: LoraPair(p.A[:0], p.B[:, :0]) for n, p in combined.adapter.lora.items()}
    return Adapter(empty, combined.adapter.dense), combined.manifest


def factor_median(updates: Sequence[AdapterUpdate], attackers: int) -> Adapter:
    """The median over the sites of each entry of A, of B and of the head (arXiv:1803.01498), as it is used
    on whole models: the median of products is another.
    """
    first = updates[0]
    found = {
        name: torch.quantile(torch.stack([update.adapter.tensors()[name].float() for update in updates]), 0.5, dim=0)
        for name in first.adapter.tensors()
    }
    return from_tensors(found, first.adapter.scales(), first.site)


def factor_krum(updates: Sequence[AdapterUpdate], attackers: int) -> Adapter:
    """Krum (arXiv:1703.02757) on the entries of A, of B and of the head: the update whose n − f − 2 nearest others are
    nearest, with f the number of attackers, which it is told.
    """
    flat = torch.stack([torch.cat([t.float().flatten() for t in u.adapter.tensors().values()]) for u in updates])
    apart = torch.cdist(flat.double(), flat.double()).square().sort(dim=1).values[:, 1:]  # without itself
    nearest = max(1, len(updates) - attackers - 2)
    return updates[int(apart[:, :nearest].sum(dim=1).argmin())].adapter
