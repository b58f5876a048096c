"""Faithful versions of what other people's rules do where ours would do better than theirs, for comparison alone."""

from dataclasses import replace

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import dequantize_4bit

from nvflare_fm.adapter import Adapter, AdapterUpdate, LoraPair, Manifest, RoundTask
from nvflare_fm.aggregation.combine import Combined
from nvflare_fm.site import peft_methods
from nvflare_fm.site.worker import Worker


class ScaleBlindWorker(Worker):
    """HLoRA as NVFlare's published example has it: sites send B @ A without its scale, and each multiplies what comes
    back by its own. With one α over mixed ranks, ΔW changes at every site and in every round.
    """

    def _mine(self, task: RoundTask) -> RoundTask:
        plan = self.overrides.applied(task.plan)
        scale = peft_methods.read(plan.peft).scale
        pairs = {n: LoraPair(p.A, p.B, p.scale * scale) for n, p in task.adapter.lora.items()}
        return replace(task, adapter=Adapter(pairs, task.adapter.dense))

    def train(self, task: RoundTask) -> AdapterUpdate:
        update = super().train(self._mine(task))
        raw = {n: replace(update.adapter.lora[n], scale=1.0) for n in update.adapter.lora}
        return replace(update, adapter=Adapter(raw, update.adapter.dense))

    def validate(self, task: RoundTask) -> dict[str, float]:
        return super().validate(self._mine(task))


def fold(combined: Combined, worker: Worker, task: RoundTask) -> tuple[Adapter, Manifest]:
    """FLoRA (arXiv:2409.05976): the stacked ΔW is added to the base, which is quantized again; sites start afresh.

    Changes the shared base model in place.
    """
    base = worker._job(task).base.model
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
