"""Tasks: how a row of data becomes token ids, and how the model's answers become metrics. One file a task."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import transformers
from datasets import Dataset
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerBase

from ...config import RoundPlan
from ...registry import Registry

IGNORED = -100  # the label of a position that is not learned, by PyTorch's convention
Columns = Mapping[str, Tensor]


def counted(count: int, one: str, many: str) -> str:
    """A count with its word."""
    return f"{count} {one if count == 1 else many}"


class BadRow(Exception):
    """A row that cannot be trained on.

    Args:
        reason: must not repeat any of the row's content.
        code: of an error that stops a site whose every row is so; the reason is told to the job then.
        hint: what else the site's own log may say of this row. Called for the few rows that it lists.
    """

    def __init__(self, reason: str, *, code: str = "", hint: Callable[[], str] = str) -> None:
        super().__init__(reason)
        self.code, self.hint = code, hint


@dataclass(frozen=True)
class Cut:
    """What is not learned of the rows that are used, because texts are cut at `max_length`. It stays at the site."""

    rows: int = 0
    tokens: int = 0
    answers: int = 0  # cut short or away
    entities: int = 0  # with a word that has no token of its own, be it for the text's length or not

    def __add__(self, other: "Cut") -> "Cut":
        return Cut(
            self.rows + other.rows,
            self.tokens + other.tokens,
            self.answers + other.answers,
            self.entities + other.entities,
        )

    def __str__(self) -> str:
        lost = [(self.tokens, "token", "tokens"), (self.answers, "answer", "answers"),
                (self.entities, "entity", "entities")]  # fmt: skip
        what = ", ".join(counted(*each) for each in lost if each[0])
        return f"{counted(self.rows, 'row is', 'rows are')} cut: {what} not learned or not whole"


@dataclass(frozen=True)
class Encoded:
    """What a row becomes."""

    examples: tuple[dict[str, Any], ...]  # one, or one for each answer of a conversation
    cut: Cut = Cut()
    remarks: frozenset[str] = frozenset()  # what was taken otherwise than written; no content of the row


class Task:
    """What a task must say. The model comes from `auto_class`; `trains_head`: its head is trained whole."""

    auto_class: ClassVar[str]
    peft_type: ClassVar[str]  # PEFT's name of the task
    trains_head: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = True

    def model_config(self, plan: RoundPlan) -> dict[str, Any]:
        """What the model's configuration must say for this plan: the labels."""
        return {
            "num_labels": len(plan.labels),
            "id2label": dict(enumerate(plan.labels)),
            "label2id": {label: i for i, label in enumerate(plan.labels)},
        }

    def model_class(self, folder: Path) -> Any:
        """What loads the base model in `folder`, with the task's head on top."""
        return getattr(transformers, self.auto_class)

    def encode(self, row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, plan: RoundPlan) -> Encoded:
        """Turn a row into examples: input_ids, labels and perhaps numbers that only the metrics need.

        Args:
            row: of a file, under the names of columns that the task reads.
            plan: its labels, and its `max_length` in tokens.
        Raises:
            BadRow: says why the row cannot be used.
        """
        raise NotImplementedError

    def targets(self, labels: Tensor) -> Tensor:
        """What the model is to answer at each position; `IGNORED` where nothing is learned."""
        return labels

    def batch(self, rows: Sequence[Mapping[str, Any]], pad_id: int) -> dict[str, Tensor]:
        """One batch as `collate` makes it, and what is learned of it: `targets`, and their `places` among the positions
        of all rows. They are found on the CPU: on a GPU, how many there are could not be known without waiting for it.
        """
        batch = collate(rows, pad_id)
        targets = self.targets(batch["labels"]).flatten()
        places = (targets != IGNORED).nonzero()[:, 0]
        return batch | {"places": places, "targets": targets[places]}

    def class_counts(self, rows: Dataset, plan: RoundPlan) -> Tensor:
        """How often each of the plan's labels occurs at the site; jobs for tasks without labels do not ask."""
        raise NotImplementedError

    def score(self, logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """What the metrics need of some of what is learned: 1-D columns, concatenated over all of it before `metrics`
        sees them.
        """
        nats = cross_entropy(logits, targets, reduction="none")
        return {"nats": nats, "answer": logits.argmax(-1), "label": targets}

    def counts(self, batch: Columns) -> dict[str, Tensor]:
        """What the metrics need of a batch besides: 1-D columns too."""
        return {}

    def metrics(self, columns: Columns, plan: RoundPlan) -> dict[str, float]:
        """Means over all examples or tokens, whatever the batch size was."""
        raise NotImplementedError


registry: Registry[Task] = Registry("task", __name__)


def label_skew(counts: Tensor) -> float:
    """The ℓ₂ distance of the distribution of labels to the uniform one, in [0, 1)."""
    return float((counts / counts.sum() - 1 / len(counts)).norm())


def text_of(row: Mapping[str, Any], column: str) -> str:
    """A non-empty string column.

    Raises:
        BadRow: it is missing, of another type or blank.
    """
    value = row.get(column)
    if not isinstance(value, str):
        raise BadRow(f"{column!r} is missing" if value is None else f"{column!r} is not a text")
    if not value.strip():
        raise BadRow(f"{column!r} is empty")
    return value


def tokenized(tokenizer: PreTrainedTokenizerBase, text: str, max_length: int, **asked: Any) -> tuple[Any, int]:
    """A text's tokens, `max_length` at most, and how many tokens more it has."""
    whole = tokenizer(text, verbose=False, **asked)
    beyond = len(whole["input_ids"]) - max_length
    if beyond <= 0:
        return whole, 0
    return tokenizer(text, truncation=True, max_length=max_length, **asked), beyond


def collate(rows: Sequence[Mapping[str, Any]], pad_id: int) -> dict[str, Tensor]:
    """One batch, padded on the right to its longest row."""
    lengths = [len(row["input_ids"]) for row in rows]
    width = max(lengths)
    batch = {"attention_mask": torch.tensor([[1] * n + [0] * (width - n) for n in lengths])}
    for name, first in rows[0].items():
        filler = pad_id if name == "input_ids" else IGNORED
        values = [row[name] for row in rows]
        if isinstance(first, list):
            values = [v + [filler] * (width - len(v)) for v in values]
        batch[name] = torch.tensor(values)
    return batch


def classification_metrics(columns: Columns, classes: Sequence[int]) -> dict[str, float]:
    """Mean loss, accuracy, and the mean F1 over `classes` (those that occur in neither labels nor answers left out)."""
    from sklearn.metrics import f1_score

    truth, answer = columns["label"].numpy(), columns["answer"].numpy()
    present = sorted({*truth.tolist(), *answer.tolist()} & set(classes))
    f1 = f1_score(truth, answer, labels=present, average="macro", zero_division=0) if present else 0.0
    return {
        "loss": float(columns["nats"].double().mean()),
        "accuracy": float((truth == answer).mean()),
        "macro_f1": float(f1),
    }
