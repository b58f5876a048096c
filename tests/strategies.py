"""Small strange adapters: layers down to 1×1, ranks wider than the layer, rank 0, mixed scales, sites that agree.

Shapes come from Hypothesis, values from a seed it draws, so a failing example is small and can be repeated.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from hypothesis import strategies as st
from torch import Tensor

from nvflare_fm.adapter import Adapter, AdapterUpdate, LoraPair, Manifest, Report
from nvflare_fm.algebra.lora import shorten, tail
from nvflare_fm.config import Rest

DOUBLE, SINGLE = torch.float64, torch.float32
TOLERANCE = {DOUBLE: 1e-10, SINGLE: 1e-5}  # relative, against the dense computation in float64
MANIFEST = Manifest(base="base-1", task="causal_lm", peft="lora")

sides = st.integers(1, 7)
ranks = st.integers(0, 6)
scales = st.sampled_from([0.25, 1.0, 2.0, 4.0, 16 / 12**0.5])
kinds = st.sampled_from(["full", "full", "fresh", "repeated", "faint"])
precisions = st.sampled_from([DOUBLE, SINGLE])


@st.composite
def pairs(draw: st.DrawFn, shape: tuple[int, int] | None = None, rank: int | None = None) -> LoraPair:
    """A pair in float64 whose values are exact in float32, so that both precisions start from the same numbers."""
    fan_out, fan_in = shape or (draw(sides), draw(sides))
    size = draw(ranks) if rank is None else rank
    seed, kind, scale = draw(st.integers(0, 2**32)), draw(kinds), draw(scales)
    return make_pair(fan_out, fan_in, size, seed, kind, scale)


def make_pair(fan_out: int, fan_in: int, rank: int, seed: int, kind: str = "full", scale: float = 1.0) -> LoraPair:
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(rank, fan_in, generator=generator), torch.randn(fan_out, rank, generator=generator)
    if kind == "fresh":
        b = torch.zeros_like(b)
    if kind == "repeated":
        a = a[:1].expand(rank, fan_in).clone()
    if kind == "faint":
        b = b * 2.0**-12
    return LoraPair(a.double(), b.double(), scale)


@dataclass(frozen=True)
class Layer:
    """One layer in one round: the global pair, what each site trained from it, and what the sites count."""

    start: LoraPair
    pairs: list[LoraPair]
    weights: list[float]

    def to(self, dtype: torch.dtype) -> "Layer":
        return Layer(self.start.to(dtype), [p.to(dtype) for p in self.pairs], self.weights)

    def wholes(self, rest: Rest) -> list[Tensor]:
        """Each site's whole adapter, dense: what it trained and what rode along frozen."""
        beside = {
            "none": lambda _: 0,
            "tail": lambda p: tail(self.start, p.rank).delta(),
            "all": lambda _: self.start.delta(),
        }
        return [p.delta() + beside[rest](p) for p in self.pairs]

    def size(self) -> float:
        """What rounding errors are measured against: the sum of the norms of all that is added up."""
        return float(sum(p.delta().norm() for p in [self.start, *self.pairs])) or 1.0


@st.composite
def weights(draw: st.DrawFn, count: int) -> list[float]:
    parts = draw(st.lists(st.integers(0, 9), min_size=count, max_size=count).filter(any))
    return [p / sum(parts) for p in parts]


@st.composite
def layers(draw: st.DrawFn, mixed_ranks: bool = True, frozen: str = "") -> Layer:
    """`frozen`: the factor that no site trained, so that all have the global adapter's, at one scale."""
    shape = draw(sides), draw(sides)
    count = draw(st.integers(1, 5))
    rank = draw(ranks)
    of_site = draw(st.lists(ranks, min_size=count, max_size=count)) if mixed_ranks else [rank] * count
    global_rank = draw(ranks) if mixed_ranks else draw(st.sampled_from([0, rank]))
    start, trained = draw(pairs(shape, global_rank)), [draw(pairs(shape, r)) for r in of_site]
    if frozen:
        kept = start if start.rank else trained[0]
        trained = [replace(p, scale=kept.scale, **{frozen: getattr(kept, frozen)}) for p in trained]
    return Layer(start, trained, draw(weights(count)))


def canonical(pair: LoraPair) -> LoraPair:
    return shorten(pair, pair.rank)[0]


def update(site: str, adapter: Adapter, examples: int = 10, manifest: Manifest = MANIFEST) -> AdapterUpdate:
    return AdapterUpdate(site, adapter, manifest, Report(examples=examples))


@st.composite
def cohorts(draw: st.DrawFn, mixed_ranks: bool = True) -> list[AdapterUpdate]:
    """A first round: sites with the same layers and head, at their own ranks, scales and numbers of examples."""
    shapes = draw(st.lists(st.tuples(sides, sides), min_size=1, max_size=3))
    count, rank = draw(st.integers(1, 4)), draw(ranks)
    updates = []
    for site in range(count):
        own = draw(ranks) if mixed_ranks else rank
        lora = {f"layer{i}": draw(pairs(s, own)).to(SINGLE) for i, s in enumerate(shapes)}
        dense = {"head.weight": torch.full((2, 3), float(site))}
        updates.append(update(f"site-{site}", Adapter(lora, dense), draw(st.integers(1, 99))))
    return updates


def close(actual: Tensor, expected: Tensor, tolerance: float, size: float | None = None) -> None:
    """Asserts ‖actual − expected‖ ≤ tolerance · size, in float64; size is ‖expected‖ unless given."""
    assert actual.shape == expected.shape
    error = float((actual.double() - expected.double()).norm())
    bound = tolerance * (float(expected.double().norm()) if size is None else size)
    assert error <= bound, f"off by {error:.2e}, {bound:.2e} allowed"


def rotated(pair: LoraPair, seed: int) -> LoraPair:
    """The same ΔW with B and A turned inside the rank."""
    generator = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(pair.rank, pair.rank, generator=generator, dtype=pair.A.dtype))[0]
    return LoraPair(turn @ pair.A, pair.B @ turn.T, pair.scale)


def identical(one: Adapter, other: Adapter) -> bool:
    """Bit for bit."""
    ours, theirs = one.tensors(), other.tensors()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


def dense_mean(deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    return sum((w * d for w, d in zip(weights, deltas, strict=True)), torch.zeros_like(deltas[0]))
