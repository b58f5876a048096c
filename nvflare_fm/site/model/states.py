"""What a frozen backbone makes of a text, computed once: where nothing below a head is trained, it never changes.

A text is known by its tokens, so no other text can have its states. Each is computed without padding, among texts of
its length, in batches whose size depends on that length alone: what comes out is the same whatever else is in a batch,
and whether it was kept or not. The backbone runs as when it is measured, without dropout and without a gradient.
"""

from collections.abc import Callable, Mapping, Sequence
from hashlib import blake2b
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers.modeling_outputs import ModelOutput

from ..mean_pooling import MeanPooledForSequenceClassification

if TYPE_CHECKING:
    from datasets import Dataset

    from .base_model import BaseModel

Ids = tuple[int, ...]  # of a text's tokens
_AT_ONCE = 256  # tokens; of a longer text, one
_AHEAD = 2048  # texts
_BESIDE = 400  # bytes that a kept text takes besides its numbers


class States:
    """The answers of frozen backbones, by text: in memory alone, for one job.

    Args:
        most_bytes: they may take; beyond it nothing more is kept, and such texts are computed again each time.
    """

    def __init__(self, most_bytes: float = 0) -> None:
        self.most_bytes, self.bytes, self.full = most_bytes, 0, most_bytes <= 0
        self._kept: WeakKeyDictionary[nn.Module, dict[bytes, ModelOutput]] = WeakKeyDictionary()

    def of(self, backbone: nn.Module, text: Ids) -> ModelOutput | None:
        """A backbone's answer to a text, where it is kept."""
        return self._kept.get(backbone, {}).get(_digest(text))

    def keep(self, backbone: nn.Module, text: Ids, answer: ModelOutput) -> None:
        """Keep an answer, if there is room for it."""
        size = _BESIDE + sum(tensor.numel() * tensor.element_size() for tensor in answer.values())
        self.full = self.full or self.bytes + size > self.most_bytes
        if not self.full:
            self.bytes += size
            self._kept.setdefault(backbone, {})[_digest(text)] = answer


def _digest(text: Ids) -> bytes:
    return blake2b(repr(text).encode(), digest_size=16).digest()


def freeze_backbone(base: "BaseModel", states: States) -> None:
    """Have a lent model take its backbone's answers from `states`, if the task has a head and nothing below is trained.

    What the model drops in front of its head it drops no more: the head sees what never changes. Giving the model back
    undoes both.

    Args:
        base: lent, with its adapter.
        states: of this job.
    """
    model, name = base.model, base.model.base_model_prefix
    backbone = model._modules.get(name)
    if base.task.promises.learns_text or backbone is None or any(p.requires_grad for p in backbone.parameters()):
        return
    model._modules[name] = FrozenBackbone(backbone, base, states)
    for place, child in [*model.named_children()]:
        if isinstance(child, nn.Dropout):
            model._modules[place] = nn.Identity()


def prepare(base: "BaseModel", rows: "Dataset", chosen: Sequence[int], should_stop: Callable[[], bool]) -> None:
    """Compute what is not kept of some rows' texts, until no room is left: together they fill batches of one length.

    Args:
        base: as `freeze_backbone` left it.
        rows: tokenized.
        chosen: their numbers.
        should_stop: ends it.
    """
    backbone = base.model._modules.get(base.model.base_model_prefix)
    if not isinstance(backbone, FrozenBackbone):
        return
    for start in range(0, len(chosen), _AHEAD):
        if backbone.states.full or should_stop():
            return
        some = sorted({*chosen[start : start + _AHEAD]})
        backbone.answers([tuple(text) for text in rows.select(some)["input_ids"][:]])


class FrozenBackbone(nn.Module):
    """Stands in a backbone's place, and computes only what is not kept.

    An answer holds zeros where a text is padded; of a text of which the head reads one state alone, it holds that.
    """

    def __init__(self, backbone: nn.Module, base: "BaseModel", states: States) -> None:
        super().__init__()
        self.backbone, self.base, self.states = backbone, base, states
        self.eval()

    def __getattr__(self, name: str) -> Any:
        """What else a model asks of its backbone."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("backbone"), name)

    def train(self, mode: bool = True) -> "FrozenBackbone":
        """Stay as it is when it is measured, whatever the head does."""
        return super().train(False)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Answer as the backbone does. What is asked or answered in another form is left to the backbone itself."""
        texts = _texts(*args, **kwargs)
        answers = self.answers(texts) if texts else None
        if not texts or answers is None:
            with torch.no_grad():
                return self.backbone(*args, **kwargs)
        rows = [answers[text] for text in texts]
        return type(rows[0])(**{name: self._batch([row[name] for row in rows]) for name in rows[0]})

    def _batch(self, rows: list[Tensor]) -> Tensor:
        batch = pad_sequence(rows, batch_first=True) if rows[0].ndim > 1 else torch.stack(rows)
        return batch.to(self.base.model.device)

    def answers(self, texts: Sequence[Ids]) -> dict[Ids, ModelOutput] | None:
        """The answer to each text; None: answers have a form that cannot be taken apart."""
        known = {text: self.states.of(self.backbone, text) for text in dict.fromkeys(texts)}
        answers = {text: answer for text, answer in known.items() if answer is not None}
        lacking: dict[int, list[Ids]] = {}
        for text in [text for text in known if text not in answers]:
            lacking.setdefault(len(text), []).append(text)
        for length, group in lacking.items():
            at_once = 1 if self.base.quantization == "int8" else max(1, _AT_ONCE // length)  # see `per_sample`
            for start in range(0, len(group), at_once):
                some = group[start : start + at_once]
                found = self._computed(some + some[-1:] * (at_once - len(some)))
                if found is None:
                    return None
                for text, answer in zip(some, found, strict=False):  # the last one is there several times
                    self.states.keep(self.backbone, text, answer)
                    answers[text] = answer
        return answers

    def _computed(self, texts: list[Ids]) -> list[ModelOutput] | None:
        """The answers to texts of one length; None: they cannot be taken apart."""
        with torch.inference_mode(False), torch.no_grad(), self.base.autocast():
            ids = torch.tensor(texts, device=self.base.model.device)
            answer = self.backbone(input_ids=ids, attention_mask=torch.ones_like(ids))
            if not isinstance(answer, ModelOutput) or not all(_is_of(each, ids) for each in answer.values()):
                return None
            found = {name: tensor.cpu() for name, tensor in answer.items()}
            if isinstance(self.base.model, MeanPooledForSequenceClassification):
                found = {"last_hidden_state": found["last_hidden_state"].mean(1, keepdim=True)}
        return [type(answer)(**{n: t[place].clone() for n, t in found.items()}) for place in range(len(texts))]


def _is_of(value: Any, ids: Tensor) -> bool:
    """Whether an answer's part holds something for each text, or for each token of it."""
    return isinstance(value, Tensor) and (value.ndim == 2 or (value.ndim == 3 and value.shape[:2] == ids.shape))


def _texts(*args: Any, **kwargs: Any) -> list[Ids] | None:
    """The texts of a call, without padding; None: it asks for more than answers to texts padded on the right."""
    known: Mapping[str, Any] = {**dict(zip(("input_ids", "attention_mask"), args, strict=False)), **kwargs}
    given = {name: value for name, value in known.items() if isinstance(value, Tensor)}
    if set(given) != {"input_ids", "attention_mask"} or len(args) > 2 or known.get("output_hidden_states"):
        return None
    ids, mask = given["input_ids"].cpu(), given["attention_mask"].cpu()
    if ids.ndim != 2 or mask.shape != ids.shape:
        return None
    lengths = mask.long().sum(1)
    if bool((lengths < 1).any()) or not torch.equal(mask, (torch.arange(ids.shape[1]) < lengths[:, None]).to(mask)):
        return None
    return [tuple(row[:length]) for row, length in zip(ids.tolist(), lengths.tolist(), strict=True)]
