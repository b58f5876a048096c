"""A rule as a job asks for it: by its name, or by its name and settings, which are the function's keyword arguments."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, partial
from inspect import Parameter, signature
from typing import Any, Literal, TypeVar

from pydantic import create_model

from ..config import Count, Rule, Settings, Statistic
from ..errors import ConfigError
from ..registry import Registry

T = TypeVar("T")
Read = Literal["moved", "norms", "products", "dense"]  # see `Cohort`
F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Needs:
    """What a rule reads of a round. The sites are asked for it; a job that cannot provide it is refused while it loads.

    Args:
        counts: numbers of rows and steps that a site must report.
        labels: label statistics that a site must report.
        loss: whether it reads the loss of the adapter that each site received.
        reads: what it reads of a `Cohort` that is measured from the sites' tensors, all of it in one pass.
        lateness: whether it reads how many rounds ago the adapter was sent that a site trained from.
        canonical: whether it needs the merged adapter as U Σ Vᵀ, because it acts on ΔW.
        products: whether it compares the sites' products ΔW alone, which only factored methods send.
        sums: whether it needs a merge rule that adds up what it compares, because it judges whole changes.
        fewest: the least number of updates of a round that it can compare.
    """

    counts: tuple[Count, ...] = ()
    labels: tuple[Statistic, ...] = ()
    loss: bool = False
    reads: tuple[Read, ...] = ()
    lateness: bool = False
    canonical: bool = False
    products: bool = False
    sums: bool = False
    fewest: int = 1

    def __or__(self, other: "Needs") -> "Needs":
        return Needs(
            tuple(dict.fromkeys((*self.counts, *other.counts))),
            tuple(dict.fromkeys((*self.labels, *other.labels))),
            self.loss or other.loss,
            tuple(dict.fromkeys((*self.reads, *other.reads))),
            self.lateness or other.lateness,
            self.canonical or other.canonical,
            self.products or other.products,
            self.sums or other.sums,
            max(self.fewest, other.fewest),
        )


class RuleRegistry(Registry[F]):
    """A registry of rules that are functions, each with what it needs."""

    def __init__(self, kind: str, package: str) -> None:
        super().__init__(kind, package)
        self._needs: dict[str, Needs | Callable[..., Needs]] = {}

    def register(self, name: str, needs: Needs | Callable[..., Needs] = Needs()) -> Callable[[F], F]:
        """Register the decorated function as the rule `name`. Its keyword arguments are its settings.

        Args:
            name: how jobs name the rule.
            needs: what the rule needs, or a function that derives it from the rule's settings.
        """
        self._needs[name] = needs
        return super().register(name)

    def needs(self, entries: Iterable[Rule]) -> Needs:
        """What the rules that a job asks for need together.

        Raises:
            ConfigError: an unknown name or setting, or a value out of range.
        """
        together = Needs()
        for entry in entries:
            given = with_settings(found(self, entry), entry, self.kind).keywords
            needs = self._needs.get(named(entry), Needs())
            together |= needs if isinstance(needs, Needs) else needs(**given)
        return together


def asked(registry: Registry[Callable[..., T]], entry: Rule) -> Callable[..., T]:
    """The function that `"name"` or `{"rule": "name", setting: value}` means, its settings filled in.

    Raises:
        ConfigError: an unknown name or setting, with the nearest known one, or a value out of range.
    """
    return with_settings(found(registry, entry), entry, registry.kind)


def named(entry: Rule) -> str:
    """The name of a rule as a job asks for it."""
    return entry if isinstance(entry, str) else str(entry.get("rule"))


def found(registry: Registry[T], entry: Rule) -> T:
    """The entry of `registry` that a job asks for.

    Raises:
        ConfigError: an unknown name, or settings without a name.
    """
    if not isinstance(entry, str) and "rule" not in entry:
        raise ConfigError(
            f"a {registry.kind} with settings needs its name as `rule`, one of {list(registry)}", code="no_rule_name"
        )
    return registry[named(entry)]


def with_settings(function: Callable[..., T], entry: Rule, kind: str) -> partial[T]:
    """`function` with the settings that `entry` gives filled in, and its own defaults for the others.

    Raises:
        ConfigError: an unknown setting, with the nearest known one, or a value out of range.
    """
    values = {} if isinstance(entry, str) else {key: value for key, value in entry.items() if key != "rule"}
    given = settings_of(function).read(values, f"{kind} ({named(entry)})")
    return partial(function, **given.model_dump())


@cache
def settings_of(function: Callable[..., Any]) -> type[Settings]:
    """The keyword-only arguments of a rule, as settings; each is annotated with pydantic's `Field`."""
    arguments = signature(function, eval_str=True).parameters.values()
    fields: dict[str, Any] = {p.name: (p.annotation, p.default) for p in arguments if p.kind == Parameter.KEYWORD_ONLY}
    return create_model("settings", __base__=Settings, **fields)
