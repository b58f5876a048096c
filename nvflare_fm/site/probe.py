"""What a base model does with a few tokens, tried once when it is loaded."""

from typing import Any

import torch

from ..errors import ModelError

TOKENS = 8
_NOISE = {"int8": 0.05}  # which columns LLM.int8 keeps in 16 bits depends on all tokens together
_LITTLE = 1e-3


@torch.inference_mode()
def check_causal(model: Any, ids: list[int], quantization: str) -> None:
    """Refuses a language model that answers to a token with what comes after it: its training would look perfect.

    Args:
        ids: a text of at least two tokens that the model has rows for.

    Raises:
        ModelError: earlier answers change with the last token.
    """
    text = torch.tensor([ids, [*ids[:-1], ids[0]]], device=model.device)
    one, other = (model(input_ids=row[None], use_cache=False).logits[0].float() for row in text)
    moved = (one - other).abs().amax(-1)
    if float(moved[:-1].max()) > _NOISE.get(quantization, _LITTLE) * float(moved[-1]):
        raise ModelError(
            "the base model looks ahead: what it answers to a token changes with the tokens after it, so it is no "
            "causal language model; offer one that is, or ask for a classification task",
            code="looks_ahead",
        )
