"""Who may be merged: every update is held against the federation's base model, layers and values before it counts.

The answer depends on the set of updates, never on the order they came in.
"""

import random
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from ..adapter import Adapter, AdapterUpdate, LoraPair, Manifest
from ..config import Rest
from ..errors import WireError
from ..inner import energy, of_sums
from ..lora import Joined, owners, stack

K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True)
class Cohort:
    """The updates of one round that count, sorted by site, and the global adapter they were trained from."""

    updates: Sequence[AdapterUpdate]
    state: Adapter = field(default_factory=Adapter)
    rest: Rest = "none"

    @cached_property
    def gram(self) -> Float[Tensor, "k k"]:
        """⟨Dᵢ, Dⱼ⟩ summed over all layers, where Dₖ is what site k changed of the products."""
        none = torch.zeros(len(self.updates), len(self.updates), dtype=torch.float64)
        return sum((self._changes(layer) for layer in self._layers), none)

    @cached_property
    def norms(self) -> Float[Tensor, " k"]:
        """‖ΔWₖ‖ over all layers, of what each site trained."""
        energies = [sum(energy(u.adapter.lora[layer]) for layer in self._layers) for u in self.updates]
        return torch.tensor(energies, dtype=torch.float64).sqrt()

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


def check_values(update: AdapterUpdate) -> None:
    """Refuses an update that cannot be read or is not finite, one tensor at a time.

    Raises:
        WireError: names the site and the tensor.
    """
    if not 0 < update.report.max_weight <= 1:
        raise WireError(f"{update.site} asks for a share of at most {update.report.max_weight}; it must be in (0, 1]")
    for layer, scale in update.adapter.scales().items():
        if not 0 < scale < float("inf"):
            raise WireError(f"{update.site} sent scale {scale} for {layer!r}; a scale must be positive and finite")
    for layer in update.adapter.lora:
        pair = update.adapter.lora[layer]
        if pair.A.ndim != 2 or pair.B.ndim != 2 or pair.A.shape[0] != pair.B.shape[1]:
            raise WireError(
                f"{update.site} sent lora_A {tuple(pair.A.shape)} and lora_B {tuple(pair.B.shape)} for {layer!r}; "
                "the rank of both must agree"
            )
        _check_finite(update.site, layer, pair.A, pair.B)
    for name in update.adapter.dense:
        _check_finite(update.site, name, update.adapter.dense[name])


def _check_finite(site: str, name: str, *tensors: torch.Tensor) -> None:
    for tensor in tensors:
        if not tensor.is_floating_point() or not torch.isfinite(tensor).all():
            raise WireError(
                f"{site} sent values that are not finite numbers in {name!r}; its training diverged, "
                "so lower its learning rate or look at its data"
            )


def admit(
    state: Adapter, manifest: Manifest | None, updates: Sequence[AdapterUpdate], mixed_ranks: bool = True
) -> tuple[list[AdapterUpdate], dict[str, str]]:
    """Updates that belong together, sorted by site, and the reason for each that does not.

    The reference is the global adapter, or in the first round what most sites hold (by name where they tie).

    Raises:
        WireError: two updates are of the same site.
    """
    updates = sorted(updates, key=lambda u: u.site)
    for one, next_ in pairwise(updates):
        if one.site == next_.site:
            raise WireError(f"{one.site} answered one round twice; its first answer has to be replaced, not joined")
    refused: dict[str, str] = {}

    def keep(what: Callable[[AdapterUpdate], K], expected: K | None, say: Callable[[K, K], str]) -> None:
        nonlocal updates
        if not updates:
            return
        found = [what(u) for u in updates]  # once: the answer may take reading the whole adapter
        reference = _most_common(found) if expected is None else expected
        refused.update({u.site: say(w, reference) for u, w in zip(updates, found, strict=True) if w != reference})
        updates = [u for u, w in zip(updates, found, strict=True) if w == reference]

    keep(lambda u: u.manifest.base, manifest.base if manifest else None, _other_base)
    keep(lambda u: (u.manifest.task, u.manifest.peft, u.manifest.labels), _kind(manifest), _other_kind)
    keep(lambda u: u.manifest.tokenizer, (manifest.tokenizer or None) if manifest else None, _other_tokenizer)
    keep(lambda u: u.manifest.chat_template, (manifest.chat_template or None) if manifest else None, _other_template)
    keep(lambda u: shapes(u.adapter), shapes(state) if state else None, _other_layers)
    if not mixed_ranks:
        keep(lambda u: _ranks(u.adapter), _ranks(state) if state else None, _other_ranks)
    return updates, refused


def shapes(adapter: Adapter) -> frozenset[tuple[str, tuple[int, ...]]]:
    """What every site of a federation must share: layer → (fan_out, fan_in), dense name → shape. Ranks may differ."""
    return frozenset({(n, adapter.lora[n].shape) for n in adapter.lora}) | frozenset(
        {(n, tuple(adapter.dense[n].shape)) for n in adapter.dense}
    )


def _ranks(adapter: Adapter) -> tuple[int, ...]:
    return tuple(adapter.lora[n].rank for n in sorted(adapter.lora))


def _most_common(values: Sequence[K]) -> K:
    counts = Counter(values)
    return max(values, key=lambda v: counts[v])


def _kind(manifest: Manifest | None) -> tuple[str, str, tuple[str, ...]] | None:
    return (manifest.task, manifest.peft, manifest.labels) if manifest else None


def _other_base(theirs: str, ours: str) -> str:
    return f"trained base model {theirs}, the federation trains {ours}; point the alias at the same weights"


def _other_kind(theirs: object, ours: object) -> str:
    return f"trained (task, PEFT method, labels) {theirs}, the federation trains {ours}"


def _other_tokenizer(theirs: str, ours: str) -> str:
    return (
        "its tokenizer gives other ids than the federation's; use the same tokenizer files and the same version of "
        "transformers [tokenizer_differs]"
    )


def _other_template(theirs: str, ours: str) -> str:
    return (
        "its chat template words conversations otherwise than the federation's; use the same tokenizer files "
        "(chat_template.jinja, tokenizer_config.json) [chat_template_differs]"
    )


def _other_layers(theirs: frozenset[object], ours: frozenset[object]) -> str:
    missing, extra = sorted(map(str, ours - theirs)), sorted(map(str, theirs - ours))
    return (
        f"layers differ: missing {missing[:3]}, unexpected {extra[:3]} ({len(missing)} and {len(extra)} in all); "
        "use the same target_modules and base model"
    )


def _other_ranks(theirs: tuple[int, ...], ours: tuple[int, ...]) -> str:
    return f"trained at rank {max(theirs)}, this merge rule needs {max(ours)} at every site; choose merge = exact"
