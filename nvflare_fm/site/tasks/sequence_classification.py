"""One label for a text: columns `text` and `label`. The label is one of the plan's, or its place there."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ...config import RoundPlan
from ..mean_pooling import MeanPooledForSequenceClassification, means_tokens
from . import Columns, Cut, Encoded, Task, classification_metrics, registry, text_of, tokenized
from .labels import find, several


class SequenceClassification(Task):
    auto_class = "AutoModelForSequenceClassification"
    peft_type = "SEQ_CLS"

    def model_class(self, folder: Path) -> Any:
        return MeanPooledForSequenceClassification if means_tokens(folder) else super().model_class(folder)

    def encode(self, row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, plan: RoundPlan) -> Encoded:
        text = text_of(row, "text")
        if row.get("label") is None and isinstance(row.get("labels"), list):
            raise several()
        place, remark = find(row.get("label"), plan.labels)
        found, beyond = tokenized(tokenizer, text, plan.max_length)
        example = {"input_ids": found["input_ids"], "labels": place}
        return Encoded((example,), Cut(int(beyond > 0), beyond), frozenset({remark} - {""}))

    def class_counts(self, rows: Dataset, plan: RoundPlan) -> Tensor:
        return torch.bincount(torch.tensor(rows["labels"][:]), minlength=len(plan.labels)).double()

    def metrics(self, columns: Columns, plan: RoundPlan) -> dict[str, float]:
        return classification_metrics(columns, range(len(plan.labels)))


registry.register("sequence_classification")(SequenceClassification())
