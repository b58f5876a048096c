"""How honest sites' changes lie in real federations, and what a guard makes of attacks on them.

    python tests/benchmarks/real_changes.py banking77-0.1 banking77-0 medquad-types banking77lm-0.1 --sites 5

Each data set is trained on once, by honest sites alone; the inner products of every round's changes are kept. All else
follows from them: an attack that sends a multiple of its own change, or of the honest mean, has the inner products that
linear algebra says, and a guard reads nothing else. In turn each site attacks (of ten sites, eight draws of two).

Each cell has the attackers' share of the result, the share of honest sites that are left out, and the progress: how far
the result goes along the honest mean, in multiples of it, of products or dense tensors, whichever is worse. 1: as far
as without attackers; below 0: backwards. An attack changes one round here, and nothing that follows.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor

from nvflare_fm.adapter import Adapter, AdapterUpdate, Manifest, Report, RoundTask
from nvflare_fm.aggregation import guard
from nvflare_fm.aggregation.cohort import Cohort, measure
from nvflare_fm.compare import robustness
from nvflare_fm.compare.attacks.together import farthest
from nvflare_fm.compare.bench import Bench
from nvflare_fm.compare.study import Study, Workspace, study
from nvflare_fm.config import Rule
from nvflare_fm.simulate import federate

ROUNDS, STEPS = 12, 5  # as in the robustness study
GUARDS: dict[str, list[Rule]] = {
    "none": [],
    "geometric median": [{"rule": "geometric_median", "near": 1.5}],
    "with nnm, nobody spared": [{"rule": "geometric_median", "mix": "nnm"}],
    **{f"with nnm, near = {n}": [{"rule": "geometric_median", "mix": "nnm", "near": n}] for n in (1.3, 1.5, 2.0)},
}
Grams = list[tuple[Tensor, Tensor]]  # of each round: inner products of products, and of dense tensors
Sent = Callable[[Tensor, Tensor, float], Tensor]  # own change, honest mean, honest sites per attacker → what is sent
ATTACKS: dict[str, tuple[Sent, Sent] | None] = {  # of products, and of dense tensors, as weights of the honest changes
    "none": None,
    "flip": (lambda own, mean, k: -own,) * 2,
    "sign_flip": (lambda own, mean, k: -5 * own,) * 2,
    "head_only": (lambda own, mean, k: own, lambda own, mean, k: -10 * own),
    "scale": (lambda own, mean, k: 10 * own,) * 2,
    "ipm": (lambda own, mean, k: -1.1 * k * mean,) * 2,
    "ipm, ε = 0.5": (lambda own, mean, k: -0.5 * mean,) * 2,
    "min_max": (lambda own, mean, k: mean,) * 2,  # less γ, which follows from the inner products
}


def trained(data: Study, folder: Path) -> Grams:
    """The inner products of every round of a federation of honest sites, kept in a file."""
    file = folder / f"{data.name}-{len(data.names)}.safetensors"
    if not file.exists():
        run = robustness.AttackedRun(data, robustness.NONE, "none", robustness.CELLS.get(data.name, 1e-2), 0, 1)
        bench, found = Bench(data, run.rate), dict[str, Tensor]()

        def look(updates: tuple[AdapterUpdate, ...], task: RoundTask) -> tuple[AdapterUpdate, ...]:
            seen = measure(updates, task.adapter, "tail", ["products", "dense"])
            found.update({f"{task.round:03}/{part}": gram.contiguous() for part, gram in seen.items()})
            return updates

        method, workers = run.method, bench.workers(run.method)
        for _ in federate(workers, bench.settled(method, 0), method.aggregation, data.rounds, tampered=look):
            pass
        folder.mkdir(parents=True, exist_ok=True)
        save_file(found, file)
    read = load_file(file)
    return [(read[f"{number:03}/products"], read[f"{number:03}/dense"]) for number in range(len(read) // 2)]


def attacked(
    grams: tuple[Tensor, Tensor], attack: str, bad: Sequence[int]
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Of each part, the inner products of what is sent and its weights of the honest changes; and the honest mean's."""
    n = len(grams[0])
    good = [site for site in range(n) if site not in bad]
    each, mean = torch.eye(n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)
    mean[good] = 1 / len(good)
    sent = [each.clone(), each.clone()]
    for part, rows in enumerate(sent):
        for site in bad:
            found = ATTACKS[attack]
            assert found
            rows[site] = found[part](each[site], mean, len(good) / len(bad))
            if attack == "min_max":
                inner = (grams[0] + grams[1])[good][:, good]
                length = float(inner.mean().clamp(min=0).sqrt())
                rows[site] *= 1 - farthest(inner) / length if length else 1.0
    return [rows @ gram @ rows.T for rows, gram in zip(sent, grams, strict=True)], sent, mean


def weights(grams: Sequence[Tensor], rules: Sequence[Rule]) -> Tensor:
    """The share of each site in the result."""
    manifest = Manifest("base", "causal_lm", "lora")
    sites = [AdapterUpdate(f"s{place:02}", Adapter(), manifest, Report()) for place in range(len(grams[0]))]
    cohort = Cohort(sites, Adapter(), "tail")
    cohort.measured.update({"products": grams[0], "dense": grams[1]})
    said = guard.judge(rules, cohort)
    kept = torch.tensor([said[s.site].weight if s.site in said else 1.0 for s in sites], dtype=torch.float64)
    return kept / kept.sum()


def cell(rounds: Grams, attack: str, rules: Sequence[Rule]) -> str:
    n = len(rounds[0][0])
    f = max(1, (n - 1) // 4)
    who = [[site] for site in range(n)] if f == 1 else [Random(k).sample(range(n), f) for k in range(8)]
    found = []
    for grams in rounds:
        for bad in who if ATTACKS[attack] else [[]]:
            seen, sent, mean = attacked(grams, attack, bad)
            share, good = weights(seen, rules), [site for site in range(n) if site not in bad]
            along = [
                float(share @ rows @ gram @ mean) / usual
                for rows, gram in zip(sent, grams, strict=True)
                if (usual := float(mean @ gram @ mean)) > 0
            ]
            found.append([float(share[bad].sum()), float((share[good] == 0).double().mean()), min(along)])
    return ", ".join(f"{value:.2f}" for value in torch.tensor(found).mean(0).tolist())


def main(
    names: list[str],
    sites: Annotated[int, typer.Option(min=0, help="sites to make of the data set's; 0: its own")] = 5,
    output: Annotated[Path, typer.Option(help="folder of what is trained")] = Path("runs/real_changes"),
) -> None:
    torch.set_num_threads(1)
    for name in names:
        data = robustness.prepared(study(name, Workspace.at(output)), sites, ROUNDS, STEPS)
        rounds, table = trained(data, output), Table("guard", *ATTACKS, title=f"{name}, {len(data.names)} sites")
        for called, rules in GUARDS.items():
            table.add_row(called, *(cell(rounds, attack, rules) for attack in ATTACKS))
        Console(width=200).print(table)


if __name__ == "__main__":
    typer.run(main)
