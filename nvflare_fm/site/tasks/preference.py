"""The better of two answers: columns `prompt`, `chosen` and `rejected`, in each of TRL's formats.

Direct preference optimization (DPO, arXiv:2305.18290): a model learns to find the chosen answer more likely than the
rejected one, compared with a frozen reference. The reference is the base model alone, in all rounds: without the
adapter, the directions of earlier rounds that ride along frozen, and modules that are trained whole.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import takewhile
from random import Random
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, logsigmoid
from transformers import PreTrainedTokenizerBase

from ...config import RoundPlan
from ..training import logits
from . import BadRow, Columns, Encoded, Groups, task
from .causal_lm import CausalLM

if TYPE_CHECKING:
    from ..model.base_model import BaseModel
    from ..training.class_shift import ClassShift


@task("preference")
class Preference(CausalLM):
    """A row is one example: the tokens of the chosen text, followed by those of the rejected one."""

    columns: ClassVar[Groups] = (("prompt", "chosen", "rejected"), ("chosen", "rejected"))

    def made_up(self, plan: RoundPlan) -> dict[str, Any]:
        words = " ".join(["word"] * plan.max_length)
        return {"prompt": "word", "chosen": f" well {words}", "rejected": f" ill {words}"}

    def canary(self, plan: RoundPlan, random: Random) -> dict[str, Any]:
        secret, other = super().canary(plan, random), super().canary(plan, random)
        return {"prompt": secret["prompt"], "chosen": secret["completion"], "rejected": other["completion"]}

    def encode(self, row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, plan: RoundPlan) -> Encoded:
        prompt, *answers = _parts(row)
        beside = {name: row.get(name) for name in ("tools", "system")} | {"prompt": prompt}
        found = []
        for name, answer in zip(("chosen", "rejected"), answers, strict=True):
            try:
                found.append(super().encode(beside | {"completion": answer}, tokenizer, plan))
            except BadRow as reason:
                said = str(reason).replace("'completion'", repr(name))
                raise BadRow(said, code=reason.code, tells_job=reason.tells_job) from None
            if len(found[-1].examples) > 1:
                raise BadRow(
                    f"{name!r} has several answers, and the base model's chat template rewrites earlier ones; give one",
                    code="several_answers",
                )
        chosen, rejected = (each.examples[0] for each in found)
        cut = found[0].cut + found[1].cut
        if cut.tokens and chosen["input_ids"] == rejected["input_ids"]:
            raise BadRow(
                f"'chosen' and 'rejected' are the same in max_length = {plan.max_length} tokens", code="same_answers"
            )
        example = {name: chosen[name] + rejected[name] for name in ("input_ids", "labels")}
        return Encoded(({**example, "chosen_tokens": len(chosen["input_ids"])},), replace(cut, rows=min(cut.rows, 1)))

    def batch(self, rows: Sequence[Mapping[str, Any]], pad_id: int) -> dict[str, Tensor]:
        """The chosen texts, then the rejected ones in the same order, and of each learned token the text it is in."""
        halves = [(slice(row["chosen_tokens"]), slice(row["chosen_tokens"], None)) for row in rows]
        texts = [
            {name: row[name][half[which]] for name in ("input_ids", "labels")}
            for which in (0, 1)
            for row, half in zip(rows, halves, strict=True)
        ]
        batch = super().batch(texts, pad_id)
        return batch | {"texts": batch["places"] // batch["input_ids"].shape[1]}

    def items(self, batch: Columns) -> int:
        return len(batch["input_ids"]) // 2

    def loss(
        self, model: Any, base: "BaseModel", batch: Columns, plan: RoundPlan, shift: "ClassShift | None" = None
    ) -> Tensor:
        return -logsigmoid(_margins(model, base, batch, plan)).sum()

    def measure(self, model: Any, base: "BaseModel", batch: Columns, plan: RoundPlan) -> list[dict[str, Tensor]]:
        return [{"margin": _margins(model, base, batch, plan).detach()}]

    def metrics(self, columns: Columns, plan: RoundPlan) -> dict[str, float]:
        """Mean loss; how often the chosen answer has the larger reward; by how much it is larger, in the mean."""
        margin = columns["margin"].double()
        return {
            "loss": float(-logsigmoid(margin).mean()),
            "rewards/accuracies": float((margin > 0).double().mean()),
            "rewards/margins": float(margin.mean()),
        }


def _margins(model: Any, base: "BaseModel", batch: Columns, plan: RoundPlan) -> Tensor:
    """β · (log π(chosen)/π₀(chosen) − log π(rejected)/π₀(rejected)) of each row; π₀ is the reference."""
    with torch.no_grad(), without_adapter(base.model), base.autocast():
        before = _log_probabilities(base.model, base, batch)
    chosen, rejected = (_log_probabilities(model, base, batch) - before).chunk(2)
    return plan.training.dpo_beta * (chosen - rejected)


def _log_probabilities(model: Any, base: "BaseModel", batch: Columns) -> Tensor:
    """log π of the answer of each text, (texts,): the sum over its tokens."""
    nats = logits.values(model, base, batch, lambda said, targets: cross_entropy(said, targets, reduction="none"))
    return nats.new_zeros(len(batch["input_ids"])).index_add(0, batch["texts"], -nats)


@contextmanager
def without_adapter(model: nn.Module) -> Iterator[None]:
    """The base model as it is without any adapter and without dropout, as long as it lasts.

    PEFT's own way to switch adapters on again would make all of them trainable, those that ride along frozen too.
    """
    parts = [m for m in model.modules() if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper)]
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        for part in parts:
            part.enable_adapters(False)
        yield
    finally:
        for part in parts:
            part.enable_adapters(True)
        for parameter, is_trained in trained:
            parameter.requires_grad_(is_trained)
        for module in training:
            module.training = True


def _parts(row: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    """The prompt, the chosen and the rejected answer. Without a prompt, it is what both answers begin with. So it is
    where the answers are whole conversations and the prompt stands beside them as a text.

    Raises:
        BadRow: one of them is missing, or the answers do not begin alike.
    """
    prompt: Any = row.get("prompt")
    chosen: Any = row.get("chosen")
    rejected: Any = row.get("rejected")
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        if answer is None:
            raise BadRow(f"{name!r} is missing", code="value_missing")
        if not isinstance(answer, str | list):
            raise BadRow(f"{name!r} is neither a text nor a list of messages", code="not_an_answer")
    if not isinstance(rejected, type(chosen)):
        raise BadRow(
            "one of 'chosen' and 'rejected' is a text, the other a list of messages", code="answers_differ_in_kind"
        )
    if chosen == rejected:
        raise BadRow("'chosen' and 'rejected' are the same", code="same_answers")
    if prompt is not None and isinstance(prompt, type(chosen)):
        return prompt, chosen, rejected
    if prompt is not None and isinstance(chosen, str):
        raise BadRow("'prompt' is no text, 'chosen' and 'rejected' are texts", code="prompt_not_text")
    alike = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False))))
    if isinstance(chosen, str) and chosen[:alike].endswith(" "):
        alike -= 1  # the blank before a word belongs to it
    if not alike or alike == min(len(chosen), len(rejected)):
        raise BadRow(
            "'prompt' is missing, and 'chosen' and 'rejected' do not begin alike and then go on differently",
            code="no_common_prompt",
        )
    return chosen[:alike], chosen[alike:], rejected[alike:]
