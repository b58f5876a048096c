"""Tasks: how a row of data becomes token ids, batches and a loss, and how the model's answers become metrics.

One file a task. What a server must know of it stands in `job/tasks.py`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import transformers
from datasets import Dataset
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerBase

from ...config import RoundPlan
from ...errors import ConfigError
from ...job.tasks import TASKS, Promises
from ...registry import Registry
from ..training import logits

if TYPE_CHECKING:
    from ..model.base_model import BaseModel
    from ..training.class_shift import ClassShift

IGNORED = -100  # the label of a position that is not learned, by PyTorch's convention
Columns = Mapping[str, Tensor]
Groups = tuple[tuple[str, ...], ...]  # columns that a task reads; one group of them is enough


def counted(count: int, one: str, many: str) -> str:
    """A count with its word."""
    return f"{count} {one if count == 1 else many}"


class BadRow(Exception):
    """A row that cannot be trained on.

    Args:
        reason: must not repeat any of the row's content.
        code: a name for this kind of mistake, which stays when the wording changes.
        tells_job: whether the job learns this reason, where every row of a site is so; otherwise it learns only that
            the site's rows cannot be used.
        hint: what else the site's own log may say of this row. Called for the few rows that it lists.
    """

    def __init__(self, reason: str, *, code: str, tells_job: bool = False, hint: Callable[[], str] = str) -> None:
        super().__init__(reason)
        self.code, self.tells_job, self.hint = code, tells_job, hint


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
    """What a task must say. As it stands, a batch's loss is cross-entropy at each place that is learned.

    Args:
        promises: what the server knows of it.
    """

    columns: ClassVar[Groups]

    def __init__(self, promises: Promises) -> None:
        self.promises = promises

    def check_labels(self, plan: RoundPlan) -> None:
        """Hold a plan's labels against what the task needs.

        Raises:
            ConfigError: there are too few.
        """
        if len(plan.labels) < (least := self.promises.least_labels):
            raise ConfigError(f"{plan.task} needs the plan's labels, at least {least}", code="too_few_labels")

    def model_config(self, plan: RoundPlan) -> dict[str, Any]:
        """What the model's configuration must say for this plan: the labels."""
        if not self.promises.least_labels:
            return {}
        return {
            "num_labels": len(plan.labels),
            "id2label": dict(enumerate(plan.labels)),
            "label2id": {label: i for i, label in enumerate(plan.labels)},
        }

    def model_class(self, folder: Path) -> Any:
        """What loads the base model in `folder`, with the task's head on top."""
        return getattr(transformers, self.promises.auto_class)

    def made_up(self, plan: RoundPlan) -> dict[str, Any]:
        """A row of at least `max_length` tokens in each of its texts, to try out how fast a machine is."""
        raise NotImplementedError

    def canary(self, plan: RoundPlan, random: Random) -> dict[str, Any]:
        """A row that nobody has written, with a target that nothing but the row itself tells: see `site/audit`."""
        raise NotImplementedError

    def guessed_labels(self, found: Sequence[str], longest: int) -> tuple[str, ...]:
        """The `labels` that a plan could have for a file, where no plan is at hand.

        Args:
            found: different values of the column with labels, in order.
            longest: list in that column.
        """
        return tuple(found) if self.promises.least_labels else ()

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
        of all rows, or among the rows where a text has one answer. They are found on the CPU: on a GPU, how many there
        are could not be known without waiting for it.
        """
        batch = collate(rows, pad_id)
        targets = self.targets(batch["labels"]).flatten()
        places = (targets != IGNORED).nonzero()[:, 0]
        return batch | {"places": places, "targets": targets[places]}

    def items(self, batch: Columns) -> int:
        """How many losses a batch's loss is the sum of: a step's gradient is that of the mean over its batches."""
        return len(batch["targets"])

    def class_counts(self, rows: Dataset, plan: RoundPlan) -> Tensor:
        """How often each of the plan's classes occurs at the site. Only tasks with exclusive classes are asked."""
        raise NotImplementedError

    def loss(
        self, model: Any, base: "BaseModel", batch: Columns, plan: RoundPlan, shift: "ClassShift | None" = None
    ) -> Tensor:
        """The sum of the losses of a batch, with its gradient.

        Args:
            model: the base model with its adapter, as it trains.
            shift: what is done to the logits of classes, where the plan asks for it.
        """
        return logits.total(
            model, base, batch, lambda answers, targets: self.loss_of(shift(answers) if shift else answers, targets)
        )

    def loss_of(self, answers: Tensor, targets: Tensor) -> Tensor:
        """The sum of the losses of some logits, (items, …), where each place has a loss of its own."""
        return cross_entropy(answers, targets, reduction="sum")

    def measure(self, model: Any, base: "BaseModel", batch: Columns, plan: RoundPlan) -> list[dict[str, Tensor]]:
        """What the metrics need of a batch, in parts that are concatenated over all batches before `metrics` sees them.
        A column may be missing in some of the parts.
        """
        return [*logits.each(model, base, batch, self.score), self.counts(batch)]

    def score(self, logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """What the metrics need of some of what is learned: columns, by their names."""
        nats = cross_entropy(logits, targets, reduction="none")
        return {"nats": nats, "answer": logits.argmax(-1), "label": targets}

    def counts(self, batch: Columns) -> dict[str, Tensor]:
        """What the metrics need of a batch besides: 1-D columns too."""
        return {}

    def metrics(self, columns: Columns, plan: RoundPlan) -> dict[str, float]:
        """Means over all examples or tokens, whatever the batch size was."""
        raise NotImplementedError


registry: Registry[Task] = Registry("task", __name__)


def task(name: str) -> Callable[[type[Task]], type[Task]]:
    """Registers a task under its name in a plan, with what the server knows of it."""

    def add(kind: type[Task]) -> type[Task]:
        registry.register(name)(kind(TASKS[name]))
        return kind

    return add


def label_skew(counts: Tensor) -> float:
    """The ℓ₂ distance of the distribution of labels to the uniform one, in [0, 1)."""
    return float((counts / counts.sum() - 1 / len(counts)).norm())


def text_of(row: Mapping[str, Any], column: str) -> str:
    """A non-empty string column.

    Raises:
        BadRow: it is missing, of another type or blank.
    """
    value = row.get(column)
    if value is None:
        raise BadRow(f"{column!r} is missing", code="value_missing")
    if not isinstance(value, str):
        raise BadRow(f"{column!r} is not a text", code="value_not_text")
    if not value.strip():
        raise BadRow(f"{column!r} is empty", code="value_empty")
    return value


def strange_words(random: Random, count: int) -> list[str]:
    """Words of no language that can be read aloud."""
    return ["".join(random.choice("bdfgklmnprstvz") + random.choice("aeiou") for _ in range(3)) for _ in range(count)]


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
