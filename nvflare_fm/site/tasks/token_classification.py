"""One label for each word: columns `tokens` (words) and `labels` (as many; the plan's labels, or their places there).

The words are joined by blanks and tokenized as the running text they are then, so a model learns the tokens that it
will meet. A word's label stands at its first token; the others are not learned, so a word counts once however it is
split. Named entities are scored as CoNLL does, by seqeval: one counts if its kind and both its ends are right.
"""

import re
from collections.abc import Mapping, Sequence
from itertools import accumulate
from random import Random
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ...config import RoundPlan
from . import IGNORED, BadRow, Columns, Cut, Encoded, Task, strange_words, task, tokenized
from .labels import find

Span = tuple[int, int]  # characters, end excluded
OUTSIDE = "O"
_PLACES = {"B": "B", "I": "I", "M": "I", "E": "E", "L": "E", "S": "S", "U": "S", "W": "S"}  # BIO, BIOES, BILOU, BMEW
_IN_SCHEME = re.compile(r"([BIMELSUW])(?:[-_](.+))?")


@task("token_classification")
class TokenClassification(Task):
    """One label for each word of a text."""

    columns = (("tokens", "labels"),)

    def made_up(self, plan: RoundPlan) -> dict[str, Any]:
        return {"tokens": ["word"] * plan.max_length, "labels": [plan.labels[0]] * plan.max_length}

    def canary(self, plan: RoundPlan, random: Random) -> dict[str, Any]:
        words = strange_words(random, 4)
        return {"tokens": words, "labels": [random.choice(plan.labels) for _ in words]}

    def encode(self, row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, plan: RoundPlan) -> Encoded:
        words, labels = row.get("tokens"), row.get("labels")
        if not isinstance(words, list) or not words or not all(isinstance(word, str) for word in words):
            raise BadRow("'tokens' is not a list of words", code="tokens_no_list")
        if not isinstance(labels, list) or len(labels) != len(words):
            raise BadRow("'labels' is not a list with one label for each of 'tokens'", code="label_count")
        found = [find(label, plan.labels) for label in labels]
        places = [place for place, _ in found]
        encoded, beyond = tokenized(tokenizer, " ".join(words), plan.max_length, return_offsets_mapping=True)
        first = first_tokens(words, encoded["offset_mapping"])
        learned = [IGNORED if word is None else places[word] for word in first]
        if all(label == IGNORED for label in learned):
            raise BadRow("no word is left after tokenizing", code="no_word_left")
        lost = entities_lost(places, first, plan.labels)
        example = {"input_ids": encoded["input_ids"], "labels": learned}
        remarks = frozenset(remark for _, remark in found if remark)
        return Encoded((example,), Cut(int(beyond > 0 or lost > 0), beyond, entities=lost), remarks)

    def class_counts(self, rows: Dataset, plan: RoundPlan) -> Tensor:
        labels = [label for row in rows["labels"][:] for label in row if label != IGNORED]
        return torch.bincount(torch.tensor(labels), minlength=len(plan.labels)).double()

    def counts(self, batch: Columns) -> dict[str, Tensor]:
        return {"words": (batch["labels"] != IGNORED).sum(-1)}

    def metrics(self, columns: Columns, plan: RoundPlan) -> dict[str, float]:
        """Loss and accuracy over words; precision, recall and F1 over entities, where there are any to be found."""
        truth, answer = (_texts(columns[name], columns["words"], plan.labels) for name in ("label", "answer"))
        return {
            "loss": float(columns["nats"].double().mean()),
            "accuracy": float((columns["label"] == columns["answer"]).double().mean()),
            **_entity_metrics(truth, answer),
        }


def first_tokens(words: Sequence[str], spans: Sequence[Span]) -> list[int | None]:
    """The word that begins with each token of `" ".join(words)`, if one does. Tokens are told by their characters.

    A token that covers several words is the first one's; a word without a token of its own is not there.
    """
    stops = list(accumulate(words, lambda stop, word: stop + 1 + len(word), initial=-1))[1:]
    starts = [stop - len(word) for stop, word in zip(stops, words, strict=True)]
    first: list[int | None] = []
    word = 0
    for start, stop in spans:
        while word < len(words) and (stops[word] <= start or not words[word].strip()):
            word += 1
        is_first = word < len(words) and start < stop and starts[word] < min(stop, stops[word])
        first.append(word if is_first else None)
        word += is_first
    return first


def entities_lost(places: Sequence[int], first: Sequence[int | None], labels: tuple[str, ...]) -> int:
    """How many entities have a word that is not learned: it lies behind `max_length`, or has no token of its own."""
    from seqeval.metrics.sequence_labeling import get_entities

    learned = {word for word in first if word is not None}
    if len(learned) == len(places):
        return 0
    tags = entity_tags(labels)
    entities = get_entities([tags[place] for place in places])
    return sum(any(word not in learned for word in range(start, end + 1)) for _, start, end in entities)


def entity_tags(labels: Sequence[str]) -> list[str]:
    """A plan's labels as seqeval reads them. Where they follow no scheme of places, a run of one label is an entity."""
    kinds = [_IN_SCHEME.fullmatch(label) for label in labels if label != OUTSIDE]
    if all(kinds) and any(kind and kind[1] in "BI" for kind in kinds):
        found = [_IN_SCHEME.fullmatch(label) for label in labels]
        return [f"{_PLACES[kind[1]]}-{kind[2] or 'entity'}" if kind else OUTSIDE for kind in found]
    return [OUTSIDE if label == OUTSIDE else f"I-{label}" for label in labels]


def _texts(places: Tensor, words: Tensor, labels: Sequence[str]) -> list[list[str]]:
    """The tags of each text, of the labels of all texts' words in one row."""
    tags = entity_tags(labels)
    return [[tags[place] for place in text] for text in map(Tensor.tolist, places.split(words.tolist()))]


def _entity_metrics(truth: list[list[str]], answer: list[list[str]]) -> dict[str, float]:
    """Micro-averages; nothing where no text has an entity: there is nothing to be found."""
    from seqeval.metrics.sequence_labeling import precision_recall_fscore_support

    if all(tag == OUTSIDE for text in truth for tag in text):
        return {}
    precision, recall, f1, _ = precision_recall_fscore_support(truth, answer, average="micro", zero_division=0)
    return {"precision": float(precision), "recall": float(recall), "f1": float(f1)}
