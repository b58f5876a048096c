"""PEFT methods: what each trains, what of it travels, and how a global adapter is fitted into a site's model."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from ...adapter import Adapter
from ...config import RoundPlan, Settings, TrainingSettings
from ...errors import ConfigError
from ...registry import Registry

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

    from ..base_model import BaseModel


class PeftMethod(Settings):
    """Settings of one method, and what it does at a site. PEFT itself is imported only when a site calls it.

    Subclasses set `factored` where the method sends B @ A pairs.
    """

    factored: ClassVar[bool] = False
    checkpointing: ClassVar[bool] = True  # whether activations may be computed a second time

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
        return ()

    @property
    def virtual_tokens(self) -> int:
        """How many positions it takes up before a text."""
        return 0

    def config(self, base: "BaseModel") -> "PeftConfig":
        """PEFT's configuration of the trained adapter."""
        raise NotImplementedError

    def initialise(self, model: "PeftModel", seed: int) -> None:
        """Makes the start that all sites share, where PEFT's own is random."""

    def attach(
        self, base: "BaseModel", start: Adapter, plan: RoundPlan, number: int = 0, own: Adapter | None = None
    ) -> "PeftModel":
        """`base.model` with the adapter called "local" trainable, holding `start` (empty: made from the plan's seed).

        Args:
            plan: its `rest` says what of `start` rides along frozen, its `factors` what is trained.
            number: of the round; a site that trains a fresh pair every round has other directions in each.
            own: this site's adapter, where the plan shares only a part of it.

        Raises:
            ConfigError: the method cannot be put on this model, or cannot hold `start`.
            WireError: `start` belongs to another model.
        """
        from ..attach import check_fits, put, wrap

        model = wrap(base, self.config(base), plan.seed)
        self.initialise(model, plan.seed)
        if start:
            put(model, start.tensors())
        check_fits(model, base)
        return model

    def extract(self, model: "PeftModel", whole: bool = False) -> Adapter:
        """What travels: the trained adapter, on the CPU in float32. `whole`: frozen directions included."""
        from ..attach import tensors

        return Adapter(dense=tensors(model))


registry: Registry[type[PeftMethod]] = Registry("PEFT method", __name__)


def read(settings: Mapping[str, Any]) -> PeftMethod:
    """The method that `{"method": name, …}` describes.

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
            "prefix_tuning does not go with gradient_checkpointing; use another method, or turn it off",
            code="no_checkpointing",
        )


def complete(settings: Mapping[str, Any]) -> dict[str, Any]:
    """`settings` with the method's defaults written out, so that whoever reads the rank finds it.

    Raises:
        ConfigError: as `read`.
    """
    return {"method": settings.get("method"), **read(settings).model_dump()}
