"""Server steps: the global adapter moves along the mean of the sites' changes, with or without memory of past ones.

After Adaptive Federated Optimization (arXiv:2003.00295), carried over to products: a step acts on ΔW, never on the
factors. Second moments are entry by entry for dense tensors, and one number for each layer's product, as in NovoGrad
(arXiv:1905.11286), because the entries of ΔW are never formed.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...adapter import Adapter, LoraPair
from ...algebra.inner import energy
from ...algebra.lora import shorten, stack, zero
from ...config import Rule
from ..asked import RuleRegistry, asked
from ..cohort import Cohort
from ..merge import MergeRule


@dataclass(frozen=True)
class Memory:
    """What a server step remembers from round to round."""

    change: Adapter = field(default_factory=Adapter)  # m
    square: Mapping[str, Tensor] = field(default_factory=dict)  # v, by layer or name of a dense tensor

    def __bool__(self) -> bool:
        return bool(self.change or self.square)


@dataclass(frozen=True)
class Step:
    """A server step: m ← keep·m + add·d;  v ← square(v, d²);  x ← x + gain(v)·m, where d is the round's mean change.

    A step without a second moment has no `square`, and its `gain` gets None.
    """

    gain: Callable[[Tensor | None], Tensor | float]
    keep: float = 0.0
    add: float = 1.0
    square: Callable[[Tensor, Tensor], Tensor] | None = None
    first: float = 0.0  # v before the first round

    @property
    def size(self) -> float | None:
        """η, or nothing where a second moment sets it layer by layer."""
        return None if self.square else float(self.gain(None))

    @property
    def plain(self) -> bool:
        """x + d: what the merge rule gave is the result."""
        return not self.keep and self.size == 1.0


Factory = Callable[..., Step]
registry: RuleRegistry[Factory] = RuleRegistry("server step", __name__)


def choose(entry: Rule, cohort: Cohort, weights: Sequence[float]) -> Step:
    """Build the server step that a job asks for, for one round.

    Args:
        entry: the step by name, or with its settings.
        cohort: the updates of the round.
        weights: of the sites, in the cohort's order.

    Raises:
        ConfigError: an unknown step or setting.
    """
    return asked(registry, entry)(cohort, weights)


def usual(learns_text: bool, rule: MergeRule | None) -> str:
    """The step of a job that names none: a longer one where text is written, because the mean change of sites of mixed
    rank is too short there (docs/log.md), and the rule adds changes.

    Args:
        learns_text: whether the task is about writing text.
        rule: the merge rule; none where the adapters have no factors.
    """
    return "fedexp" if learns_text and rule and rule.delta and rule.canonical else "plain"


class Mover:
    """Moves every layer and dense tensor of one round by the same step, and remembers for the next round."""

    def __init__(self, step: Step, past: Memory, rank: int) -> None:
        self.step, self.past, self.rank = step, past, rank
        self._changes: dict[str, LoraPair] = {}
        self._tensors: dict[str, Tensor] = {}
        self._squares: dict[str, Tensor] = {}

    def pair(self, layer: str, start: LoraPair, merged: LoraPair) -> LoraPair:
        """`start` moved towards `merged`. What is remembered is cut to twice the global rank."""
        if self.step.plain:
            return merged
        change = stack([merged, start], [1.0, -1.0])
        gain = self._gain(layer, torch.tensor(energy(change)) / (change.shape[0] * change.shape[1]))
        past = self.past.change.lora.get(layer, zero(*start.shape))
        moved = stack([past, change], [self.step.keep, self.step.add])
        if self.step.keep:
            moved = self._changes[layer] = shorten(moved, 2 * self.rank)[0]
        return stack([start, moved], [1.0, float(gain)])

    def tensor(self, name: str, start: Tensor, merged: Tensor) -> Tensor:
        if self.step.plain:
            return merged
        change = merged - start
        moved = self.step.add * change + self.step.keep * self.past.change.dense.get(name, torch.zeros(()))
        if self.step.keep:
            self._tensors[name] = moved
        return start + self._gain(name, change.square()) * moved

    def memory(self) -> Memory:
        return Memory(Adapter(self._changes, self._tensors), self._squares)

    def _gain(self, name: str, squared: Tensor) -> Tensor | float:
        if not self.step.square:
            return self.step.gain(None)
        v = self.step.square(self.past.square.get(name, torch.tensor(self.step.first)), squared)
        self._squares[name] = v
        return self.step.gain(v)
