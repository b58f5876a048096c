"""One server round with `exact` at the layers of an 8B model: on the CPU, where a server does it, and on the GPU."""

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from nvflare_fm.adapter import Adapter, AdapterUpdate, LoraPair, Manifest, Report
from nvflare_fm.aggregation.combine import combine
from nvflare_fm.config import Aggregation
from tests.gpu.measuring import TINY, attempt, now, on_gpu, say

_RANK = 16
_WIDTH, _INNER, _GROUPED = (64, 224, 16) if TINY else (4096, 14336, 1024)
BLOCK = {"q": (_WIDTH, _WIDTH), "k": (_GROUPED, _WIDTH), "v": (_GROUPED, _WIDTH), "o": (_WIDTH, _WIDTH)}
BLOCK |= {"gate": (_INNER, _WIDTH), "up": (_INNER, _WIDTH), "down": (_WIDTH, _INNER)}
BLOCKS, OF = 1 if TINY else 2, 32


def merge() -> None:
    state = adapter(0)
    for sites in (2,) if TINY else (8, 32):
        sent = [adapter(seed + 1, state) for seed in range(sites)]
        with attempt(f"merge of {sites} on the CPU"):
            seconds, on_cpu = merged(state, sent, "cpu")
            say("merge", sites=sites, where="cpu", threads=torch.get_num_threads(), all_blocks_s=seconds * OF / BLOCKS)
        if on_gpu():
            with attempt(f"merge of {sites} on the GPU"), OnGPU():
                merged(state, sent, "cuda")
                seconds, there = merged(state, sent, "cuda")
                name = next(iter(on_cpu.lora))
                off = there.lora[name].B.cpu() @ there.lora[name].A.cpu() - on_cpu.lora[name].delta()
                off_by = float(off.norm() / on_cpu.lora[name].delta().norm())
                say("merge", sites=sites, where="gpu", all_blocks_s=seconds * OF / BLOCKS, off=off_by)


def merged(state: Adapter, sent: list[Adapter], where: str) -> tuple[float, Adapter]:
    manifest = Manifest("llama-3-8b", "causal_lm", "lora")
    updates = [
        AdapterUpdate(f"site-{i:02}", placed(a, where), manifest, Report(examples=100)) for i, a in enumerate(sent)
    ]
    start, began = placed(state, where), now()
    made = combine(start, manifest, updates, Aggregation(step="plain"), _RANK)
    return now() - began, made.adapter


def adapter(seed: int, beside: Adapter | None = None) -> Adapter:
    """Of falling singular values; beside another, what training made of that."""
    chance, pairs = torch.Generator().manual_seed(seed), {}
    falling = 0.8 ** torch.arange(_RANK)
    for block in range(BLOCKS):
        for layer, (fan_out, fan_in) in BLOCK.items():
            a = torch.randn(_RANK, fan_in, generator=chance) / fan_in**0.5
            b = torch.randn(fan_out, _RANK, generator=chance) / fan_out**0.5 * falling
            old = beside.lora[f"{block}.{layer}"] if beside else None
            pairs[f"{block}.{layer}"] = LoraPair(old.A + 0.3 * a, old.B + 0.3 * b) if old else LoraPair(a, b)
    return Adapter(pairs)


def placed(one: Adapter, where: str) -> Adapter:
    return Adapter({n: LoraPair(p.A.to(where), p.B.to(where), p.scale) for n, p in one.lora.items()})


class OnGPU(TorchFunctionMode):
    """New tensors on the GPU; those of a generator of the CPU after they were drawn."""

    makers = frozenset((torch.zeros, torch.ones, torch.empty, torch.eye, torch.arange, torch.tensor, torch.randn))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in self.makers or "device" in kwargs:
            return func(*args, **kwargs)
        return func(*args, **kwargs).cuda() if "generator" in kwargs else func(*args, **kwargs, device="cuda")
