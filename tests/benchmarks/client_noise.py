"""From how much noise on a federation learns nothing under `client_privacy`: a classifier's head on MiniLM.

    nice python tests/benchmarks/client_noise.py             the table in docs/privacy.md; ten minutes
    nice python tests/benchmarks/client_noise.py --seeds 1   a look

banking77's questions, embedded once by all-MiniLM-L6-v2, which stays as it is. A linear head on them is trained by FedAvg
through `aggregation.noised.combine_noised`, whole or as B beside a frozen A of lower rank, so that the number of trained
numbers differs. Each site holds as many questions as any other, drawn at random: the easiest case there is. The best of
four clipping norms is told, chosen on the test rows, so the figures are what noise leaves at best.
"""

import csv
import json
from itertools import product
from pathlib import Path

import torch
import typer
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from nvflare_fm.adapter import Adapter, AdapterUpdate, LoraPair, Manifest, Report
from nvflare_fm.aggregation.noised import combine_noised
from nvflare_fm.algebra.lora import fresh_rows
from nvflare_fm.compare.data_sets import minilm
from nvflare_fm.config import Aggregation
from nvflare_fm.privacy import gaussian
from nvflare_fm.privacy.clients import ClientNoise, noised_numbers

RANKS, SITES, ROUNDS = (8, 64, 384), (10, 100, 500), (5, 20)
CLIPS, RATIOS, STEPS, RATE, DELTA = (0.3, 1.0, 3.0, 10.0), (0.0, 0.3, 1.0, 2.0, 3.0, 5.0, 10.0, 20.0), 10, 20.0, 1e-4
MANIFEST = Manifest("base-1", "sequence_classification", "lora")


def main(data: Path = Path("../shared/data/banking77"), seeds: int = 3) -> None:
    torch.set_num_threads(1)
    train, test = (embedded(data / f"{split}.csv") for split in ("train", "test"))
    for rank, sites, rounds, ratio in product(RANKS, SITES, ROUNDS, RATIOS):
        start = fresh(rank, int(train[1].max()) + 1)
        sigma = ratio * rounds**0.5 * sites / noised_numbers(start) ** 0.5
        best = []
        for clip in CLIPS:
            noise = ClientNoise(sigma, clip, sites, DELTA, rounds)
            found = [accuracy(start, train, test, noise, seed) for seed in range(seeds)]
            best.append((sum(found) / seeds, clip, min(found), max(found)))
        mean, clip, least, most = max(best)
        epsilon = gaussian.epsilon(sigma, rounds, DELTA) if sigma else None
        said = {"numbers": noised_numbers(start), "sites": sites, "rounds": rounds, "ratio_of_all": ratio}
        said |= {"ratio": ratio * rounds**0.5, "sigma": sigma, "epsilon": epsilon, "max_norm": clip}
        print(json.dumps({**said, "accuracy": mean, "least": least, "most": most}), flush=True)


def embedded(file: Path) -> tuple[Tensor, Tensor]:
    """Mean-pooled embeddings of length 1, and labels by their names' order."""
    with file.open(encoding="utf-8") as opened:
        rows = list(csv.DictReader(opened))
    names = sorted({row["category"] for row in rows})
    tokenizer, model = AutoTokenizer.from_pretrained(minilm()), AutoModel.from_pretrained(minilm()).eval()
    parts = []
    for at in range(0, len(rows), 64):
        texts = tokenizer([row["text"] for row in rows[at : at + 64]], padding=True, return_tensors="pt")
        with torch.no_grad():
            hidden, mask = model(**texts).last_hidden_state, texts["attention_mask"][:, :, None]
        parts.append(torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1))
    return torch.cat(parts), torch.tensor([names.index(row["category"]) for row in rows])


def fresh(rank: int, classes: int) -> Adapter:
    """A head that answers nothing yet, beside orthonormal rows."""
    return Adapter({"head": LoraPair(fresh_rows("head", 384, range(rank), 0), torch.zeros(classes, rank))})


def accuracy(
    start: Adapter, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], noise: ClientNoise, seed: int
) -> float:
    """The share of test rows that are answered rightly after all rounds."""
    order = torch.randperm(len(train[1]), generator=torch.Generator().manual_seed(seed))
    parts, how, state = order.chunk(noise.expected_sites), Aggregation(merge="freeze_a", guard=()), start
    features = train[0] @ start.lora["head"].A.T
    for number in range(noise.rounds):
        updates = [
            AdapterUpdate(f"site-{i:03}", trained(state, features[rows], train[1][rows]), MANIFEST, Report())
            for i, rows in enumerate(parts)
        ]
        state = combine_noised(state, MANIFEST, updates, how, noise, number, max_rank=384).adapter
    pair = state.lora["head"]
    return float((test[0] @ pair.delta().T).argmax(1).eq(test[1]).float().mean())


def trained(start: Adapter, features: Tensor, labels: Tensor) -> Adapter:
    """A site's head after gradient steps on all its rows."""
    pair = start.lora["head"]
    b = pair.B.clone()
    for _ in range(STEPS):
        error = torch.softmax(features @ b.T, dim=1)
        error[torch.arange(len(labels)), labels] -= 1
        b -= RATE * error.T @ features / len(labels)
    return Adapter({"head": LoraPair(pair.A, b)})


if __name__ == "__main__":
    typer.run(main)
