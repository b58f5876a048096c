"""Does `exact` reproduce Σ wₖΔWₖ, and is what shortening leaves the best there is at that rank? Against dense float64.

    python tests/benchmarks/exactness.py ADAPTER_FOLDER ADAPTER_FOLDER …   adapters that sites trained, as PEFT folders
    python tests/benchmarks/exactness.py                                   generated ones: ranks 4, 8 and 16, α = 16

Two rounds are looked at: the first, from nothing, and a later one, from the global adapter that the first one gave,
with the frozen directions beside the trained ones. Ends with 1 when a limit is broken.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import typer
from rich.console import Console
from rich.table import Table

from nvflare_fm.adapter import Adapter, LoraPair
from nvflare_fm.aggregation import merge
from nvflare_fm.aggregation.admit import shared_shapes
from nvflare_fm.algebra.lora import shorten, tail, zero
from nvflare_fm.export.folder import read_adapter

BEFORE, AFTER = 1e-6, 1e-5  # relative to ‖Σ wₖΔWₖ‖
EXACT = merge.registry["exact"].merge


@dataclass(frozen=True)
class Error:
    """Of one layer in one round, relative to the dense result."""

    before: float  # of the merged pair, not yet shortened
    after: float  # of the shortened pair, beyond the best possible at its rank (Eckart-Young)
    lost: float  # what that best possible loses itself


def generated() -> list[Adapter]:
    """Three sites whose singular values fall as those of trained adapters do, on the shapes of a small encoder."""
    generator = torch.Generator().manual_seed(0)
    layers = {"query": (384, 384), "intermediate": (1536, 384), "output": (384, 1536)}

    def pair(fan_out: int, fan_in: int, rank: int) -> LoraPair:
        falling = 0.7 ** torch.arange(rank)
        b = 0.02 * torch.randn(fan_out, rank, generator=generator) * falling
        return LoraPair(torch.randn(rank, fan_in, generator=generator) / fan_in**0.5, b, 16 / rank)

    return [Adapter({name: pair(*shape, rank) for name, shape in layers.items()}) for rank in (4, 8, 16)]


def whole(start: LoraPair, pair: LoraPair) -> torch.Tensor:
    wide, rest = pair.to(torch.float64), tail(start, pair.rank).to(torch.float64)
    return wide.delta() + rest.delta()


def measure(start: LoraPair, pairs: Sequence[LoraPair], weights: Sequence[float], rank: int) -> tuple[LoraPair, Error]:
    wholes = zip(weights, (whole(start, p) for p in pairs), strict=True)
    expected = sum((w * d for w, d in wholes), torch.zeros(start.shape, dtype=torch.float64))
    merged = EXACT(start, pairs, weights)
    short, _ = shorten(merged, rank)
    norm, best = expected.norm(), torch.linalg.svdvals(expected)[rank:].norm()
    off, off_short = ((p.to(torch.float64).delta() - expected).norm() for p in (merged, short))
    return short, Error(*(float(e / norm) for e in (off, off_short - best, best)))


def main(folders: list[Path] = typer.Argument(default=None), max_rank: int = 0) -> None:  # noqa: B008  typer's way
    adapters = [read_adapter(f).adapter for f in folders] if folders else generated()
    if len({frozenset(shared_shapes(a).items()) for a in adapters}) > 1:
        raise typer.BadParameter("the adapters must be of the same layers and shapes; their ranks may differ")
    parts = [float(site + 1) for site in range(len(adapters))]  # unequal on purpose
    weights = [p / sum(parts) for p in parts]
    rounds: dict[str, list[Error]] = {"first": [], "later": []}
    for layer in adapters[0].lora:
        pairs = [a.lora[layer].to(torch.float32) for a in adapters]
        rank = max_rank or max(p.rank for p in pairs)
        state, error = measure(zero(*pairs[0].shape), pairs, weights, rank)
        rounds["first"].append(error)
        rounds["later"].append(measure(state, pairs, weights, rank)[1])
    about = sorted({(p.rank, round(p.scale, 4)) for a in adapters for p in a.lora.values()})
    table = Table("round", "layers", f"before (≤ {BEFORE:g})", f"after, beyond the best (≤ {AFTER:g})", "best loses")
    table.title = (
        f"{len(adapters)} {'trained' if folders else 'generated'} adapters, (rank, scale): {about}; worst layer"
    )
    for name, errors in rounds.items():
        worst = [max(getattr(e, field) for e in errors) for field in ("before", "after", "lost")]
        table.add_row(name, str(len(errors)), *(f"{w:.1e}" for w in worst))
    Console(width=120).print(table)
    if any(e.before > BEFORE or e.after > AFTER for errors in rounds.values() for e in errors):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
