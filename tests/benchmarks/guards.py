"""What guards and `agreement` cost beside the merge: seconds and peak memory at 8 to 256 sites of an 8B Llama.

    python tests/benchmarks/guards.py            # 8 and 32 sites; --sites 128 --sites 256 for more

Sites, layers and files are those of scaling.py: LoRA at rank 16 on all linear layers, in float32, read from disk layer
by layer. It measures one of 32 transformer blocks (two up to 32 sites), and carries time on to all 32. Each number of
sites runs in a fresh process with one thread: first the merge alone (`exact`, no guard, plain step), then the one pass
over the updates that guards, `agreement` and FedExP share, and then each guard on what that pass found. Those take no
longer for larger layers.

Seconds are the processor's. Memory is anonymous memory beyond what the process held before.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import scaling
import torch
import typer
from rich.console import Console
from rich.table import Table

from nvflare_fm.adapter import LoraPair
from nvflare_fm.aggregation import guard, weigh
from nvflare_fm.aggregation.cohort import Cohort
from nvflare_fm.aggregation.combine import combine
from nvflare_fm.algebra.lora import shorten
from nvflare_fm.config import Aggregation

app = typer.Typer(add_completion=False)
RULES = [{"rule": name, "mix": "nnm"} for name in ("geometric_median", "centered_clip", "multi_krum")]


@app.command(hidden=True)
def part(folder: Path, sites: int, blocks: int) -> None:
    """One number of sites in this very process."""
    torch.set_num_threads(1)
    start, sent = scaling.opened(folder, -1, 0, blocks), scaling.updates(folder, sites, blocks)
    shorten(LoraPair(torch.randn(300, 32), torch.randn(32, 300)), 4)  # what the libraries load at their first call
    found: dict[str, float] = {"sites": sites, "blocks": blocks}
    with scaling.watched() as merge:
        combine(start, scaling.MANIFEST, sent, Aggregation(step="plain", guard=()), scaling.RANK)
    cohort = Cohort(sent, start, "tail", ("moved", "norms", "products", "dense"))
    with scaling.watched() as one_pass:
        assert (cohort.products.diagonal() > 0).all()
    with scaling.watched() as judged:
        for rule in RULES:
            guard.judge([rule], cohort)
    with scaling.watched() as agreement:
        weigh.weigh(["agreement"], cohort)
    for name, each in {"merge": merge, "pass": one_pass, "guards": judged, "agreement": agreement}.items():
        found |= {f"{name}_s": each["cpu_seconds"], f"{name}_mib": each["peak_mib"]}
    print(json.dumps(found))


@app.command()
def run(sites: Annotated[list[int], typer.Option(help="how many")] = [8, 32]) -> None:  # noqa: B006
    """Measure, and end with 1 where the pass takes longer than the merge at up to 32 sites."""
    heads = ("sites", "blocks", "merge, CPU s", "one pass", "pass / merge", "three guards", "agreement")
    table = Table(*heads, "merge, peak MiB", "pass, peak MiB", title="all 32 blocks, one thread")
    slow = []
    with tempfile.TemporaryDirectory() as made:
        scaling.write(Path(made), 2)
        for count in sites:
            blocks = 2 if count <= 32 else 1
            command = [sys.executable, __file__, "part", made, str(count), str(blocks)]
            row = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
            all_of_it = scaling.BLOCKS / blocks
            ratio = row["pass_s"] / row["merge_s"]
            slow += [count] if count <= 32 and ratio > 1 else []
            cells = [f"{row['merge_s'] * all_of_it:.1f}", f"{row['pass_s'] * all_of_it:.1f}", f"{ratio:.2f}"]
            cells += [f"{row['guards_s']:.2f}", f"{row['agreement_s']:.3f}"]
            cells += [f"{row['merge_mib']:.0f}", f"{row['pass_mib']:.0f}"]
            table.add_row(str(count), str(blocks), *cells)
    Console(width=150).print(table)
    if slow:
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
