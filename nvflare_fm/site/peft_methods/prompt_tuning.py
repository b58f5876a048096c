"""Prompt tuning (arXiv:2104.08691): learned embeddings before the text. Averaged entry by entry."""

from typing import TYPE_CHECKING

from pydantic import Field

from ...config import WIDEST
from . import PeftMethod, registry

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

    from ..base_model import BaseModel


@registry.register("prompt_tuning")
class PromptTuning(PeftMethod):
    num_virtual_tokens: int = Field(20, ge=1, le=WIDEST, description="Positions before the text that are learned.")

    @property
    def virtual_tokens(self) -> int:
        return self.num_virtual_tokens

    def config(self, base: "BaseModel") -> "PeftConfig":
        from peft import PromptTuningConfig

        return PromptTuningConfig(task_type=base.task.peft_type, num_virtual_tokens=self.num_virtual_tokens)

    def initialise(self, model: "PeftModel", seed: int) -> None:
        from ..attach import fill_prompt

        fill_prompt(model, seed)
