"""The arguments of our components: whoever writes a job writes them, so each is typed and bounded before it is used."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import ConfigDict, StringConstraints

from ..config import Settings

Id = Annotated[str, StringConstraints(max_length=64, pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")]
OptionalId = Annotated[str, StringConstraints(max_length=64, pattern=r"^([A-Za-z0-9_][A-Za-z0-9_.-]*)?$")]
A_YEAR = 366 * 24 * 3600.0  # seconds
SITES = 100_000  # no federation has more


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
