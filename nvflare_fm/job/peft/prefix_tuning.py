"""Prefix tuning (arXiv:2101.00190): learned keys and values before the text, in every layer. Averaged by entry."""

from collections.abc import Sequence
from typing import Any

from pydantic import Field

from ...config import WIDEST
from . import PeftMethod, registry


@registry.register("prefix_tuning")
class PrefixTuning(PeftMethod):
    """The prefix itself is trained, not a projection that makes it: what PEFT saves of a projection cannot go on."""

    peft_type = "PREFIX_TUNING"
    checkpointing = False  # a second pass would find the keys of the first beside the prefix

    num_virtual_tokens: int = Field(20, ge=1, le=WIDEST, description="Positions before the text that are learned.")

    def arguments(self, heads: Sequence[str]) -> dict[str, Any]:
        return {"num_virtual_tokens": self.num_virtual_tokens}
