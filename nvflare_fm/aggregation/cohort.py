"""The updates of one round side by side: what each changed, how far, and how the changes lie to each other."""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import sqrt
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..adapter import Adapter, AdapterUpdate, LoraPair
from ..config import Rest
from ..inner import energy, of_sums
from ..lora import Joined, head, owners, stack

NOTHING = 1e-12  # of the energy of what is compared: a smaller change is what rounding leaves of none


@dataclass(frozen=True)
class Moved:
    """How far a site moved over all layers, and how large it is: Frobenius norms."""

    products: float  # of what it changed of the products ΔW
    dense: float  # of what it changed of the tensors without factors
    a: float  # of the factors it holds
    b: float


@dataclass(frozen=True)
class Cohort:
    """The updates of one round that count, sorted by site, and the global adapter they were trained from."""

    updates: Sequence[AdapterUpdate]
    state: Adapter = field(default_factory=Adapter)
    rest: Rest = "none"
    multipliers: Sequence[float] = ()  # what guards leave of each site's change; none: all of it

    @cached_property
    def gram(self) -> Float[Tensor, "k k"]:
        """⟨Dᵢ, Dⱼ⟩ summed over all layers, where Dₖ is what counts of what site k changed of the products."""
        none = torch.zeros(len(self.updates), len(self.updates), dtype=torch.float64)
        whole: Tensor = sum((self._changes(layer) for layer in self._layers), none)
        left = torch.tensor(self.multipliers, dtype=torch.float64)
        return whole * left * left[:, None] if len(left) else whole

    @cached_property
    def moved(self) -> list[Moved]:
        """How far each site moved, of which every tensor is read once."""
        return [self._moved(update.adapter) for update in self.updates]

    @cached_property
    def norms(self) -> Float[Tensor, " k"]:
        """‖ΔWₖ‖ over all layers, of what each site trained."""
        energies = [sum(energy(u.adapter.lora[layer]) for layer in self._layers) for u in self.updates]
        return torch.tensor(energies, dtype=torch.float64).sqrt()

    def _moved(self, adapter: Adapter) -> Moved:
        products = a = b = dense = 0.0
        for layer in self._layers:
            pair = adapter.lora[layer].to(torch.float32)
            products += self._change(layer, pair)
            a, b = a + _square(pair.A), b + pair.scale**2 * _square(pair.B)
        for name in adapter.dense:
            tensor = adapter.dense[name].float()
            start = self.state.dense[name].float() if self.state else torch.zeros(())
            dense += _unless_rounding(_square(tensor - start), _square(tensor) + _square(start))
        return Moved(sqrt(products), sqrt(dense), sqrt(a), sqrt(b))

    def _change(self, layer: str, pair: LoraPair) -> float:
        """‖Dₖ‖² in one layer."""
        if not self.state or self.rest == "all":
            return energy(pair)
        start = head(self.state.lora[layer], pair.rank).to(torch.float32)
        both = of_sums(stack([pair, start], [1.0, 1.0]), owners([pair.rank, start.rank]))
        return _unless_rounding(float(both[0, 0] - 2 * both[0, 1] + both[1, 1]), float(both.trace()))

    @property
    def _layers(self) -> list[str]:
        return sorted(self.updates[0].adapter.lora)

    def _changes(self, layer: str) -> Float[Tensor, "k k"]:
        """⟨Dᵢ, Dⱼ⟩ in one layer. Each Dₖ is a sum over the same directions: those of all sites, and those of the global
        adapter, of which site k started from the first rₖ.
        """
        pairs = Trained(self.updates, layer)
        ranks = [p.rank for p in pairs]
        if not self.state or self.rest == "all":
            return of_sums(stack(pairs, [1.0] * len(ranks)), owners(ranks))
        start = self.state.lora[layer].to(torch.float32)
        began = (torch.arange(start.rank)[:, None] < torch.tensor(ranks)).double()
        every = stack(Joined([start], pairs), [1.0] * (1 + len(ranks)))
        return of_sums(every, torch.cat([-began, owners(ranks)]))


class Trained(Sequence[LoraPair]):
    """One layer of every site in float32, read anew at each access and not kept: a sum holds one site at a time."""

    def __init__(self, updates: Sequence[AdapterUpdate], layer: str) -> None:
        self.updates, self.layer = updates, layer

    def __len__(self) -> int:
        return len(self.updates)

    def __getitem__(self, index: Any) -> Any:
        return self.updates[index].adapter.lora[self.layer].to(torch.float32)


def drawn(sites: Iterable[str], count: int, seed: int, number: int) -> list[str]:
    """The sites of round `number`: `count` of them, drawn without replacement by the seed alone; 0: all."""
    names = sorted(sites)
    if not 0 < count < len(names):
        return names
    return sorted(random.Random(f"{seed}/{number}").sample(names, count))


def _square(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) ** 2


def _unless_rounding(change: float, of: float) -> float:
    return change if change > NOTHING * of else 0.0
