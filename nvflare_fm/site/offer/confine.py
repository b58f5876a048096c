"""Holds a process to the memory its site gives: beyond that it gets none, and the machine's other work goes on."""

import resource

import torch

GIB = 2**30


def confine(memory_gib: float, processes: int = 1) -> None:
    """Limits this process, one of `processes` that share `memory_gib`, for the rest of its life.

    On a GPU its memory is limited, otherwise what the process may write to (code and read-only files do not count).
    """
    share = int(memory_gib * GIB / processes)
    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, share / total))
    else:
        resource.setrlimit(resource.RLIMIT_DATA, (share, resource.getrlimit(resource.RLIMIT_DATA)[1]))
