"""Gradients of each row of a batch by itself: by hooks on layers where that is exact, otherwise a row at a time.

Opacus' hooks (arXiv:2109.12298) read them off one backward pass. That needs every trained layer to be one that Opacus
knows and to see the rows along its first dimension, which DoRA, IA³, VeRA, prompts, and a language model's own head
do not. And a row's numbers must not depend on its neighbours, as they do in int8: there the values of a whole batch
decide which columns are computed in 16 bits. Hooks are tried against single rows before they are used. Never ghost
clipping: of a prompt it silently computes one norm for a whole batch.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from opacus.grad_sample import GradSampleHooks
from torch import Tensor, nn

from ...config import RoundPlan
from ..model.base_model import BaseModel

if TYPE_CHECKING:
    from ..tasks import Columns

Rows = Sequence[Mapping[str, Any]]
_FP16_SCALE = 2.0**10  # of the loss, for gradients in fp16; those that overflow all the same are left out
_CLOSE = {torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.1}  # of a gradient's norm: rounding, no more

_tried: WeakKeyDictionary[nn.Module, dict[Any, bool]] = WeakKeyDictionary()  # by base model


class PerSample:
    """Takes the gradient of each row's mean loss, for all that is trained of a model.

    Args:
        model: on its device, with its adapter.
        tried: rows to try hooks with, two or more; fewer: rows are taken one at a time.
    """

    def __init__(self, model: Any, base: BaseModel, plan: RoundPlan, tried: Rows) -> None:
        self.model, self.base, self.plan = model, base, plan
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.hooks: GradSampleHooks | None = None
        self.last_loss = 0.0  # the mean over all that was learned of the last rows
        if len(tried) > 1 and base.quantization != "int8" and self._known():
            self.hooks = GradSampleHooks(model, loss_reduction="sum")
            known, case = _tried.setdefault(base.model, {}), (plan.task, repr(plan.peft), self._names())
            if case not in known:
                known[case] = self._agrees(tried)
            if not known[case]:
                self.close()

    def close(self) -> None:
        """Take the hooks off the model."""
        if self.hooks is not None:
            self.hooks.cleanup()
            self.hooks = None

    def __call__(self, rows: Rows) -> list[Tensor]:
        """The gradient of each row's mean loss: for each trained parameter, (rows, *its shape), in float32."""
        items = torch.tensor([self.base.task.items(self._batch([row])) for row in rows])
        try:
            summed, nats = self._by_hooks(rows) if self.hooks is not None else self._one_by_one(rows)
        except _OtherRows:
            self.close()
            summed, nats = self._one_by_one(rows)
        self.last_loss = float(nats) / int(items.sum())
        for gradients in summed:
            gradients /= items.to(gradients).view(-1, *[1] * (gradients.ndim - 1))
        return summed

    def _names(self) -> tuple[str, ...]:
        return tuple(name for name, parameter in self.model.named_parameters() if parameter.requires_grad)

    def _known(self) -> bool:
        """Whether Opacus knows every layer that holds something trained, and none shares it."""
        holders = [m for m in self.model.modules() if any(p.requires_grad for p in m.parameters(recurse=False))]
        held = [p for m in holders for p in m.parameters(recurse=False) if p.requires_grad]
        known = all(type(m) in GradSampleHooks.GRAD_SAMPLERS for m in holders)
        return known and len(held) == len(self.trained)

    def _agrees(self, rows: Rows) -> bool:
        """Whether hooks find what single rows have. Without dropout, which differs from pass to pass."""
        training = [module for module in self.model.modules() if module.training]
        self.model.eval()
        for module in self.model.modules():
            if type(module) in GradSampleHooks.GRAD_SAMPLERS:
                module.training = True  # else Opacus does not look at it
        try:
            hooked, _ = self._by_hooks(rows)
            single, _ = self._one_by_one(rows)
        except _OtherRows:
            return False
        finally:
            self.model.eval()
            for module in training:
                module.training = True
        close = _CLOSE[self.base.compute_dtype]
        return all(
            float((ours - theirs).norm()) <= close * float(theirs.norm()) + 1e-12
            for row in range(len(rows))
            for ours, theirs in [(_flat(hooked, row), _flat(single, row))]
        )

    def _by_hooks(self, rows: Rows) -> tuple[list[Tensor], Tensor]:
        """The gradient of the sum of each row's losses, and the sum of all."""
        nats = self._backward(rows)
        found, texts = [], self.base.task.promises.texts_per_row
        for parameter in self.trained:
            gradients: Any = parameter.grad_sample
            parameter.grad_sample = parameter.grad = None
            if gradients is None:
                gradients = torch.zeros(texts * len(rows), *parameter.shape, device=parameter.device)
            if not isinstance(gradients, Tensor) or len(gradients) != texts * len(rows):
                self._forget()
                raise _OtherRows
            gradients = self._unscaled(gradients)
            found.append(gradients if texts == 1 else gradients.view(texts, len(rows), *parameter.shape).sum(0))
        return found, nats

    def _one_by_one(self, rows: Rows) -> tuple[list[Tensor], Tensor]:
        if self.hooks is not None:
            self.hooks.disable_hooks()
        found = [torch.zeros(len(rows), *p.shape, device=p.device) for p in self.trained]
        nats = torch.zeros((), device=self.trained[0].device)
        for place, row in enumerate(rows):
            nats = nats + self._backward([row])
            for into, parameter in zip(found, self.trained, strict=True):
                if parameter.grad is not None:
                    into[place] = self._unscaled(parameter.grad)
                parameter.grad = None
        if self.hooks is not None:
            self.hooks.enable_hooks()
        return found, nats

    def _backward(self, rows: Rows) -> Tensor:
        with self.base.autocast():
            nats = self.base.task.loss(self.model, self.base, self._batch(rows), self.plan)
        (nats * self._scale).backward()
        return nats.detach()

    def _batch(self, rows: Rows) -> "Columns":
        batch = self.base.task.batch(rows, pad_id=self.base.tokenizer.pad_token_id)
        return {name: tensor.to(self.base.model.device) for name, tensor in batch.items()}

    @property
    def _scale(self) -> float:
        return _FP16_SCALE if self.base.compute_dtype == torch.float16 else 1.0

    def _unscaled(self, gradients: Tensor) -> Tensor:
        return gradients.float() / self._scale if self._scale != 1 else gradients.float()

    def _forget(self) -> None:
        for parameter in self.trained:
            parameter.grad_sample = parameter.grad = None
        for module in self.model.modules():
            module.__dict__.pop("activations", None)
            module.__dict__.pop("max_batch_len", None)


class _OtherRows(Exception):
    """A trained layer did not see the rows along its first dimension."""


def _flat(gradients: Sequence[Tensor], row: int) -> Tensor:
    return torch.cat([each[row].flatten() for each in gradients])
