"""One label for a text: columns `text` and `label`. The label is one of the plan's, or its place there."""

from collections.abc import Mapping
from random import Random
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ...config import RoundPlan
from . import Columns, Encoded, classification_metrics, strange_words, task, text_of
from .labels import find, several
from .of_text import OfText


@task("sequence_classification")
class SequenceClassification(OfText):
    """One label for a text."""

    columns = (("text", "label"),)

    def made_up(self, plan: RoundPlan) -> dict[str, Any]:
        return {"text": " ".join(["word"] * plan.max_length), "label": plan.labels[0]}

    def canary(self, plan: RoundPlan, random: Random) -> dict[str, Any]:
        return {"text": " ".join(strange_words(random, 2)), "label": random.choice(plan.labels)}

    def encode(self, row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, plan: RoundPlan) -> Encoded:
        text = text_of(row, "text")
        if row.get("label") is None and isinstance(row.get("labels"), list):
            raise several()
        place, remark = find(row.get("label"), plan.labels)
        return self.encoded(text, place, tokenizer, plan, frozenset({remark} - {""}))

    def class_counts(self, rows: Dataset, plan: RoundPlan) -> Tensor:
        return torch.bincount(torch.tensor(rows["labels"][:]), minlength=len(plan.labels)).double()

    def metrics(self, columns: Columns, plan: RoundPlan) -> dict[str, float]:
        return classification_metrics(columns, range(len(plan.labels)))
