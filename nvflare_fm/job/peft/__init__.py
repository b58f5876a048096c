"""PEFT methods as a job names them: their settings, what they promise, and what PEFT is to be configured with.

Neither peft nor transformers is imported: the server decides by these promises. A site puts a method on its model by
`site/peft_methods`; only a method that needs more than PEFT's own way has a file there, too.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from ...config import Settings, TrainingSettings
from ...errors import ConfigError
from ...registry import Registry


class PeftMethod(Settings):
    """Settings of one method, and its promises."""

    peft_type: ClassVar[str]  # PEFT's own name of the method
    factored: ClassVar[bool] = False  # whether it sends B @ A pairs
    checkpointing: ClassVar[bool] = True  # whether activations may be computed a second time
    adapts: ClassVar[bool] = True  # whether it changes the base model; otherwise only modules trained whole learn

    @property
    def scale(self) -> float:
        """Of the pairs it trains; 1 where it has none."""
        return 1.0

    @property
    def side_adapter(self) -> bool:
        """Whether directions above the site's rank can ride along frozen: ΔW must be additive."""
        return False

    @property
    def trained_whole(self) -> tuple[str, ...]:
        """Modules that are trained beside the method's own parameters, so they must stay out of quantization."""
        return tuple(getattr(self, "modules_to_save", ()))

    @property
    def virtual_tokens(self) -> int:
        """How many positions it takes up before a text."""
        return int(getattr(self, "num_virtual_tokens", 0))

    def arguments(self, heads: Sequence[str]) -> dict[str, Any]:
        """Give the arguments of PEFT's configuration of the trained adapter, but for its task.

        Args:
            heads: modules of the base model that are new for the task, and trained whole.
        """
        raise NotImplementedError


registry: Registry[type[PeftMethod]] = Registry("PEFT method", __name__)


def read(settings: Mapping[str, Any]) -> PeftMethod:
    """Read the method that `{"method": name, …}` describes.

    Raises:
        ConfigError: an unknown method or setting, with the nearest known one.
    """
    values = dict(settings)
    if "method" not in values:
        raise ConfigError(f"peft needs a method, one of {list(registry)}", code="no_method")
    name = values.pop("method")
    return registry[name].read(values, f"peft ({name})")


def check_training(method: PeftMethod, settings: TrainingSettings) -> None:
    """Refuse training settings that a PEFT method cannot use.

    Raises:
        ConfigError: the method cannot be trained so.
    """
    if settings.gradient_checkpointing and not method.checkpointing:
        raise ConfigError(
            f"{method.peft_type.lower()} does not go with gradient_checkpointing; use another method, or turn it off",
            code="no_checkpointing",
        )


def complete(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Write the method's defaults out, so that whoever reads the rank finds it.

    Raises:
        ConfigError: as `read`.
    """
    return {"method": settings.get("method"), **read(settings).model_dump()}
