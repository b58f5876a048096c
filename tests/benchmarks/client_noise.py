"""From how much noise on a federation learns nothing under `client_privacy`: a classifier's head on MiniLM.

    nice python tests/benchmarks/client_noise.py             the table in docs/privacy.md; half an hour
    nice python tests/benchmarks/client_noise.py --seeds 1   a look

banking77's questions, embedded once by all-MiniLM-L6-v2, which stays as it is. FedAvg trains a linear head on them,
with the noise of `aggregation.noised`: on 64 random projections, on the embeddings, and on 3,072 random features
(ReLU), so that the number of trained numbers differs. Each of 20 sites has as many questions as any other, drawn at
random, and no answer depends on the head's length: the easiest case there is. The better of two clipping norms is told,
chosen on the test rows.
"""

import csv
import json
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import torch
import typer
from torch import Tensor
from torch.nn.functional import normalize
from transformers import AutoModel, AutoTokenizer

from nvflare_fm.adapter import Adapter, AdapterUpdate, Manifest, Report
from nvflare_fm.aggregation.noised import combine_noised
from nvflare_fm.algebra.lora import fresh_rows
from nvflare_fm.compare.data_sets import minilm
from nvflare_fm.config import Aggregation
from nvflare_fm.privacy.clients import ClientNoise, noised_numbers

CASES = ((64, 5), (384, 5), (384, 20), (3072, 5))  # features, rounds
RATIOS = (0.0, 1.0, 3.0, 10.0, 30.0, 100.0)  # noise of all rounds to the farthest that they can move the head
SITES, CLIPS, STEPS, RATE, DELTA = 20, (1.0, 10.0), 10, 80.0, 1e-4
MANIFEST, HOW = Manifest("base-1", "sequence_classification", "lora"), Aggregation(guard=())
Rows = tuple[Tensor, Tensor]  # features, labels


def main(data: Path = Path("../shared/data/banking77"), seeds: int = 3) -> None:
    torch.set_num_threads(1)
    questions = [embedded(data / f"{split}.csv") for split in ("train", "test")]
    for (width, rounds), ratio in product(CASES, RATIOS):
        train, test = ((features(rows[0], width), rows[1]) for rows in questions)
        start = Adapter({}, {"head": torch.zeros(int(train[1].max()) + 1, width)})
        numbers = noised_numbers(start)
        sigma = max(1e-9, ratio * rounds**0.5 * SITES / numbers**0.5)
        best: Sequence[float] = ()
        for clip in CLIPS:
            noise = ClientNoise(sigma, clip, SITES, DELTA, rounds)
            found = [accuracy(start, train, test, noise, seed) for seed in range(seeds)]
            best = max(best, (sum(found) / seeds, min(found), max(found), clip))
        said = dict(zip(("accuracy", "least", "most", "max_norm"), best, strict=True))
        said |= {"numbers": numbers, "rounds": rounds, "ratio_of_all": ratio, "per_number": noise.per_number}
        print(json.dumps(said), flush=True)


def embedded(file: Path) -> Rows:
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
        parts.append(normalize((hidden * mask).sum(1) / mask.sum(1), dim=1))
    return torch.cat(parts), torch.tensor([names.index(row["category"]) for row in rows])


def features(embeddings: Tensor, width: int) -> Tensor:
    """So many features of length 1."""
    size = embeddings.shape[1]
    if width <= size:
        return normalize(embeddings @ fresh_rows("head", size, range(width), 0).T, dim=1)
    directions = torch.randn(size, width, generator=torch.Generator().manual_seed(0)) / size**0.5
    rectified = torch.relu(embeddings @ directions)
    return normalize(rectified - 0.4 / size**0.5, dim=1)  # the mean of a rectified normal number


def accuracy(start: Adapter, train: Rows, test: Rows, noise: ClientNoise, seed: int) -> float:
    """The share of test rows that are answered rightly after all rounds."""
    order = torch.randperm(len(train[1]), generator=torch.Generator().manual_seed(seed))
    parts, state = order.chunk(SITES), start
    for number in range(noise.rounds):
        updates = [
            AdapterUpdate(f"site-{i:02}", trained(state, train[0][rows], train[1][rows]), MANIFEST, Report())
            for i, rows in enumerate(parts)
        ]
        state = combine_noised(state, MANIFEST, updates, HOW, noise, number, max_rank=0).adapter
    return float((test[0] @ state.dense["head"].T).argmax(1).eq(test[1]).float().mean())


def trained(start: Adapter, rows: Tensor, labels: Tensor) -> Adapter:
    """A site's head after gradient steps on all its rows."""
    head = start.dense["head"].clone()
    for _ in range(STEPS):
        error = torch.softmax(rows @ head.T, dim=1)
        error[torch.arange(len(labels)), labels] -= 1
        head -= RATE * error.T @ rows / len(labels)
    return Adapter({}, {"head": head})


if __name__ == "__main__":
    typer.run(main)
