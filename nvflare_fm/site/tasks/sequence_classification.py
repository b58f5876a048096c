"""One label for a text: columns `text` and `label`. The label is one of the plan's, or its index."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ...config import RoundPlan
from ..mean_pooling import MeanPooledForSequenceClassification, means_tokens
from . import BadRow, Columns, Task, classification_metrics, registry, text_of


class SequenceClassification(Task):
    auto_class = "AutoModelForSequenceClassification"
    peft_type = "SEQ_CLS"

    def model_class(self, folder: Path) -> Any:
        return MeanPooledForSequenceClassification if means_tokens(folder) else super().model_class(folder)

    def encode(self, row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, plan: RoundPlan) -> dict[str, Any]:
        ids = tokenizer(text_of(row, "text"), truncation=True, max_length=plan.max_length)["input_ids"]
        return {"input_ids": ids, "labels": label_index(row.get("label"), plan.labels)}

    def class_counts(self, rows: Dataset, plan: RoundPlan) -> Tensor:
        return torch.bincount(torch.tensor(rows["labels"][:]), minlength=len(plan.labels)).double()

    def metrics(self, columns: Columns, plan: RoundPlan) -> dict[str, float]:
        return classification_metrics(columns, range(len(plan.labels)))


def label_index(label: Any, labels: tuple[str, ...]) -> int:
    """The place of `label` among the plan's labels.

    Raises:
        BadRow: it is none of them.
    """
    if label is None or label == "":
        raise BadRow("'label' is missing")
    if str(label) in labels:
        return labels.index(str(label))
    raise BadRow("'label' is not among the plan's labels")


registry.register("sequence_classification")(SequenceClassification())
