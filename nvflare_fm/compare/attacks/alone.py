"""Attacks that need no accomplice: each attacker makes what it sends of what it would send if it were honest."""

from dataclasses import replace
from math import sqrt
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from ...adapter import Adapter, AdapterUpdate, LoraPair
from ...algebra.inner import energy
from . import Known, on_updates
from .changes import added, times

Times = Annotated[float, Field(gt=0, le=1e6, description="how many times as far as an honest change")]


@on_updates.register("sign_flip")
def sign_flip(known: Known, *, far: Times = 5.0) -> list[AdapterUpdate]:
    """The opposite of the own change, `far` times as long (sign flipping, arXiv:1811.03761)."""
    return [
        known.sent(times(change, -far, -far), update)
        for change, update in zip(known.own_changes, known.own, strict=True)
    ]


@on_updates.register("scale")
def scale(known: Known, *, far: Times = 10.0) -> list[AdapterUpdate]:
    """The own change, `far` times as long: on top of an attack on rows it replaces the model (arXiv:1807.00459)."""
    return [
        known.sent(times(change, far, far), update) for change, update in zip(known.own_changes, known.own, strict=True)
    ]


@on_updates.register("noise")
def noise(known: Known, *, far: Times = 10.0) -> list[AdapterUpdate]:
    """The own change and Gaussian noise, `far` times as long in each layer (as in arXiv:1703.02757)."""

    sent = []
    for change, update in zip(known.own_changes, known.own, strict=True):
        lora = {}
        for layer, pair in change.lora.items():
            (fan_out, fan_in), rank = pair.shape, update.adapter.lora[layer].rank
            random = LoraPair(_normal(known, rank, fan_in), _normal(known, fan_out, rank))
            lora[layer] = LoraPair(random.A, random.B, far * sqrt(energy(pair) / energy(random)))
        dense = {}
        for name, tensor in change.dense.items():
            drawn = _normal(known, *tensor.shape)
            dense[name] = drawn * (far * tensor.norm() / drawn.norm())
        sent.append(known.sent(added([change, Adapter(lora, dense)], [1.0, 1.0]), update))
    return sent


def _normal(known: Known, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=known.generator)


@on_updates.register("head_only")
def head_only(known: Known, *, far: Times = 10.0) -> list[AdapterUpdate]:
    """An honest change of the products, and the opposite of that of the head, `far` times as long: a rule that looks at
    all that changed together overlooks it where the products are the larger part (ours). Without a head it is none.
    """
    return [
        known.sent(times(change, 1.0, -far), update)
        for change, update in zip(known.own_changes, known.own, strict=True)
    ]


@on_updates.register("gauge_rotation")
def gauge_rotation(
    known: Known, *, condition: Annotated[float, Field(ge=1, le=1e8, description="of R")] = 1e6
) -> list[AdapterUpdate]:
    """B R and R⁻¹ A in place of B and A: ΔW is the honest one, the factors are not, so whatever averages factors is
    spoilt (ours). R = Q D: Q turns, and D stretches by 1/√condition to √condition.
    """

    def turned(pair: LoraPair) -> LoraPair:
        rank = pair.rank
        turn = torch.linalg.qr(torch.randn(rank, rank, generator=known.generator, dtype=torch.float64))[0]
        stretch = torch.logspace(-0.5, 0.5, rank, base=condition, dtype=torch.float64)
        a, b = (turn.T @ pair.A.double()) / stretch[:, None], (pair.B.double() @ turn) * stretch
        return LoraPair(a.to(pair.A), b.to(pair.B), pair.scale)

    return [
        replace(update, adapter=Adapter({n: turned(p) for n, p in update.adapter.lora.items()}, update.adapter.dense))
        for update in known.own
    ]
