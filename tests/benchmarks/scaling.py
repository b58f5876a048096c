"""How the server scales: one round with `exact` over 2 to 256 sites, at the layers of an 8B Llama.

    python tests/benchmarks/scaling.py run       # each number of sites in a fresh process; nothing is run twice
    python tests/benchmarks/scaling.py report    # tables and a figure

A second round: a global adapter G of rank 16 on all linear layers (41.9 M parameters, float32), from which every site
trained at rank 16. All adapters lie on disk and are read layer by layer, G too. 256 files would take 40 GiB, so sites
share 16: site k reads one of them as if it were its own, copied at each access, with the second half of its directions
shifted by k along the layer's inputs, so that no two sites' changes are alike and the stack has the rank it seems to
have. What only one site holds makes a flat tail, which is the hardest to shorten.

Memory is anonymous memory (RssAnon, sampled every 2 ms) beyond what the process held before the round; pages of mapped
files do not count. The limit is two adapters and the largest layer of all sites. Beyond 32 sites only some of the
transformer blocks are merged, and the table carries them on to all 32: time in proportion, and to the peak what the
other blocks would add to the new adapter. Besides: the Gram matrix of
`agreement` over a few transformer blocks, and shortening as the server does it against the SVD of the dense ΔW.
"""

import json
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from nvflare_fm.adapter import (
    LORA_A,
    LORA_B,
    Adapter,
    AdapterUpdate,
    Description,
    Lazy,
    LoraPair,
    Manifest,
    Report,
    from_tensors,
)
from nvflare_fm.aggregation.cohort import Cohort
from nvflare_fm.aggregation.combine import combine
from nvflare_fm.algebra.lora import shorten, zero
from nvflare_fm.config import Aggregation

app = typer.Typer(add_completion=False)
console = Console(width=150)
RUNS = Path("runs/scaling")
RANK, BLOCKS, FILES = 16, 32, 16
SOME, GRAM_BLOCKS = 4, 2  # of the blocks, where all would take too long
RANK_SUM, REPEATS = 64, 3  # of what is shortened in both ways
SITES = (2, 4, 8, 16, 32, 64, 128, 256)
MODULES = {  # fan_out, fan_in
    "self_attn.q_proj": (4096, 4096),
    "self_attn.k_proj": (1024, 4096),
    "self_attn.v_proj": (1024, 4096),
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (14336, 4096),
    "mlp.up_proj": (14336, 4096),
    "mlp.down_proj": (4096, 14336),
}
DENSE = {"attention q, o": (4096, 4096), "MLP gate, up": (14336, 4096)}
MIB = 2**20
MANIFEST = Manifest("llama-3-8b", "causal_lm", "lora")


def layers(blocks: int = BLOCKS) -> dict[str, tuple[int, int]]:
    return {f"model.layers.{i}.{name}": shape for i in range(blocks) for name, shape in MODULES.items()}


def adapter_bytes() -> int:
    return 4 * RANK * sum(fan_out + fan_in for fan_out, fan_in in layers().values())


def limit_mib(sites: int) -> float:
    """Two adapters and one layer of all sites, from the shapes alone."""
    return (2 * adapter_bytes() + sites * 4 * RANK * max(map(sum, MODULES.values()))) / MIB


def write(folder: Path, blocks: int = BLOCKS) -> None:
    """G, whose singular values fall, and FILES adapters trained from it: every factor moved by 0.3 of its length."""
    falling = 0.8 ** torch.arange(RANK)
    for number in range(-1, FILES):
        tensors: dict[str, Tensor] = {}
        for place, (layer, (fan_out, fan_in)) in enumerate(layers(blocks).items()):
            for name, side, seed in ((LORA_A, fan_in, 2 * place), (LORA_B, fan_out, 2 * place + 1)):
                start = _randn(RANK, side, seed)
                moved = start if number < 0 else start + 0.3 * _randn(RANK, side, 1000 * (number + 1) + seed)
                tensors[layer + name] = moved if name == LORA_A else (moved * falling[:, None]).T.contiguous()
        save_file(tensors, folder / f"{number}.safetensors")


def _randn(rank: int, side: int, seed: int) -> Tensor:
    return torch.randn(rank, side, generator=torch.Generator().manual_seed(seed)) / side**0.5


def opened(folder: Path, number: int, shift: int = 0, blocks: int = BLOCKS) -> Adapter:
    """An adapter that is read from its file: G in the file's mapping, as the server has it; others a copy each time."""
    file = safe_open(folder / f"{number}.safetensors", "pt")

    def read(name: str) -> Tensor:
        tensor: Tensor = file.get_tensor(name)
        if number < 0:
            return tensor
        tensor = tensor.clone()
        if shift and name.endswith(LORA_A):
            tensor[RANK // 2 :] = tensor[RANK // 2 :].roll(shift, dims=1)
        return tensor

    names = [layer + half for layer in layers(blocks) for half in (LORA_A, LORA_B)]
    described = {name: Description(tuple(file.get_slice(name).get_shape()), torch.float32) for name in names}
    return from_tensors(Lazy(names, read), dict.fromkeys(layers(blocks), 1.0), str(number), described)


def updates(folder: Path, sites: int, blocks: int = BLOCKS) -> list[AdapterUpdate]:
    return [
        AdapterUpdate(f"site-{k:03}", opened(folder, k % FILES, k + 1, blocks), MANIFEST, Report(examples=100 + k))
        for k in range(sites)
    ]


def anonymous_mib() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) / 1024


@contextmanager
def watched() -> Iterator[dict[str, float]]:
    """Seconds of the clock and of the processor, and the highest anonymous memory beyond what there was before."""
    found, over, before = {"peak_mib": 0.0}, threading.Event(), anonymous_mib()

    def look() -> None:
        while not over.wait(0.002):
            found["peak_mib"] = max(found["peak_mib"], anonymous_mib() - before)

    watcher = threading.Thread(target=look)
    watcher.start()
    began, worked = time.perf_counter(), time.process_time()
    try:
        yield found
    finally:
        found |= {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - worked}
        over.set()
        watcher.join()


def merged(folder: Path, sites: int, blocks: int) -> dict[str, float]:
    """One round over the first `blocks` of 32 transformer blocks. A small layer goes first: what the libraries load at
    their first call is not counted.
    """
    shorten(LoraPair(torch.randn(300, 32), torch.randn(32, 300)), 4)
    with watched() as found:
        start, sent = opened(folder, -1, 0, blocks), updates(folder, sites, blocks)
        result = combine(start, MANIFEST, sent, Aggregation(step="plain"), RANK)
    assert len(result.weights) == sites
    found["lost"] = statistics.mean(result.energy_lost.values())
    return found


def agreement(folder: Path, sites: int, blocks: int) -> dict[str, float]:
    """The Gram matrix of what the sites changed, over the first `blocks` of 32 transformer blocks."""
    cohort = Cohort(updates(folder, sites, blocks), opened(folder, -1, 0, blocks), "tail")
    with watched() as found:
        assert (cohort.products.diagonal() > 0).all()
    return found


def dense(pair: LoraPair, rank: int) -> LoraPair:
    """What `shorten` does, by way of the dense ΔW."""
    u, values, vt = torch.linalg.svd(pair.delta(), full_matrices=False)
    return LoraPair(vt[:rank], u[:, :rank] * values[:rank])


def timed(work: Callable[[], LoraPair]) -> tuple[float, Tensor]:
    began = time.process_time()
    pair = work()
    return time.process_time() - began, pair.delta()


def against_dense(layer: str, rank_sum: int) -> dict[str, Any]:
    """Medians of the two ways in turns, processor seconds, and how far their ΔW are apart."""
    (fan_out, fan_in), generator = DENSE[layer], torch.Generator().manual_seed(0)
    a = torch.randn(rank_sum, fan_in, generator=generator)
    pair = LoraPair(a, torch.randn(fan_out, rank_sum, generator=generator) * 0.9 ** torch.arange(rank_sum))
    short, long, one, other = [], [], zero(fan_out, fan_in).delta(), zero(fan_out, fan_in).delta()
    for _ in range(REPEATS):
        for times, work in ((short, lambda: shorten(pair, RANK)[0]), (long, lambda: dense(pair, RANK))):
            seconds, delta = timed(work)
            times.append(seconds)
            one, other = other, delta
    off = float((one - other).norm() / other.norm())
    return {"short": statistics.median(short), "dense": statistics.median(long), "off": off, "rank_sum": rank_sum}


@app.command()
def part(what: str, which: str, folder: Path, number: int) -> None:
    """One measurement in this very process; `run` starts it."""
    torch.set_num_threads(1)
    if what == "merge":
        found = merged(folder, int(which), number)
    elif what == "agreement":
        found = agreement(folder, int(which), number)
    else:
        found = against_dense(which, number)
    print(json.dumps({"what": what, "which": which, "number": number, **found}))


@app.command()
def run(whole_up_to: int = 32) -> None:
    """Measures what the results file lacks. Beyond `whole_up_to` sites, over some of 32 transformer blocks alone.
    The adapters' files (2.7 GiB) are removed at the end.
    """
    sites = [str(k) for k in SITES]
    asked = [("merge", k, BLOCKS if int(k) <= whole_up_to else SOME) for k in sites]
    asked += [("dense", layer, RANK_SUM) for layer in DENSE] + [("agreement", k, GRAM_BLOCKS) for k in sites]
    done = {(row["what"], row["which"], row["number"]) for row in rows()}
    folder = RUNS / "adapters"
    folder.mkdir(parents=True, exist_ok=True)
    bar = Progress(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=console)
    with bar, (RUNS / "rows.jsonl").open("a") as results:
        task = bar.add_task("writing adapters")
        write(folder)
        for what, which, number in filter(lambda one: one not in done, asked):
            bar.update(task, description=f"{what} {which}")
            command = [sys.executable, __file__, "part", what, which, str(folder), str(number)]
            line = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1]
            results.write(line + "\n")
            results.flush()
            bar.console.print(line)
    shutil.rmtree(folder)
    report()


def rows() -> list[dict[str, Any]]:
    file = RUNS / "rows.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def whole(row: dict[str, Any]) -> dict[str, Any]:
    """A round over some of the blocks, carried on to all of them: their time, and room for what they would add to the
    new adapter.
    """
    missing = (BLOCKS - row["number"]) / row["number"]
    times = {key: row[key] * (1 + missing) for key in ("seconds", "cpu_seconds")}
    return row | times | {"peak_mib": row["peak_mib"] + adapter_bytes() / MIB * (1 - row["number"] / BLOCKS)}


@app.command()
def report(figure: Path = RUNS / "scaling.svg") -> None:
    """The tables and the figure. Ends with 1 when a limit is broken."""
    found = rows()
    merges = {int(r["which"]): whole(r) for r in found if r["what"] == "merge"}
    grams = {int(r["which"]): r for r in found if r["what"] == "agreement"}
    heads = ("sites", "rank sum", "blocks", "round, CPU s", "by the clock", "peak MiB", "limit MiB", "energy lost")
    table = Table(*heads, "Gram, CPU s a block", "Gram, peak MiB", title="one round with `exact`, one thread")
    for k, row in sorted(merges.items()):
        cells = [f"{row[key]:.0f}" for key in ("number", "cpu_seconds", "seconds", "peak_mib")]
        cells += [f"{limit_mib(k):.0f}", f"{row['lost']:.1e}"]
        gram = grams.get(k)
        if gram:
            cells += [f"{gram['cpu_seconds'] / gram['number']:.2f}", f"{gram['peak_mib']:.0f}"]
        table.add_row(str(k), str((k + 1) * RANK), *cells)
    console.print(table)
    table = Table("layer", "rank sum → rank", "server's path [s]", "dense SVD [s]", "ratio", "difference of ΔW")
    for r in (r for r in found if r["what"] == "dense"):
        cells = [f"{r['short']:.3f}", f"{r['dense']:.1f}", f"{r['dense'] / r['short']:.0f}", f"{r['off']:.0e}"]
        table.add_row(f"{r['which']} {DENSE[r['which']]}", f"{r['rank_sum']} → {RANK}", *cells)
    console.print(table)
    draw(merges, figure)
    too_large = [k for k, r in merges.items() if r["peak_mib"] > limit_mib(k)]
    too_slow = [r["which"] for r in found if r["what"] == "dense" and r["dense"] < 50 * r["short"]]
    if too_large or too_slow:
        console.print(f"limits broken: memory at {too_large} sites, ratio at {too_slow}")
        raise typer.Exit(1)


def draw(merges: dict[int, dict[str, Any]], file: Path) -> None:
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4))
    sites = sorted(merges)
    left.loglog(sites, [merges[k]["cpu_seconds"] for k in sites], marker="o")
    left.set(xlabel="sites", ylabel="CPU seconds", title="one round, one thread")
    right.plot(sites, [merges[k]["peak_mib"] for k in sites], marker="o", label="peak")
    right.plot(sites, [limit_mib(k) for k in sites], "--", label="two adapters + one layer of all sites")
    carried = [k for k in sites if merges[k]["number"] < BLOCKS]
    for axis, key in ((left, "cpu_seconds"), (right, "peak_mib")) if carried else ():
        there = [merges[k][key] for k in carried]
        axis.plot(carried, there, "o", color="C0", markerfacecolor="white", label="carried on from some blocks")
    right.set(xlabel="sites", ylabel="MiB", title="memory", ylim=(0, None))
    right.set_xscale("log", base=2)
    right.legend(fontsize=8, loc="upper left")
    figure.tight_layout()
    figure.savefig(file)
    console.print(f"figure: {file}")


if __name__ == "__main__":
    app()
