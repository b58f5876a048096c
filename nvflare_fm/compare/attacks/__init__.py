"""Attacks of the robustness study: what dishonest sites send, and what they train on. One file a family.

An attack on updates knows what all sites would send (omniscient attackers, who act together); an attack on rows changes
what attackers train on, and they are honest otherwise. All that is sent has the shapes, ranks and scales that the plan
asks for: the server admits it.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from random import Random
from typing import Any

import torch

from ...adapter import Adapter, AdapterUpdate, LoraPair, from_tensors
from ...aggregation.asked import RuleRegistry, asked, named
from ...algebra.lora import head, shorten, stack, zero
from ...config import Rule
from ...errors import ConfigError
from ...registry import nearest

Row = dict[str, Any]
Updates = Sequence[AdapterUpdate]


@dataclass(frozen=True)
class Known:
    """What attackers know of a round.

    A change is an `Adapter` too: of each layer the pair of what a site changed of its product ΔW, and of each tensor
    without factors the difference. Where the server averages factors entry by entry, factors are such tensors.

    Args:
        own: what the attackers' sites would send if they were honest; at least one.
        honest: what the other sites send.
        state: the global adapter that all of them received; empty in the first round.
        generator: of the attackers' random numbers.
        by_entry: whether the server averages factors entry by entry.
    """

    own: Updates
    honest: Updates
    state: Adapter
    generator: torch.Generator
    by_entry: bool = False

    @cached_property
    def own_changes(self) -> list[Adapter]:
        """What the attackers' sites would change if they were honest."""
        return [self._change(update.adapter) for update in self.own]

    @cached_property
    def honest_changes(self) -> list[Adapter]:
        """What the other sites change."""
        return [self._change(update.adapter) for update in self.honest]

    def _change(self, adapter: Adapter) -> Adapter:
        state, adapter = (self._plain(each) for each in (self.state, adapter))
        lora = {}
        for layer in adapter.lora:
            pair = adapter.lora[layer].to(torch.float32)
            start = head(state.lora[layer], pair.rank) if state else zero(*pair.shape)
            lora[layer] = stack([pair, start], [1.0, -1.0])
        before = state.dense if state else {}
        return Adapter(lora, {n: t.float() - before.get(n, torch.zeros(())) for n, t in adapter.dense.items()})

    def _plain(self, adapter: Adapter) -> Adapter:
        return Adapter({}, adapter.tensors()) if self.by_entry else adapter

    def sent(self, change: Adapter, by: AdapterUpdate) -> AdapterUpdate:
        """Make the update of `by`'s site that changes the global adapter by `change`, at that site's rank and scale.

        What does not fit into the rank is cut off where it matters least. A site of the global rank starts from the
        whole adapter, so attackers train at that rank, as any site may that a job does not list.
        """
        state = self._plain(self.state)
        dense = {name: state.dense[name] + change.dense[name] if state else change.dense[name] for name in change.dense}
        if self.by_entry:
            return replace(by, adapter=from_tensors(dense, by.adapter.scales(), by.site))
        lora = {}
        for layer, pair in by.adapter.lora.items():
            start = head(state.lora[layer], pair.rank) if state else zero(*pair.shape)
            lora[layer] = at_rank(stack([start, change.lora[layer]], [1.0, 1.0]), pair.rank).rescaled(pair.scale)
        return replace(by, adapter=Adapter(lora, dense))


def at_rank(pair: LoraPair, rank: int) -> LoraPair:
    """The closest pair of exactly `rank` directions; the last may be empty."""
    short = shorten(pair, rank)[0]
    empty = rank - short.rank
    a, b = torch.nn.functional.pad(short.A, (0, 0, 0, empty)), torch.nn.functional.pad(short.B, (0, empty))
    return LoraPair(a, b, short.scale)


OnUpdates = Callable[..., list[AdapterUpdate]]
OnRows = Callable[..., list[Row]]
on_updates: RuleRegistry[OnUpdates] = RuleRegistry("attack on updates", __name__)
on_rows: RuleRegistry[OnRows] = RuleRegistry("attack on rows", __name__)


@dataclass(frozen=True)
class Attack:
    """What attackers do: the attacks on rows before they train, then those on updates, one after the other.

    Args:
        entries: attacks by name, or with their settings.
    """

    entries: tuple[Rule, ...] = ()

    def __post_init__(self) -> None:
        known = [*on_rows, *on_updates]
        for entry in self.entries:
            if named(entry) not in known:
                raise ConfigError(
                    f"no attack {named(entry)!r}; {nearest(named(entry), known)}known: {', '.join(known)}",
                    code="unknown_name",
                )
            asked(_registry(entry), entry)

    @classmethod
    def read(cls, text: str) -> "Attack":
        """Read attacks as `named_rules` does; `none` and `absent` are no attack.

        Raises:
            ConfigError: an unknown attack or setting.
        """
        return cls(() if text in (NONE, ABSENT) else named_rules(text))

    def poisoned(self, rows: list[Row], labels: Sequence[str], random: Random) -> list[Row]:
        """What an attacker's site trains on in place of `rows`."""
        for entry in self._of(on_rows):
            rows = asked(on_rows, entry)(rows, labels, random)
        return rows

    def tampered(self, known: Known) -> list[AdapterUpdate]:
        """What the attackers send in place of `known.own`."""
        for entry in self._of(on_updates):
            known = replace(known, own=asked(on_updates, entry)(known))
        return [*known.own]

    @property
    def changes_rows(self) -> bool:
        """Whether attackers train on other rows."""
        return any(self._of(on_rows))

    @property
    def lies(self) -> bool:
        """Whether attackers report false numbers."""
        return any(named(entry) == "lies" for entry in self.entries)

    def _of(self, registry: RuleRegistry[Any]) -> Iterator[Rule]:
        return (entry for entry in self.entries if _registry(entry) is registry)


NONE, ABSENT = "none", "absent"  # all sites are honest, or those that would attack send nothing


def _registry(entry: Rule) -> RuleRegistry[Any]:
    return on_rows if named(entry) in [*on_rows] else on_updates


def named_rules(text: str) -> tuple[Rule, ...]:
    """Read rules as a user types them: `a`, `a + b`, or with settings as JSON, `[{"rule": "a", "most": 2}, "b"]`.

    Raises:
        ConfigError: `wrong_rules`: it is neither.
    """
    if not text.lstrip().startswith(("[", "{")):
        return tuple(part.strip() for part in text.split("+") if part.strip())
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    found = [found] if isinstance(found, dict) else found
    if not isinstance(found, list) or not all(isinstance(each, str | Mapping) for each in found):
        raise ConfigError(
            'write rules as NAME, as NAME + NAME, or with settings as JSON: [{"rule": "NAME", "SETTING": 1}]',
            repr(text),
            code="wrong_rules",
        )
    return tuple(found)


def everything() -> list[str]:
    """Name every attack there is, by itself."""
    return [*on_rows, *on_updates]
