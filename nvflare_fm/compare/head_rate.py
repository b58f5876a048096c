"""A learning rate of its own for a head, whatever optimizer a method trains it with: its steps times a factor."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from ..adapter import AdapterUpdate, RoundTask
from ..site.model.attach import heads
from ..site.worker import Job, Worker


class OwnHeadRate(Worker):
    """A worker whose head moves `factor` times as far in each step. For Adam with a decoupled weight decay, and for the
    steps of our own heads, that is a learning rate `factor` times as high.
    """

    factor = 1.0
    _heads: Sequence[Tensor] = ()

    def _attached(self, job: Job, task: RoundTask) -> Any:
        model = super()._attached(job, task)
        self._heads = heads(model, job.base)
        return model

    def train(self, task: RoundTask) -> AdapterUpdate:
        with self._stretched():
            return super().train(task)

    @contextmanager
    def _stretched(self) -> Iterator[None]:
        """While it lasts, every optimizer of this process moves the heads so. A site's optimizer is made deep inside
        its training, and no setting of a job changes what this study asks for.
        """
        before: list[Tensor] = []

        def begin(*_: Any) -> None:
            before[:] = [head.detach().clone() for head in self._heads]

        @torch.no_grad()
        def end(*_: Any) -> None:
            for head, start in zip(self._heads, before, strict=True):
                head.copy_(start + self.factor * (head - start))

        hooks = register_optimizer_step_pre_hook(begin), register_optimizer_step_post_hook(end)
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def with_head_factor(worker: type[Worker], factor: float) -> type[Worker]:
    """The same worker with a head whose learning rate is `factor` times as high."""
    return worker if factor == 1 else type(worker.__name__, (OwnHeadRate, worker), {"factor": factor})
