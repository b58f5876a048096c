"""What a job and its server must know of each task, without transformers: promises that decide what a name would.

What a task does with rows, logits and metrics is in `site/tasks/`, one file each.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from ..errors import ConfigError
from ..registry import nearest

Better = Literal["min", "max"]


@dataclass(frozen=True)
class Promises:
    """What follows from a plan's task, whoever reads the plan.

    Args:
        peft_type: PEFT's name of the task.
        auto_class: transformers' class of the base model, with the task's head on top.
        pipeline: the Hugging Face hub's name of what the model does.
        metrics: what the sites report, and which end of it is better.
        least_labels: how many `labels` a plan needs at least; 0: they mean nothing to the task.
        classes: the labels are classes.
        exclusive: each text, or each word, has exactly one of the classes.
        numbers: the labels name numbers that are predicted.
        learns_text: the model writes text, with the language model's own head; else a new head is trained.
        per_token: something is learned at each position, not once for each text.
        texts_per_row: so many texts are learned from in each row.
    """

    peft_type: str
    auto_class: str
    pipeline: str
    metrics: Mapping[str, Better]
    least_labels: int = 0
    classes: bool = False
    exclusive: bool = False
    numbers: bool = False
    learns_text: bool = False
    per_token: bool = False
    texts_per_row: int = 1

    @property
    def one_label(self) -> bool:
        """Whether each text has exactly one of the classes."""
        return self.exclusive and not self.per_token

    @property
    def paired(self) -> bool:
        """Whether two texts of a row are compared."""
        return self.texts_per_row == 2


_WRITES = "CAUSAL_LM", "AutoModelForCausalLM", "text-generation"
_OF_TEXTS = "SEQ_CLS", "AutoModelForSequenceClassification", "text-classification"
_OF_WORDS = "TOKEN_CLS", "AutoModelForTokenClassification", "token-classification"
_LOSS: dict[str, Better] = {"loss": "min"}

TASKS: Mapping[str, Promises] = {
    "causal_lm": Promises(
        *_WRITES,
        metrics={**_LOSS, "perplexity": "min", "bits_per_byte": "min"},
        learns_text=True,
        per_token=True,
    ),
    "preference": Promises(
        *_WRITES,
        metrics={**_LOSS, "rewards/accuracies": "max", "rewards/margins": "max"},
        learns_text=True,
        per_token=True,
        texts_per_row=2,
    ),
    "sequence_classification": Promises(
        *_OF_TEXTS,
        metrics={**_LOSS, "accuracy": "max", "macro_f1": "max"},
        least_labels=2,
        classes=True,
        exclusive=True,
    ),
    "multi_label": Promises(
        *_OF_TEXTS,
        metrics={**_LOSS, "micro_f1": "max", "macro_f1": "max", "mean_average_precision": "max"},
        least_labels=1,
        classes=True,
    ),
    "regression": Promises(
        *_OF_TEXTS,
        metrics={**_LOSS, "mae": "min", "rmse": "min", "r2": "max", "pearson": "max"},
        least_labels=1,
        numbers=True,
    ),
    "token_classification": Promises(
        *_OF_WORDS,
        metrics={**_LOSS, "accuracy": "max", "precision": "max", "recall": "max", "f1": "max"},
        least_labels=2,
        classes=True,
        exclusive=True,
        per_token=True,
    ),
}


def promises(task: str) -> Promises:
    """What is known of a task.

    Raises:
        ConfigError: there is no task of that name; the nearest one.
    """
    if task not in TASKS:
        hint = nearest(task, list(TASKS))
        raise ConfigError(f"no task of that name; {hint}known: {sorted(TASKS)}", repr(task), code="unknown_task")
    return TASKS[task]
