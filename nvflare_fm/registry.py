"""A dictionary that fills itself once from a folder, and explains itself when asked for a name it lacks.

The folder is the list: a new entry is a new file, and no other file changes.
"""

import pkgutil
from collections.abc import Callable, Iterator
from difflib import get_close_matches
from importlib import import_module
from typing import Generic, TypeVar

from .errors import ConfigError

T = TypeVar("T")


_ELSEWHERE = {  # what a setting is called in other libraries, or for short
    "lr": "learning_rate", "r": "rank", "lora_r": "rank", "lora_rank": "rank", "alpha": "lora_alpha",
    "dropout": "lora_dropout", "steps": "local_steps", "max_steps": "local_steps", "epochs": "local_epochs",
    "num_epochs": "local_epochs", "num_train_epochs": "local_epochs", "bs": "batch_size",
    "per_device_train_batch_size": "batch_size", "grad_accum": "gradient_accumulation_steps",
    "max_seq_length": "max_length", "rounds": "num_rounds", "classes": "labels", "base_model": "model",
    "dataset": "data", "strategy": "merge", "aggregation": "merge", "min_clients": "min_responses",
    "wd": "weight_decay", "acc": "accuracy", "f1": "macro_f1", "macro_f1": "f1",
}  # fmt: skip


def nearest(name: str, known: list[str]) -> str:
    """`'did you mean "examples"? '` where something known looks like `name` or is what others call it, else nothing."""
    habit = _ELSEWHERE.get(name.lower())
    same = sorted((each for each in known if each.rpartition(".")[2] == habit), key=len)
    match = same or get_close_matches(name, known, n=1)
    return f'did you mean "{match[0]}"? ' if match else ""


class Registry(Generic[T]):
    """Name → entry, filled on first use by importing every module of `package`.

    Args:
        kind: what an entry is, in words, for errors ("merge rule").
        package: dotted name of the folder whose modules register the entries.
    """

    def __init__(self, kind: str, package: str) -> None:
        self.kind, self.package = kind, package
        self._entries: dict[str, T] = {}
        self._filled = False

    def register(self, name: str) -> Callable[[T], T]:
        def add(entry: T) -> T:
            if name in self._entries:
                raise ConfigError(f"two {self.kind}s are called {name!r}; rename one", code="name_taken")
            self._entries[name] = entry
            return entry

        return add

    def _fill(self) -> dict[str, T]:
        if not self._filled:
            package = import_module(self.package)
            for module in pkgutil.iter_modules(package.__path__):
                import_module(f"{self.package}.{module.name}")
            self._filled = True
        return self._entries

    def __getitem__(self, name: str) -> T:
        entries = self._fill()
        if name not in entries:
            hint = nearest(str(name), list(entries))
            raise ConfigError(
                f"no {self.kind} of that name; {hint}known: {sorted(entries)}", repr(name), code="unknown_name"
            )
        return entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._fill()))
