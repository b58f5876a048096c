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


def nearest(name: str, known: list[str]) -> str:
    """`'did you mean "examples"? '` where something known looks like `name`, else nothing."""
    match = get_close_matches(name, known, n=1)
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
                raise ConfigError(f"two {self.kind}s are called {name!r}; rename one")
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
