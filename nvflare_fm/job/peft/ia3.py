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

    target_modules: Modules = Field((), description="Ends of the names of the modules to adapt; empty: PEFT's choice.")
    feedforward_modules: Modules = Field((), description="Those of target_modules whose input is scaled.")
    modules_to_save: Modules = Field(
        (), description="Modules trained whole besides, of those in the sites' limits.trainable_modules."
    )

    def arguments(self, heads: Sequence[str]) -> dict[str, Any]:
        return {
            "target_modules": list(self.target_modules) or None,
            "feedforward_modules": list(self.feedforward_modules) if self.target_modules else None,
            "modules_to_save": sorted({*heads, *self.modules_to_save}) or None,
        }
