"""What guards do to honest sites whose labels differ, and to a hostile one: on vectors, in seconds, without a model.

    python tests/benchmarks/honest_minorities.py

A site's change is half a direction that all share, plus the mean of the directions of its classes by their shares,
plus noise. Shares follow Dirichlet's distribution: alike (α = 100), α = 1, α = 0.1; in "minority" a fifth of the sites
hold a quarter of the classes alone. The change has two parts, products and a head fifty times shorter. Of n sites
the last f are hostile: they flip the honest mean at the usual length (in both parts, or in the head alone), or stay one
standard deviation beside it (ALIE, arXiv:1902.06156). Means over 20 seeds.

error: of the result to the honest sites' mean, relative to it, of the worse part. hostile: their share of the weight.
least: the least weight of an honest site, in units of 1/n. rejected: share of honest sites that are left out.
"""

from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from nvflare_fm.adapter import Adapter, AdapterUpdate, Manifest, Report
from nvflare_fm.aggregation import guard
from nvflare_fm.aggregation.cohort import Cohort
from nvflare_fm.config import Rule

CLASSES, SIZE, HEAD, SEEDS = 20, 400, 0.02, 20
ALPHAS = {"alike": 100.0, "α = 1": 1.0, "α = 0.1": 0.1, "minority": 100.0}
GUARDS: list[list[Rule]] = [
    [],
    [{"rule": "geometric_median"}],
    [{"rule": "geometric_median", "mix": "nnm"}],
    *([{"rule": "geometric_median", "mix": "nnm", "near": near}] for near in (1.3, 1.5)),
    [{"rule": "geometric_median", "mix": "bucketing"}],
    [{"rule": "centered_clip"}],
    [{"rule": "multi_krum"}],
]


def drawn(n: int, alpha: float, among: slice) -> Tensor:
    shares = torch.zeros(n, CLASSES)
    some = shares[:, among]
    some.copy_(torch.distributions.Dirichlet(torch.full((some.shape[1],), alpha)).sample((n,)))
    return shares


def shares(n: int, kind: str) -> Tensor:
    if kind != "minority":
        return drawn(n, ALPHAS[kind], slice(0, CLASSES))
    few, cut = max(1, n // 5), 3 * CLASSES // 4
    return torch.cat([drawn(n - few, ALPHAS[kind], slice(0, cut)), drawn(few, ALPHAS[kind], slice(cut, CLASSES))])


def part(of: Tensor) -> Tensor:
    common, classes = torch.randn(SIZE), torch.randn(CLASSES, SIZE) / SIZE**0.5
    return 0.5 * common / common.norm() + 3 * of @ classes + 1.5 * torch.randn(len(of), SIZE) / SIZE**0.5


def flipped(honest: Tensor) -> Tensor:
    mean = honest.mean(0)
    return -mean / mean.norm() * honest.norm(dim=1).median()


def alie(honest: Tensor) -> Tensor:
    return honest.mean(0) - honest.std(0)


ATTACKS: dict[str, tuple[Callable[[Tensor], Tensor] | None, Callable[[Tensor], Tensor] | None]] = {
    "none": (None, None), "head flipped": (None, flipped), "both flipped": (flipped, flipped), "ALIE": (alie, alie)
}  # fmt: skip


def one(n: int, kind: str, attack: str, rules: list[Rule], seed: int) -> list[float]:
    """Error, the hostile share, the least honest weight and the share of honest sites that are left out."""
    torch.manual_seed(seed)
    f = (n - 1) // 4 if attack != "none" else 0
    honest = n - f
    of = shares(honest, kind)
    parts = []
    for bad, scale in zip(ATTACKS[attack], (1.0, HEAD), strict=True):
        good = scale * part(of)
        beside = bad(good).expand(f, -1) if bad else good[:f]
        parts.append(torch.cat([good, beside]))
    manifest = Manifest("base", "causal_lm", "lora")
    sites = [AdapterUpdate(f"s{i:02}", Adapter({}, {"head": p}), manifest, Report()) for i, p in enumerate(parts[1])]
    cohort = Cohort(sites, Adapter(), "tail")
    cohort.measured.update({"products": parts[0].double() @ parts[0].double().T})
    verdicts = guard.judge(rules, cohort)
    weight = torch.tensor([verdicts[s.site].weight if s.site in verdicts else 1.0 for s in sites])
    weight = weight / weight.sum()
    errors = [float((weight @ p - p[:honest].mean(0)).norm() / p[:honest].mean(0).norm()) for p in parts]
    mine = weight[:honest]
    return [max(errors), float(weight[honest:].sum()), n * float(mine.min()), float((mine == 0).float().mean())]


def main() -> None:
    heads = ("sites", "honest sites", "attack", "guard", "error", "hostile", "least", "rejected")
    table = Table(*heads)
    for n in (5, 10):
        for kind in ALPHAS:
            for attack in ATTACKS:
                for rules in GUARDS:
                    found = torch.tensor([one(n, kind, attack, rules, seed) for seed in range(SEEDS)]).mean(0)
                    names = " + ".join(str(v) for r in rules if isinstance(r, dict) for v in reversed([*r.values()]))
                    table.add_row(str(n), kind, attack, names or "none", *(f"{value:.2f}" for value in found.tolist()))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
