"""LoRA+ (arXiv:2402.12354): A learns more slowly than B, and than the heads that learn beside it."""

from torch import nn
from torch.optim import Optimizer


def slow_down_a(optimizer: Optimizer, model: nn.Module, ratio: float) -> None:
    """Divides the learning rate of every trained `lora_A` by `ratio`; all else keeps the rate it has."""
    slow = {id(p) for name, p in model.named_parameters() if ".lora_A." in name}
    for group in list(optimizer.param_groups):
        found = [p for p in group["params"] if id(p) in slow]
        if found:
            group["params"] = [p for p in group["params"] if id(p) not in slow]
            optimizer.add_param_group({**group, "params": found, "lr": group["lr"] / ratio})
