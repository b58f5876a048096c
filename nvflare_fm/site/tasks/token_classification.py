"""One label for each word: columns `tokens` (words) and `labels` (as many; the plan's labels, or their places there).

A word's label stands at its first sub-token; the others are not learned, so a word counts once however it is split.
"""

from collections.abc import Mapping
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ...config import RoundPlan
from . import IGNORED, BadRow, Columns, Task, classification_metrics, registry
from .sequence_classification import label_index


class TokenClassification(Task):
    auto_class = "AutoModelForTokenClassification"
    peft_type = "TOKEN_CLS"

    def encode(self, row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, plan: RoundPlan) -> dict[str, Any]:
        words, labels = row.get("tokens"), row.get("labels")
        if not isinstance(words, list) or not words or not all(isinstance(word, str) for word in words):
            raise BadRow("'tokens' is not a list of words")
        if not isinstance(labels, list) or len(labels) != len(words):
            raise BadRow("'labels' is not a list with one label for each of 'tokens'")
        places = [label_index(label, plan.labels) for label in labels]
        encoded = tokenizer(words, is_split_into_words=True, truncation=True, max_length=plan.max_length)
        of_word = encoded.word_ids()
        first = [w is not None and (i == 0 or of_word[i - 1] != w) for i, w in enumerate(of_word)]
        learned = [places[w] if is_first else IGNORED for w, is_first in zip(of_word, first, strict=True)]
        if all(label == IGNORED for label in learned):
            raise BadRow("no word is left after tokenizing")
        return {"input_ids": encoded["input_ids"], "labels": learned}

    def class_counts(self, rows: Dataset, plan: RoundPlan) -> Tensor:
        labels = [label for row in rows["labels"][:] for label in row if label != IGNORED]
        return torch.bincount(torch.tensor(labels), minlength=len(plan.labels)).double()

    def metrics(self, columns: Columns, plan: RoundPlan) -> dict[str, float]:
        """Over words. Macro-F1 leaves out the label "O", which most words bear: a model that says only O scores 0."""
        named = [i for i, label in enumerate(plan.labels) if label != "O"]
        return classification_metrics(columns, named)


registry.register("token_classification")(TokenClassification())
