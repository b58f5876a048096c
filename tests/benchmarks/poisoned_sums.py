"""What one site's false sums do to a head from features, with the server's checks and without, before any training.

    nice python tests/benchmarks/poisoned_sums.py                                   eight data sets, 15 minutes
    nice python tests/benchmarks/poisoned_sums.py banking77-0.1 --sites 5 --seed 1  one of them

Some sites attack in their turn, by each attack. Prints the accuracy on the other sites' test rows, as mean and least
over the attackers, how often the attacker was found, and how often an honest site was left out.
"""

import argparse
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from random import Random
from statistics import mean
from unittest.mock import patch

import torch
from torch import Tensor

from nvflare_fm.adapter import Adapter, AdapterUpdate, Manifest, Report, RoundTask
from nvflare_fm.aggregation import false_sums
from nvflare_fm.aggregation import head_start as server
from nvflare_fm.compare.bench import Bench
from nvflare_fm.compare.methods import FROM_FEATURES, METHODS
from nvflare_fm.compare.robustness import ROUNDS, STEPS, prepared
from nvflare_fm.compare.study import Workspace, study
from nvflare_fm.site.head_start import features
from nvflare_fm.synthesis.features import Head, Sums, covariance

STUDIES = ("banking77-0", "banking77-0.1", "banking77-two", "banking77-disjoint", "medquad-types", "medquad-three",
           "mts-0.1", "pubmedqa-years")  # fmt: skip
Rows = tuple[Tensor, Tensor]  # features, (rows, width), and labels, (rows,)
OFF = {"_HARM": 1.0, "_SPREAD": 1e9, "_ALIKE": -100.0}


def read(name: str, seed: int, sites: int, root: Path) -> tuple[dict[str, tuple[Rows, Rows]], int]:
    """Each site's features of its training and test rows, and how many labels there are."""
    found = prepared(study(name, Workspace.at(root)).at_seed(seed), sites, ROUNDS, STEPS)
    bench, method, rows = Bench(found, 1e-3), METHODS[FROM_FEATURES], {}
    settled = bench.job(method, seed)
    for site, worker in bench.workers(method).items():
        job = worker._job(RoundTask(settled.summing), trains=True)
        with job.base.lent():
            rows[site] = tuple(
                (torch.cat(points), torch.tensor([label for part in labels for label in part]))
                for data in (job.data.train, job.data.validation)
                for points, labels in [zip(*features(job.base, data, job.plan, lambda: False), strict=True)]
            )
    return rows, len(settled.plan.labels)


def summed(rows: Rows, classes: int) -> Sums:
    found = Sums.none(classes, rows[0].shape[1])
    found.add(rows[0], rows[1].tolist())
    return found


def crafted(honest: Mapping[str, Sums], rows: Rows, classes: int) -> Iterator[tuple[str, Sums]]:
    """False sums: of rows with other labels, and of no rows, by one who knows all that the others send."""
    draw = Random(0)
    half = torch.tensor([classes - 1 - c if draw.random() < 0.5 else c for c in range(classes)])
    yield "all labels swapped", summed((rows[0], classes - 1 - rows[1]), classes)
    yield "half of the labels swapped", summed((rows[0], half[rows[1]]), classes)
    total = Sums(
        *(torch.stack(parts).sum(0) for parts in zip(*(vars(s).values() for s in honest.values()), strict=True))
    )
    middle, within = total.sums.sum(0) / total.counts.sum(), covariance(total)[0]
    means = torch.where((total.counts > 0)[:, None], total.sums / total.counts.clamp(min=1)[:, None], middle)
    mirrored = means.flip(0)
    most = 2 * sorted(float(each.counts.sum()) for each in honest.values())[len(honest) // 2]

    def claimed(means: Tensor, within: Tensor = within, labels: int = classes) -> Sums:
        counts = torch.zeros(classes, dtype=torch.float64)
        counts[:labels] = round(most / labels)
        sums = counts[:, None] * means
        return Sums(sums, counts, counts.sum() * within + means.T @ sums)

    yield "the others' means, all swapped", claimed(mirrored)
    yield "the others' means, half swapped", claimed(means[half])
    yield "the others' means, 45 % of the way to swapped", claimed(means + 0.45 * (mirrored - means))
    yield "the opposite of the others' means", claimed(2 * middle - means)
    yield "no difference between labels", claimed(middle.expand_as(means))
    pairs, few = torch.arange(classes), min(classes, 4) // 2 * 2
    pairs[:few] = pairs[:few].view(-1, 2).flip(1).reshape(-1)
    yield "all rows in a few labels, swapped", claimed(means[pairs], labels=few)
    between = (means - middle).T @ ((means - middle) * total.counts[:, None])
    trace = (total.squares / total.counts.sum()).trace()
    noise = 3 * trace * between / between.trace()
    yield "noise where labels differ", claimed(means, noise)
    yield "a thirtieth of that noise", claimed(means, within + noise / 30)


def started(sums: Mapping[str, Sums]) -> server.Start:
    manifest = Manifest("base-1", "sequence_classification", "lora")
    updates = [AdapterUpdate(site, Adapter(dense=each.tensors()), manifest, Report()) for site, each in sums.items()]
    for update in updates:
        server.check_sums(update, len(next(iter(sums.values())).counts))
    return server.head_start(updates)


def accuracy(start: server.Start, rows: Mapping[str, tuple[Rows, Rows]], without: str = "") -> float:
    answers = Head.read(start.adapter.dense)
    right = [answers(test[0]) == test[1] for site, (_, test) in rows.items() if site != without]
    return float(torch.cat(right).float().mean())


def unchecked(run: Callable[[], server.Start]) -> server.Start:
    with patch.multiple(false_sums, **OFF):
        return run()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", nargs="*", default=STUDIES)
    parser.add_argument("--sites", type=int, default=0, help="0: as the data set has them")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--attackers", type=int, default=4, help="sites that attack, one at a time, the first by name")
    parser.add_argument("--workspace", type=Path, default=Path("runs/compare"))
    given = parser.parse_args()
    print("| data set | false sums | without checks: mean, least | with them | found | honest sites left out |")
    print("|---|---|---|---|---|---|")
    for name in given.studies:
        rows, classes = read(name, given.seed, given.sites, given.workspace)
        sums = {site: summed(train, classes) for site, (train, _) in rows.items()}
        start = started(sums)
        print(f"| {name} | none | | {accuracy(start, rows):.3f} | | {len(start.refused)} of {len(sums)} |", flush=True)
        found: dict[str, list[tuple[float, float, bool, int]]] = {}
        for attacker in [*sums][: given.attackers]:
            honest = {site: each for site, each in sums.items() if site != attacker}
            for attack, false in crafted(honest, rows[attacker][0], classes):
                all_sums = {**honest, attacker: false}
                start = started(all_sums)
                bare = unchecked(lambda all_sums=all_sums: started(all_sums))
                left_out = {*start.refused}
                found.setdefault(attack, []).append(
                    (accuracy(bare, rows, attacker), accuracy(start, rows, attacker), attacker in left_out,
                     len(left_out - {attacker}))
                )  # fmt: skip
        for attack, each in found.items():
            bare, checked, caught, wronged = zip(*each, strict=True)
            print(
                f"| | {attack} | {mean(bare):.3f}, {min(bare):.3f} | {mean(checked):.3f}, {min(checked):.3f} "
                f"| {sum(caught)} of {len(each)} | {sum(wronged)} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
