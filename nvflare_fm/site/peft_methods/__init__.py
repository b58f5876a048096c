"""PEFT methods: what each trains, what of it travels, and how a global adapter is fitted into a site's model."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from ...adapter import Adapter
from ...config import Settings
from ...errors import ConfigError
from ...registry import Registry

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel


class PeftMethod(Settings):
    """Settings of one method, and what it does at a site. PEFT itself is imported only when a site calls it.

    Subclasses set `factored` where the method sends B @ A pairs, and `side_adapter` where directions above the
    site's rank can ride along frozen (needs ΔW to be additive, which DoRA's is not).
    """

    factored: ClassVar[bool] = False
    side_adapter: ClassVar[bool] = False

    def config(self, task_type: str, modules_to_save: tuple[str, ...]) -> "PeftConfig":
        """PEFT's configuration of the trained adapter."""
        raise NotImplementedError

    def attach(
        self, base: "PreTrainedModel", start: Adapter, task_type: str, heads: tuple[str, ...], seed: int, rest: bool
    ) -> "PeftModel":
        """`base` with the adapter called "local" trainable, holding `start` (empty: initialised from `seed`)."""
        raise NotImplementedError

    def extract(self, model: "PeftModel", whole: bool = False) -> Adapter:
        """What travels: the trained adapter, on the CPU in float32. `whole`: frozen directions included."""
        raise NotImplementedError


registry: Registry[type[PeftMethod]] = Registry("PEFT method", __name__)


def read(settings: Mapping[str, Any]) -> PeftMethod:
    """The method that `{"method": name, …}` describes.

    Raises:
        ConfigError: an unknown method or setting, with the nearest known one.
    """
    values = dict(settings)
    if "method" not in values:
        raise ConfigError(f"peft needs a method, one of {list(registry)}")
    name = values.pop("method")
    return registry[name].read(values, f"peft ({name})")
