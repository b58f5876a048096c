"""What the tasks share that have one answer for a whole text."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ...config import RoundPlan
from ..mean_pooling import MeanPooledForSequenceClassification, means_tokens
from . import Cut, Encoded, Task, collate, tokenized


class OfText(Task):
    """A task whose rows have a `text`, and a target for it."""

    def model_class(self, folder: Path) -> Any:
        return MeanPooledForSequenceClassification if means_tokens(folder) else super().model_class(folder)

    def encoded(
        self,
        text: str,
        target: Any,
        tokenizer: PreTrainedTokenizerBase,
        plan: RoundPlan,
        remarks: frozenset[str] = frozenset(),
    ) -> Encoded:
        """The one example that a text becomes."""
        found, beyond = tokenized(tokenizer, text, plan.max_length)
        example = {"input_ids": found["input_ids"], "labels": target}
        return Encoded((example,), Cut(int(beyond > 0), beyond), remarks)

    def batch(self, rows: Sequence[Mapping[str, Any]], pad_id: int) -> dict[str, Tensor]:
        """The texts, and a target for each: a place among the labels, or a row of numbers."""
        texts = collate([{"input_ids": row["input_ids"]} for row in rows], pad_id)
        targets = torch.tensor([row["labels"] for row in rows])
        return texts | {"places": torch.arange(len(rows)), "targets": targets}
