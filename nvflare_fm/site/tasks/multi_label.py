"""Any number of labels for a text: columns `text` and `labels`, a list of the plan's labels, or of their places there.

Each label is a yes or no of its own, learned with binary cross-entropy; a model says yes above a probability of ½.
"""

import json
from collections.abc import Mapping, Sequence
from random import Random
from typing import Any

from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits
from transformers import PreTrainedTokenizerBase

from ...config import RoundPlan
from . import BadRow, Columns, Encoded, strange_words, task, text_of
from .labels import find
from .of_text import OfText


@task("multi_label")
class MultiLabel(OfText):
    """Any number of labels for a text."""

    columns = (("text", "labels"),)

    def model_config(self, plan: RoundPlan) -> dict[str, Any]:
        return super().model_config(plan) | {"problem_type": "multi_label_classification"}

    def made_up(self, plan: RoundPlan) -> dict[str, Any]:
        return {"text": " ".join(["word"] * plan.max_length), "labels": [plan.labels[0]]}

    def canary(self, plan: RoundPlan, random: Random) -> dict[str, Any]:
        chosen = [label for label in plan.labels if random.random() < 0.5]
        return {"text": " ".join(strange_words(random, 2)), "labels": chosen}

    def encode(self, row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, plan: RoundPlan) -> Encoded:
        text = text_of(row, "text")
        found = [find(label, plan.labels) for label in _listed(row.get("labels"), len(plan.labels))]
        places = {place for place, _ in found}
        if len(places) < len(found):
            raise BadRow(
                "'labels' has a label twice; list the labels of a text, not a 0 or 1 for each label", code="label_twice"
            )
        target = [float(place in places) for place in range(len(plan.labels))]
        return self.encoded(text, target, tokenizer, plan, frozenset(remark for _, remark in found if remark))

    def loss_of(self, answers: Tensor, targets: Tensor) -> Tensor:
        """Σ over texts of the mean over labels: the mean over texts is torch's BCEWithLogitsLoss."""
        return binary_cross_entropy_with_logits(answers, targets, reduction="sum") / targets.shape[1]

    def score(self, logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
        nats = binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(-1)
        return {"nats": nats, "answer": logits, "label": targets}

    def metrics(self, columns: Columns, plan: RoundPlan) -> dict[str, float]:
        """Mean loss, F1 over all yes and no together and as a mean over labels, and the mean over labels of the average
        precision. Labels that no text has are left out of means over labels: nothing is known of them.
        """
        from sklearn.metrics import average_precision_score, f1_score

        truth, answer = columns["label"].numpy().astype(int), columns["answer"].numpy()
        metrics = {
            "loss": float(columns["nats"].double().mean()),
            "micro_f1": float(f1_score(truth, answer > 0, average="micro", zero_division=0)),
        }
        if present := [place for place in range(truth.shape[1]) if truth[:, place].any()]:
            of_labels = [(truth[:, place], answer[:, place]) for place in present]
            f1 = [f1_score(ours, said > 0, zero_division=0) for ours, said in of_labels]
            precision = [average_precision_score(ours, said) for ours, said in of_labels]
            metrics["macro_f1"] = float(sum(f1) / len(f1))
            metrics["mean_average_precision"] = float(sum(precision) / len(precision))
        return metrics


def _listed(given: Any, most: int) -> Sequence[Any]:
    """A row's labels. A table holds them as a JSON list, as pandas and `datasets` write it.

    Raises:
        BadRow: it is no list, or a list of more labels than there are.
    """
    if given is None or given == "":
        raise BadRow("'labels' is missing; write [] where no label applies", code="value_missing")
    if isinstance(given, str) and given.strip().startswith("["):
        try:
            given = json.loads(given.replace("'", '"') if '"' not in given else given)
        except (ValueError, RecursionError):
            raise BadRow('\'labels\' is no list; write ["one", "another"]', code="labels_no_list") from None
    if not isinstance(given, list):
        raise BadRow('\'labels\' is no list; write ["one", "another"]', code="labels_no_list")
    if len(given) > most:
        raise BadRow("'labels' has more labels than the plan", code="too_many_labels")
    return given
