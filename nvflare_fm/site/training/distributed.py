"""One site, several processes (`torch.distributed.run`): what they must tell each other. Alone, each is a no-op."""

import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

T = TypeVar("T")


def join() -> None:
    """Joins the other processes of this site, where a launcher started several and nobody joined them yet."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not distributed.is_initialized():
        from accelerate import PartialState

        PartialState(cpu=not torch.cuda.is_available(), backend=backend())


def backend() -> str:
    """What the processes speak through: NCCL where each has a GPU of its own. It refuses two on one GPU."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return "nccl" if torch.cuda.is_available() and torch.cuda.device_count() >= local else "gloo"


def processes() -> tuple[int, int]:
    """(this process's number, how many there are)."""
    if not distributed.is_initialized():
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def any_process(flag: bool) -> bool:
    """Whether any process says so. All must ask at the same place, or they wait for each other forever."""
    if processes()[1] == 1:
        return flag
    device = "cuda" if distributed.get_backend() == "nccl" else "cpu"
    said = torch.tensor(int(flag), device=device)
    distributed.all_reduce(said, op=distributed.ReduceOp.MAX)
    return bool(said)


def sum_once(vector: Tensor, finish: Callable[[Tensor], Tensor]) -> Tensor:
    """Finish the sum of all processes' vectors in the first process, once, and hand the outcome to all of them."""
    if processes()[1] == 1:
        return finish(vector)
    distributed.reduce(vector, 0)
    if processes()[0] == 0:
        vector = finish(vector)
    distributed.broadcast(vector, 0)
    return vector


def gather(value: T) -> list[T]:
    """The value of every process, in their order."""
    world = processes()[1]
    if world == 1:
        return [value]
    values: list[Any] = [None] * world
    distributed.all_gather_object(values, value)
    return values
