"""The updates of one round side by side: what each changed, how far, and how the changes lie to each other.

All of it is measured in one pass over the sites' tensors, of which one layer of all sites is in memory at a time.
"""

import random
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import sqrt
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..adapter import Adapter, AdapterUpdate, LoraPair
from ..algebra.inner import energy, of_sums
from ..algebra.lora import Stack, head, owners, stack, zero
from ..config import Rest
from .asked import Read

NOTHING = 1e-12  # of the energy of what is compared: a smaller change is what rounding leaves of none
ENTRIES = 2**20  # of a tensor, that are multiplied in float64 at a time


@dataclass(frozen=True)
class Moved:
    """How far a site moved over all layers, and how large it is: Frobenius norms."""

    products: float  # of what it changed of the products ΔW
    dense: float  # of what it changed of the tensors without factors
    a: float  # of the factors it holds
    b: float


@dataclass(frozen=True)
class Cohort:
    """The updates of one round that count, sorted by site, and the global adapter that they were trained from.

    Args:
        updates: one of each site.
        state: the global adapter; empty in the first round.
        rest: the part of it that the sites hold frozen.
        needs: what the rules of the job read: it is measured in one pass. All else takes a pass of its own.
        multipliers: how much of each site's change the guards count; empty: all of it.
        measured: what has been measured already.
    """

    updates: Sequence[AdapterUpdate]
    state: Adapter = field(default_factory=Adapter)
    rest: Rest = "none"
    needs: Collection[Read] = ()
    multipliers: Sequence[float] = ()
    measured: dict[Read, Tensor] = field(default_factory=dict, compare=False, repr=False)

    @property
    def products(self) -> Float[Tensor, "k k"]:
        """⟨Dᵢ, Dⱼ⟩ summed over all layers, where Dₖ is what counts of what site k changed of the products."""
        return self._counted(self._measured("products"))

    @property
    def dense(self) -> Float[Tensor, "k k"]:
        """⟨Dᵢ, Dⱼ⟩ summed over the tensors without factors, such as a classifier's head."""
        return self._counted(self._measured("dense"))

    @property
    def gram(self) -> Float[Tensor, "k k"]:
        """⟨Dᵢ, Dⱼ⟩ of all that the sites changed. A rule that would let neither part hide the other looks at both."""
        return self.products + self.dense

    @property
    def moved(self) -> list[Moved]:
        """How far each site moved."""
        return [Moved(*map(sqrt, row)) for row in self._measured("moved").tolist()]

    @property
    def norms(self) -> Float[Tensor, " k"]:
        """‖ΔWₖ‖ over all layers, of what each site trained."""
        return self._measured("norms").sqrt()

    def counting(self, multipliers: Mapping[str, float]) -> "Cohort":
        """Make the cohort in which each site's change counts by its multiplier. No tensor is read again.

        Args:
            multipliers: site → multiplier; a site that is not named counts in full, and one at 0 is left out.
        """
        left = [multipliers.get(update.site, 1.0) for update in self.updates]
        stay = [place for place, much in enumerate(left) if much > 0]
        return replace(
            self,
            updates=[self.updates[place] for place in stay],
            multipliers=[left[place] for place in stay] if min(left, default=1) < 1 else (),
            measured={need: _of(found, stay, need) for need, found in self.measured.items()},
        )

    def _counted(self, whole: Tensor) -> Tensor:
        left = torch.tensor(self.multipliers, dtype=torch.float64)
        return whole * left * left[:, None] if len(left) else whole

    def _measured(self, need: Read) -> Tensor:
        if need not in self.measured:
            self.measured.update(measure(self.updates, self.state, self.rest, {*self.needs, need}))
        return self.measured[need]


def _of(found: Tensor, sites: list[int], need: Read) -> Tensor:
    return found[sites][:, sites] if need in ("products", "dense") else found[sites]


def measure(
    updates: Sequence[AdapterUpdate], state: Adapter, rest: Rest, needs: Collection[Read]
) -> dict[Read, Tensor]:
    """Read each tensor of the sites once and measure what is needed, in float64.

    Returns:
        "moved": the squares of what `Moved` says, a row a site; "norms": those of the products that the sites trained;
        "products" and "dense": the inner products of what they changed.
    """
    count = len(updates)
    sizes: dict[Read, tuple[int, ...]] = {
        "moved": (count, 4), "norms": (count,), "products": (count, count), "dense": (count, count)
    }  # fmt: skip
    found = {need: torch.zeros(size, dtype=torch.float64) for need, size in sizes.items() if need in needs}
    first = updates[0].adapter if updates else Adapter()
    for layer in sorted(first.lora) if {"moved", "norms", "products"} & set(needs) else ():
        _layer(found, TrainedPairs(updates, layer), state.lora[layer] if state and rest != "all" else None)
    for name in sorted(first.dense) if {"moved", "dense"} & set(needs) else ():
        _tensor(found, Held(updates, name), state.dense[name].float() if state else torch.zeros(()))
    return found


def _layer(found: dict[Read, Tensor], pairs: Sequence[LoraPair], before: LoraPair | None) -> None:
    """One layer. Of the inner products each Dₖ is a sum over the same directions: those of all sites, and those of the
    global adapter, of which site k started from the first rₖ.
    """
    ranks = [pair.rank for pair in pairs]
    start = zero(*pairs[0].shape) if before is None else before.to(torch.float32)
    every = Stack([start.rank, *ranks]) if "products" in found else None
    if every:
        every.add(start)
    for place, pair in enumerate(pairs):
        if "moved" in found:
            change = energy(pair) if before is None else _change(pair, head(start, pair.rank))
            row = [change, 0.0, _square(pair.A), pair.scale**2 * _square(pair.B)]
            found["moved"][place] += torch.tensor(row, dtype=torch.float64)
        if "norms" in found:
            found["norms"][place] += energy(pair)
        if every:
            every.add(pair)
    if every:
        held = (torch.arange(start.rank)[:, None] < torch.tensor(ranks)).double()
        found["products"] += of_sums(every.sum, torch.cat([-held, owners(ranks)]))


def _change(pair: LoraPair, start: LoraPair) -> float:
    """‖ΔW − ΔW_start‖²."""
    both = of_sums(stack([pair, start], [1.0, 1.0]), owners([pair.rank, start.rank]))
    return _unless_rounding(float(both[0, 0] - 2 * both[0, 1] + both[1, 1]), float(both.trace()))


def _tensor(found: dict[Read, Tensor], tensors: Sequence[Tensor], start: Tensor) -> None:
    """One tensor without factors."""
    every: Tensor | None = None
    for place, tensor in enumerate(tensors):
        change = tensor - start
        if "moved" in found:
            found["moved"][place, 1] += _unless_rounding(_square(change), _square(tensor) + _square(start))
        if "dense" in found:
            every = change.new_empty(len(tensors), change.numel()) if every is None else every
            every[place] = change.flatten()
    for some in () if every is None else torch.split(every, ENTRIES, dim=1):
        found["dense"] += some.double() @ some.double().T


class TrainedPairs(Sequence[LoraPair]):
    """One layer of every site in float32, read anew at each access and not kept: a sum holds one site at a time."""

    def __init__(self, updates: Sequence[AdapterUpdate], layer: str) -> None:
        self.updates, self.layer = updates, layer

    def __len__(self) -> int:
        return len(self.updates)

    def __getitem__(self, index: Any) -> Any:
        return self.updates[index].adapter.lora[self.layer].to(torch.float32)


class Held(Sequence[Tensor]):
    """One tensor without factors of every site in float32, read as `TrainedPairs` reads a layer."""

    def __init__(self, updates: Sequence[AdapterUpdate], name: str) -> None:
        self.updates, self.name = updates, name

    def __len__(self) -> int:
        return len(self.updates)

    def __getitem__(self, index: Any) -> Any:
        return self.updates[index].adapter.dense[self.name].float()


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
