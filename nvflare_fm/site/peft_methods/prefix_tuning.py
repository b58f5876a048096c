"""Prefix tuning (arXiv:2101.00190): learned keys and values before the text, in every layer. Averaged by entry."""

from typing import TYPE_CHECKING

from pydantic import Field

from ...config import WIDEST
from . import PeftMethod, registry

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

    from ..base_model import BaseModel


@registry.register("prefix_tuning")
class PrefixTuning(PeftMethod):
    """The prefix itself is trained, not a projection that makes it: what PEFT saves of a projection cannot go on."""

    checkpointing = False  # a second pass would find the keys of the first beside the prefix

    num_virtual_tokens: int = Field(20, ge=1, le=WIDEST, description="Positions before the text that are learned.")

    @property
    def virtual_tokens(self) -> int:
        return self.num_virtual_tokens

    def config(self, base: "BaseModel") -> "PeftConfig":
        from peft import PrefixTuningConfig

        return PrefixTuningConfig(task_type=base.task.peft_type, num_virtual_tokens=self.num_virtual_tokens)

    def initialise(self, model: "PeftModel", seed: int) -> None:
        from ..attach import fill_prompt

        fill_prompt(model, seed)
