"""The arguments of our components: whoever writes a job writes them, so each is typed and bounded before it is used."""

from collections.abc import Callable, Mapping
from inspect import Parameter, signature
from typing import Annotated, Any, TypeVar

from pydantic import ConfigDict, StringConstraints

from ..config import Settings

C = TypeVar("C", bound=Callable[..., None])
Id = Annotated[str, StringConstraints(max_length=64, pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")]


class Arguments(Settings):
    """What a job may say to a component. No number is read from a text, and no truth from a number."""

    model_config = ConfigDict(strict=True, arbitrary_types_allowed=True)

    @classmethod
    def check(cls, given: Mapping[str, Any], where: str) -> None:
        """Check the arguments that a component was made with.

        Args:
            given: a constructor's local names, its arguments among them.

        Raises:
            ConfigError: names the component and the argument.
        """
        cls.read({name: given[name] for name in cls.model_fields}, where)


def taking(group: type[Settings]) -> Callable[[C], C]:
    """Show a group of settings in the signature of a constructor that takes them as `**settings`.

    NVFlare writes those arguments of a component into a job that its constructor's signature names.
    """

    def shown(constructor: C) -> C:
        *own, _ = signature(constructor).parameters.values()
        fields = group.model_fields.items()
        taken = [Parameter(name, Parameter.KEYWORD_ONLY, default=field.default) for name, field in fields]
        vars(constructor)["__signature__"] = signature(constructor).replace(parameters=[*own, *taken])
        return constructor

    return shown
