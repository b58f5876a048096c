"""Texts as points: the mean over tokens of a frozen encoder's last layer, as a unit vector (arXiv:1908.10084)."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import AutoModel, PreTrainedModel, PreTrainedTokenizerBase

from ..errors import ModelError
from ..site.model.base_model import load_tokenizer

LONGEST = 256  # tokens of a text that are read


@dataclass(frozen=True)
class Encoder:
    """A model whose last layer tells texts apart; of one with a head, what is below the head is read."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def load(folder: Path, device: str = "cpu") -> Encoder:
    """Load an encoder from a folder, from safetensors and without code of its own.

    Raises:
        ModelError: `encoder_unreadable`; what `load_tokenizer` raises.
    """
    tokenizer = load_tokenizer(folder)
    try:
        model: Any = AutoModel.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True, use_safetensors=True, dtype=torch.float32
        )
    except (OSError, ValueError, KeyError, ImportError, TypeError, RuntimeError) as error:
        raise ModelError(
            "the encoder cannot be loaded; is its folder a whole model that transformers knows without remote code?",
            f"{folder}: {error}",
            code="encoder_unreadable",
        ) from None
    return Encoder(model.to(device), tokenizer)


@torch.inference_mode()
def embed(texts: Sequence[str], encoder: Encoder, batch_size: int = 64) -> Tensor:
    """Embed texts.

    Args:
        texts: in any order; those of like length are read together.
        batch_size: texts read together.
    Returns:
        A unit vector for each text, in float32 on the CPU.
    """
    backbone: Any = encoder.model.base_model
    was, found = backbone.training, torch.zeros(len(texts), encoder.model.config.get_text_config().hidden_size)
    backbone.eval()
    order = sorted(range(len(texts)), key=lambda place: len(texts[place]))
    longest = min(LONGEST, getattr(encoder.model.config.get_text_config(), "max_position_embeddings", LONGEST))
    for start in range(0, len(order), batch_size):
        some = order[start : start + batch_size]
        tokens = encoder.tokenizer(
            [texts[place] for place in some], padding=True, truncation=True, max_length=longest, return_tensors="pt"
        ).to(encoder.model.device)
        hidden = backbone(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]).last_hidden_state
        mask = tokens["attention_mask"][..., None].to(hidden)
        mean = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)
        found[some] = normalize(mean.float(), dim=1).cpu()
    backbone.train(was)
    return found
