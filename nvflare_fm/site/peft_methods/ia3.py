"""IA³ (arXiv:2205.05638): a learned factor for each key, value and feed-forward channel. Averaged entry by entry."""

from typing import TYPE_CHECKING

from pydantic import Field

from ...config import Modules
from . import PeftMethod, registry

if TYPE_CHECKING:
    from peft import PeftConfig

    from ..base_model import BaseModel


@registry.register("ia3")
class IA3(PeftMethod):
    """All factors start at one, so every site starts at the base model."""

    target_modules: Modules = Field((), description="Ends of the names of the modules to adapt; empty: PEFT's choice.")
    feedforward_modules: Modules = Field((), description="Those of target_modules whose input is scaled.")
    modules_to_save: Modules = Field(
        (), description="Modules trained whole besides, of those in the sites' limits.trainable_modules."
    )

    @property
    def trained_whole(self) -> tuple[str, ...]:
        return self.modules_to_save

    def config(self, base: "BaseModel") -> "PeftConfig":
        from peft import IA3Config

        return IA3Config(
            task_type=base.task.peft_type,
            target_modules=list(self.target_modules) or None,
            feedforward_modules=list(self.feedforward_modules) if self.target_modules else None,
            modules_to_save=sorted({*base.heads, *self.modules_to_save}) or None,
        )
