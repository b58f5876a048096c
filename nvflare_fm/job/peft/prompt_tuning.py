"""Prompt tuning (arXiv:2104.08691): learned embeddings before the text. Averaged entry by entry."""

from collections.abc import Sequence
from typing import Any

from pydantic import Field

from ...config import WIDEST
from . import PeftMethod, registry


@registry.register("prompt_tuning")
class PromptTuning(PeftMethod):
    """Settings and promises of prompt tuning."""

    peft_type = "PROMPT_TUNING"

    num_virtual_tokens: int = Field(20, ge=1, le=WIDEST, description="Positions before the text that are learned.")

    def arguments(self, heads: Sequence[str]) -> dict[str, Any]:
        return {"num_virtual_tokens": self.num_virtual_tokens}
