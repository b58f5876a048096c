"""Small adapters and updates as sites of a federation send them."""

import torch

from nvflare_fm.adapter import Adapter, AdapterUpdate, LoraPair, Manifest, Report
from nvflare_fm.config import Aggregation, RoundPlan
from nvflare_fm.job.settle import settle

LAYERS = {
    "base_model.model.model.layers.0.self_attn.q_proj": (6, 5),
    "base_model.model.model.layers.1.self_attn.q_proj": (6, 5),
}
MANIFEST = Manifest("base-1", "causal_lm", "lora")
SETTLED = settle(RoundPlan(peft={"method": "lora", "rank": 3, "lora_alpha": 12}), Aggregation())
PLAN = SETTLED.plan  # what they were asked


def adapter(seed: int, rank: int = 3, scale: float = 4.0) -> Adapter:
    generator = torch.Generator().manual_seed(seed)

    def pair(fan_out: int, fan_in: int) -> LoraPair:
        a, b = torch.randn(rank, fan_in, generator=generator), torch.randn(fan_out, rank, generator=generator)
        return LoraPair(a, b, scale)

    return Adapter(
        {name: pair(*shape) for name, shape in LAYERS.items()}, {"head": torch.randn(2, generator=generator)}
    )


def update(site: str, seed: int, examples: int = 10, rank: int = 3, scale: float = 4.0) -> AdapterUpdate:
    report = Report(examples=examples, rank=rank, loss=2.0, before={"loss": 3.0 + seed}, after={"loss": 2.5})
    return AdapterUpdate(site, adapter(seed, rank, scale), MANIFEST, report)


def same(one: Adapter, other: Adapter) -> bool:
    """Bit for bit."""
    mine, theirs = one.tensors(), other.tensors()
    equal = mine.keys() == theirs.keys() and all(torch.equal(mine[n], theirs[n]) for n in mine)
    return equal and one.scales() == other.scales()
