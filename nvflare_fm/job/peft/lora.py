"""LoRA (arXiv:2106.09685) with rsLoRA's scale (arXiv:2312.03732) or DoRA's magnitudes (arXiv:2402.09353)."""

import math
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field

from ...config import WIDEST, Modules
from . import PeftMethod, registry


@registry.register("lora")
class Lora(PeftMethod):
    """Settings by PEFT's own names, but for `rank`, which PEFT calls `r`."""

    peft_type = "LORA"
    factored = True

    rank: int = Field(8, ge=1, le=WIDEST, description="Rank of the adapter that a site trains.")
    lora_alpha: float = Field(16.0, gt=0, le=1e6, description="Scale times rank; with use_rslora, scale times √rank.")
    lora_dropout: float = Field(
        0.0, ge=0, lt=1, description="Share of the adapter's inputs that is dropped in training, 0 to 1."
    )
    use_rslora: bool = Field(False, description="true: the scale is lora_alpha / √rank, not lora_alpha / rank.")
    use_dora: bool = Field(False, description="true: DoRA; it needs one rank at every site.")
    target_modules: Literal["all-linear"] | Modules = Field(
        "all-linear", description="Layers to adapt: all-linear, or ends of PEFT's module names."
    )
    modules_to_save: Modules = Field(
        (), description="Modules trained whole besides, of those in the sites' limits.trainable_modules."
    )

    @property
    def scale(self) -> float:
        return self.lora_alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)

    @property
    def side_adapter(self) -> bool:
        return not self.use_dora  # DoRA normalises W + ΔW: two adapters do not add

    def arguments(self, heads: Sequence[str]) -> dict[str, Any]:
        return {
            "r": self.rank,
            "lora_alpha": self.lora_alpha,
            "lora_dropout": self.lora_dropout,
            "use_rslora": self.use_rslora,
            "use_dora": self.use_dora,
            "target_modules": self.target_modules if isinstance(self.target_modules, str) else [*self.target_modules],
            "modules_to_save": sorted({*heads, *self.modules_to_save}) or None,
        }
