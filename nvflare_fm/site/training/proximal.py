"""FedProx (arXiv:1812.06127), on products: a site is pulled back to the global adapter it started from."""

from typing import Any

import torch
from transformers import TrainerCallback

from ..model.attach import LOCAL


class Proximal(TrainerCallback):  # type: ignore[misc]
    """FedProx: the gradient of μ/2 · ‖ΔW − ΔW_start‖² for LoRA's pairs, which does not see how B and A are turned
    inside the rank, and of μ/2 · ‖w − w_start‖² for all else that is trained.

    Added once a step, after clipping: clipping is to tame the data's gradient, not the pull back to the start.
    """

    def __init__(self, mu: float, scale: float) -> None:
        self.mu, self.scale = mu, scale

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        named = dict(model.named_parameters())
        factors = {n: named[n.replace(".lora_A.", ".lora_B.")] for n in named if f".lora_A.{LOCAL}." in n}
        self.pairs = [(a := named[n], b, a.detach().clone(), b.detach().clone()) for n, b in factors.items()]
        paired = {id(p) for a, b, *_ in self.pairs for p in (a, b)}
        rest = [p for p in named.values() if p.requires_grad and id(p) not in paired]
        self.singles = [(p, p.detach().clone()) for p in rest]

    @torch.no_grad()
    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        pull = self.mu * self.scale**2
        for a, b, a0, b0 in self.pairs:
            if b.grad is not None:
                b.grad.add_(b @ (a @ a.T) - b0 @ (a0 @ a.T), alpha=pull)
            if a.grad is not None:
                a.grad.add_((b.T @ b) @ a - (b.T @ b0) @ a0, alpha=pull)
        for parameter, start in self.singles:
            if parameter.grad is not None:
                parameter.grad.add_(parameter - start, alpha=self.mu)
