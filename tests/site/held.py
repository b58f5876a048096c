"""What torch's tensors hold while something runs: the most bytes at once, and the largest tensor that was made."""

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Held(TorchDispatchMode):
    """Counts the memory of tensors that are made while it is entered, in the forward pass and in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.most_bytes = self.largest = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **kwargs or {})
        given = {t.untyped_storage() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage()) not in given:
                self._note(storage, tensor.numel())
        return made

    def _note(self, storage: Any, numbers: int) -> None:
        if storage in self._known:
            return
        self._known.add(storage)
        size = storage.nbytes()
        weakref.finalize(storage, self._let_go, size)
        self.bytes += size
        self.most_bytes = max(self.most_bytes, self.bytes)
        self.largest = max(self.largest, numbers)

    def _let_go(self, size: int) -> None:
        self.bytes -= size
