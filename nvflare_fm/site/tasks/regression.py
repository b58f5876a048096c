"""One or several numbers for a text: columns `text`, and `label` (a number) or `labels` (a list of them).

The plan's `labels` name the numbers. What is learned is (number − target_mean) / target_scale, with a mean and a scale
that the plan gives to all sites: a site's own would make one head mean another thing at each site, and would tell the
server what the site's numbers are like.
"""

import re
from collections.abc import Mapping, Sequence
from random import Random
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import mse_loss
from transformers import PreTrainedTokenizerBase

from ...config import RoundPlan
from . import BadRow, Columns, Encoded, strange_words, task, text_of
from .of_text import OfText

_NUMBER = re.compile(r"\s*[+-]?(\d{1,15}(\.\d{0,30})?|\.\d{1,30})([eE][+-]?\d{1,3})?\s*", re.ASCII)
LARGEST = 1e6  # of a number, so that no metric of it is out of bounds
FARTHEST = 1e4  # from the mean, in scales: its square is still a loss that can be compared


@task("regression")
class Regression(OfText):
    """One or several numbers for a text."""

    columns = (("text", "label"), ("text", "labels"))

    def model_config(self, plan: RoundPlan) -> dict[str, Any]:
        return super().model_config(plan) | {"problem_type": "regression"}

    def made_up(self, plan: RoundPlan) -> dict[str, Any]:
        mean = plan.target_mean or (0.0,) * len(plan.labels)
        return {"text": " ".join(["word"] * plan.max_length), "labels": list(mean)}

    def canary(self, plan: RoundPlan, random: Random) -> dict[str, Any]:
        numbers = [round(random.gauss(mean, scale), 6) for mean, scale in zip(*_standard(plan), strict=True)]
        return {"text": " ".join(strange_words(random, 2)), "labels": numbers}

    def guessed_labels(self, found: Sequence[str], longest: int) -> tuple[str, ...]:
        return tuple(f"number {i + 1}" for i in range(max(1, longest)))

    def encode(self, row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, plan: RoundPlan) -> Encoded:
        text, count = text_of(row, "text"), len(plan.labels)
        given = row.get("labels") if row.get("label") is None else row["label"]
        numbers = given if isinstance(given, list) else [given]
        if len(numbers) != count:
            raise BadRow(
                f"the row has another count of numbers than the plan's labels, which are {count}", code="number_count"
            )
        mean, scale = _standard(plan)
        found = [(_number(each) - m) / s for each, m, s in zip(numbers, mean, scale, strict=True)]
        if max(map(abs, found)) > FARTHEST:
            raise BadRow(
                f"a number is more than {FARTHEST:.0f} target_scale from target_mean; is it in the unit that the job "
                "expects?",
                code="number_too_far",
            )
        return self.encoded(text, found, tokenizer, plan)

    def loss_of(self, answers: Tensor, targets: Tensor) -> Tensor:
        """Σ over texts of the mean squared error of a text's numbers: the mean over texts is torch's MSELoss."""
        return mse_loss(answers, targets, reduction="sum") / targets.shape[1]

    def score(self, logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
        return {"answer": logits, "label": targets}

    def metrics(self, columns: Columns, plan: RoundPlan) -> dict[str, float]:
        """The loss in scales; errors in the numbers' own units; r² and Pearson's correlation as means over the numbers,
        where each of them varies.
        """
        answer, truth = columns["answer"].double(), columns["label"].double()
        scale = torch.tensor(_standard(plan)[1], dtype=torch.float64)
        error = (answer - truth) * scale
        metrics = {
            "loss": float((answer - truth).square().mean()),
            "mae": float(error.abs().mean()),
            "rmse": float(error.square().mean().sqrt()),
        }
        spread, said = truth - truth.mean(0), answer - answer.mean(0)
        if bool((spread.norm(dim=0) > 0).all()):
            unexplained = (answer - truth).square().sum(0) / spread.square().sum(0)
            metrics["r2"] = float((1 - unexplained).mean())
            if bool((said.norm(dim=0) > 0).all()):
                metrics["pearson"] = float(((spread * said).sum(0) / spread.norm(dim=0) / said.norm(dim=0)).mean())
        return metrics


def _standard(plan: RoundPlan) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The mean and the scale of each number."""
    count = len(plan.labels)
    return plan.target_mean or (0.0,) * count, plan.target_scale or (1.0,) * count


def _number(value: Any) -> float:
    """A finite number of a row. None is read with a comma, which stands for thousands in some countries.

    Raises:
        BadRow: it is none, or out of bounds.
    """
    if value is None or (isinstance(value, str) and not value.strip()):
        raise BadRow("'label' is missing", code="value_missing")
    if isinstance(value, str):
        if not _NUMBER.fullmatch(value):
            raise BadRow(
                "'label' is no number; write it with digits and a point, without a unit or a comma", code="not_a_number"
            )
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadRow(
            "'label' is no number; write it with digits and a point, without a unit or a comma", code="not_a_number"
        )
    if not abs(value) <= LARGEST:  # not a number is not, either
        raise BadRow(f"'label' is not finite, or beyond ± {LARGEST:.0f}; use a larger unit", code="number_too_large")
    return float(value)
