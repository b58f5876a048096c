"""A head's steps by one second moment a tensor, as in NovoGrad (arXiv:1905.11286), with Adam's momentum.

Adam divides each entry's gradient by that entry's own usual size. In the few steps of a round, the rows of classes that
no batch held so move as far as those of classes it did hold, away from everything, and the mean over sites keeps that.
Divided by one size for the tensor, entries move in proportion to their gradients.
"""

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class LayerwiseStep:
    """An optimizer's pre-step hook that moves `parameters` itself and leaves it nothing of them to do.

    With gradient g: m ← β₁m + (1−β₁)g, v ← β₂v + (1−β₂)·mean(g²), w ← w − ratio·lr·m̂/√v̂, both moments corrected for
    their start at 0. Rate lr, betas and weight decay (decoupled, as AdamW's) are those of the parameter's group.
    """

    def __init__(self, parameters: list[Tensor], ratio: float = 1.0) -> None:
        self.moments = {p: (torch.zeros_like(p), p.new_zeros(())) for p in parameters}
        self.ratio, self.steps = ratio, 0

    @torch.no_grad()
    def __call__(self, optimizer: Optimizer, *args: Any) -> None:
        self.steps += 1
        for group in optimizer.param_groups:
            for p in group["params"]:
                if p in self.moments and p.grad is not None:
                    self._move(p, p.grad, group)
                    p.grad = None

    def _move(self, p: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        (first, second), (beta1, beta2) = self.moments[p], group["betas"]
        first.lerp_(gradient, 1 - beta1)
        second.lerp_(gradient.square().mean(), 1 - beta2)
        size = (second / (1 - beta2**self.steps)).sqrt() + group["eps"]
        rate = self.ratio * group["lr"]
        p.mul_(1 - rate * group["weight_decay"])
        p.sub_(first / size, alpha=rate / (1 - beta1**self.steps))
