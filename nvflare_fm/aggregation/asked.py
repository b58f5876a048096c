"""A rule as a job asks for it: by its name, or by its name and settings, which are the function's keyword arguments."""

from collections.abc import Callable, Mapping
from functools import partial
from inspect import Parameter, signature
from typing import Any, TypeVar

from pydantic import create_model

from ..config import Rule, Settings
from ..errors import ConfigError
from ..registry import Registry

T = TypeVar("T")


def asked(registry: Registry[Callable[..., T]], entry: str | Mapping[str, Any]) -> Callable[..., T]:
    """The function that `"name"` or `{"rule": "name", setting: value}` means, its settings filled in.

    Raises:
        ConfigError: an unknown name or setting, with the nearest known one, or a value out of range.
    """
    values = {"rule": entry} if isinstance(entry, str) else dict(entry)
    if "rule" not in values:
        raise ConfigError(f"a {registry.kind} with settings needs its name as `rule`, one of {list(registry)}")
    name = values.pop("rule")
    function = registry[name]
    given = settings_of(function).read(values, f"{registry.kind} ({name})")
    return partial(function, **given.model_dump())


def named(entry: Rule) -> str:
    """The name of a rule as a job asks for it."""
    return entry if isinstance(entry, str) else str(entry.get("rule"))


def settings_of(function: Callable[..., Any]) -> type[Settings]:
    """The keyword-only arguments of a rule, as settings; each is annotated with pydantic's `Field`."""
    arguments = signature(function, eval_str=True).parameters.values()
    fields: dict[str, Any] = {p.name: (p.annotation, p.default) for p in arguments if p.kind == Parameter.KEYWORD_ONLY}
    return create_model("settings", __base__=Settings, **fields)
