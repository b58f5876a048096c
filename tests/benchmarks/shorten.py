"""Shortening by QR and a small SVD against the SVD of the dense ΔW, at the layer shapes of an 8B Llama.

    python tests/benchmarks/shorten.py

The two are measured in turns, so that a busy machine slows both; the figures are medians.
"""

import statistics
import time
from collections.abc import Callable

import torch
import typer
from rich.console import Console
from rich.table import Table

from nvflare_fm.adapter import LoraPair
from nvflare_fm.lora import shorten

SHAPES = {"attention q, o": (4096, 4096), "mlp gate, up": (14336, 4096)}  # fan_out, fan_in


def dense(pair: LoraPair, rank: int) -> LoraPair:
    """What `shorten` does, by way of the dense ΔW."""
    u, values, vt = torch.linalg.svd(pair.delta(), full_matrices=False)
    return LoraPair(vt[:rank], u[:, :rank] * values[:rank])


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def main(rank_sum: int = 64, rank: int = 16, repeats: int = 3) -> None:
    """`rank_sum` is that of all sites, `rank` that of the global adapter."""
    columns = ("layer", "shape", "rank sum → rank", "QR path [s]", "dense SVD [s]", "ratio", "difference of ΔW")
    table = Table(*columns, title=f"medians of {repeats}, in turns, {torch.get_num_threads()} threads, float32")
    for name, (fan_out, fan_in) in SHAPES.items():
        generator = torch.Generator().manual_seed(0)
        a = torch.randn(rank_sum, fan_in, generator=generator)
        b = torch.randn(fan_out, rank_sum, generator=generator) * 0.9 ** torch.arange(rank_sum)
        pair = LoraPair(a, b)
        times = [(seconds(lambda: shorten(pair, rank)), seconds(lambda: dense(pair, rank))) for _ in range(repeats)]  # noqa: B023
        short, long = (statistics.median(column) for column in zip(*times, strict=True))
        one, other = shorten(pair, rank)[0].delta(), dense(pair, rank).delta()
        off = float((one - other).norm() / other.norm())
        shape = f"{fan_out}×{fan_in}"
        table.add_row(
            name, shape, f"{rank_sum} → {rank}", f"{short:.3f}", f"{long:.1f}", f"{long / short:.0f}", f"{off:.0e}"
        )
    Console(width=140).print(table)


if __name__ == "__main__":
    typer.run(main)
