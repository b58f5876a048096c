"""Memory of the device that trains: how much was taken, what running out of it looks like, and giving it back."""

import errno
import gc
import resource
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ...config import RoundPlan
from ...errors import TrainingError

_SAID = ("allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")


def ran_out(error: BaseException) -> bool:
    """Whether an error means that there is no more memory: Python, torch, CUDA and its libraries each say so in their
    own way.
    """
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return True
    return isinstance(error, RuntimeError) and any(said in str(error) for said in _SAID)


@contextmanager
def explained(plan: RoundPlan) -> Iterator[None]:
    """Turns running out of memory into an error with its remedies.

    Raises:
        TrainingError: in place of the allocator's own error.
    """
    try:
        yield
    except Exception as error:
        if not ran_out(error):
            raise
        traceback.clear_frames(error.__traceback__)  # they hold what there was no room for beside
        raise TrainingError(
            "out of memory; lower training.batch_size (and raise gradient_accumulation_steps), evaluation.batch_size "
            "or max_length, set gradient_checkpointing, or quantize to nf4; the site's admin can raise memory_gib",
            f"batch_size {plan.training.batch_size}, max_length {plan.max_length}: {error}",
            code="out_of_memory",
        ) from None


@contextmanager
def given_back() -> Iterator[None]:
    """Hands a GPU's memory back when a task is over, all but what is still in use: torch keeps what it once had, and
    other sites on the same GPU would find none.
    """
    try:
        yield
    finally:
        if _on_gpu():
            gc.collect()  # a trainer and its model know each other
            torch.cuda.empty_cache()


def watch_peak() -> None:
    """`peak_mib` is to tell of what comes from now on, where the device can forget what was before."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_mib() -> float:
    """Of the GPU since `watch_peak`; on a CPU, of the process since it began."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def _on_gpu() -> bool:
    return torch.cuda.is_available()
