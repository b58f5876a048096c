"""Linear probing (arXiv:1610.01644): the task's head alone is trained, on a base model that stays as it is.

Nothing below the head changes, so a site computes what the base model makes of a text once (`site/model/states.py`).
The mean of heads is the mean of what they answer, so the average entry by entry is exact where the head is one layer.
"""

from collections.abc import Sequence
from typing import Any

from pydantic import Field

from ...config import Modules
from . import PeftMethod, registry

NO_LAYER = "dummy-target-modules"  # by which PEFT's LoRA adapts none: `peft.utils.constants.DUMMY_TARGET_MODULES`


@registry.register("head")
class Head(PeftMethod):
    """For PEFT it is a LoRA of no layer, with the head among its `modules_to_save`."""

    peft_type = "LORA"
    adapts = False

    modules_to_save: Modules = Field(
        (), description="Modules trained whole besides, of those in the sites' limits.trainable_modules."
    )

    def arguments(self, heads: Sequence[str]) -> dict[str, Any]:
        return {
            "target_modules": NO_LAYER,
            "modules_to_save": sorted({*heads, *self.modules_to_save}) or None,
        }
