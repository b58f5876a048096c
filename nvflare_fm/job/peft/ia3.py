"""IA³ (arXiv:2205.05638): a learned factor for each key, value and feed-forward channel. Averaged entry by entry."""

from collections.abc import Sequence
from typing import Any

from pydantic import Field

from ...config import Modules
from . import PeftMethod, registry


@registry.register("ia3")
class IA3(PeftMethod):
    """All factors start at one, so every site starts at the base model."""

    peft_type = "IA3"

    target_modules: Modules = Field((), description="ends of module names; empty: PEFT's choice for the architecture")
    feedforward_modules: Modules = Field((), description="those of target_modules whose input is scaled")
    modules_to_save: Modules = Field(
        (), description="modules trained whole, of those a site lists as limits.trainable_modules"
    )

    @property
    def trained_whole(self) -> tuple[str, ...]:
        return self.modules_to_save

    def arguments(self, heads: Sequence[str]) -> dict[str, Any]:
        return {
            "target_modules": list(self.target_modules) or None,
            "feedforward_modules": list(self.feedforward_modules) if self.target_modules else None,
            "modules_to_save": sorted({*heads, *self.modules_to_save}) or None,
        }
