"""VeRA (arXiv:2310.11454): ΔW = diag(b) B diag(d) A, where A and B are random, frozen and shared by all layers.

The vectors b and d are trained, and they alone travel; they are averaged entry by entry. That is not exact: a mean of b
times a mean of d is not the mean of their products. There is no pair to send instead, because a pair would be as large
as LoRA's of rank `r`. A and B follow from a number and the shapes of the layers, by the same code at every site. The
number is PEFT's default in all jobs, so that an adapter never meets other matrices than those it was trained with.
"""

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field

from ...config import WIDEST, Modules
from . import PeftMethod, registry

PROJECTION_PRNG_KEY = 0  # PEFT's default


@registry.register("vera")
class Vera(PeftMethod):
    """All b start at zero and all d at `d_initial`, so every site starts at the base model."""

    peft_type = "VERA"

    r: int = Field(256, ge=1, le=WIDEST, description="Rank of the shared random matrices; sites cannot lower it.")
    d_initial: float = Field(0.1, gt=0, le=1e3, description="Value that all entries of d start at.")
    vera_dropout: float = Field(
        0.0, ge=0, lt=1, description="Share of the adapter's inputs that is dropped in training, 0 to 1."
    )
    target_modules: Literal["all-linear"] | Modules = Field(
        "all-linear", description="Layers to adapt: all-linear, or ends of PEFT's module names."
    )
    modules_to_save: Modules = Field(
        (), description="Modules trained whole besides, of those in the sites' limits.trainable_modules."
    )

    def arguments(self, heads: Sequence[str]) -> dict[str, Any]:
        return {
            "r": self.r,
            "d_initial": self.d_initial,
            "vera_dropout": self.vera_dropout,
            "projection_prng_key": PROJECTION_PRNG_KEY,
            "save_projection": False,
            "target_modules": self.target_modules if isinstance(self.target_modules, str) else [*self.target_modules],
            "modules_to_save": sorted({*heads, *self.modules_to_save}) or None,
        }
