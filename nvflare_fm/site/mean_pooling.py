"""A classifier on the mean of a text's tokens, for encoders whose folder says that they were trained so.

transformers' own classifiers read the first token, which such an encoder leaves nearly empty: 100 steps of 16 rows of
banking77 on MiniLM in NF4 give 0.51 accuracy on the first token and 0.57 on the mean; at a lower rate the mean reaches
0.73. After Sentence-BERT (arXiv:1908.10084), whose layout of a model's folder (`modules.json`) is read here.
"""

from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import MODEL_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from ..errors import ModelError
from ..files import read_json, read_object


def means_tokens(folder: Path) -> bool:
    """Whether the folder says that it holds an encoder whose embedding is the mean over tokens, and no other pooling.

    Raises:
        ModelError: what it says cannot be read.
    """
    if not (folder / "modules.json").is_file():
        return False
    try:
        modules = read_json(folder / "modules.json")
        if not isinstance(modules, list):
            raise ValueError("modules.json is no list")
        pooling = [module["path"] for module in modules if module["type"].rpartition(".")[2] == "Pooling"]
        if len(pooling) != 1 or read_object(folder / "config.json").get("is_encoder_decoder"):
            return False
        said = read_object(folder / pooling[0] / "config.json")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            "the base model's modules.json or its pooling's config.json cannot be read; fetch the model again, or "
            "remove modules.json for a classifier on the first token",
            f"{folder}: {error}",
            code="pooling_unreadable",
        ) from None
    modes = {name.removeprefix("pooling_mode_") for name, value in said.items() if value is True}
    return said.get("pooling_mode", "mean_tokens") in ("mean", "mean_tokens") and modes <= {"mean_tokens"}


class MeanPooledForSequenceClassification(PreTrainedModel):  # type: ignore[misc]
    """As transformers' `…ForSequenceClassification`: `from_pretrained(folder, num_labels=…)`, then PEFT's adapter."""

    config_class = AutoConfig
    base_model_prefix = "backbone"
    supports_gradient_checkpointing = True
    _supports_sdpa = True

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        self.backbone = MODEL_MAPPING[type(config)](config)
        if hasattr(self.backbone, "pooler"):
            self.backbone.pooler = None
        self.dropout = nn.Dropout(getattr(config, "hidden_dropout_prob", 0.0))
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @classmethod
    def from_pretrained(cls, folder: Any, *args: Any, **kwargs: Any) -> Any:
        """Finds the weights of the encoder whether they were saved alone or, their names prefixed, under a head."""
        config = kwargs.get("config") or AutoConfig.from_pretrained(folder)
        prefix = MODEL_MAPPING[type(config)].base_model_prefix
        return super().from_pretrained(folder, *args, key_mapping={rf"^{prefix}\.": "backbone."}, **kwargs)

    @classmethod
    def from_config(cls, config: PreTrainedConfig, **kwargs: Any) -> "MeanPooledForSequenceClassification":
        return cls(config)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """Logits of shape (batch, num_labels). `past_key_values` are PEFT's learned prefixes, which are no tokens."""
        given = {} if past_key_values is None else {"past_key_values": past_key_values}
        hidden = self.backbone(
            input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, **given
        ).last_hidden_state
        counted = hidden.new_ones(hidden.shape[:2])
        if attention_mask is not None and hidden.shape[1] > 1:  # a single state is a text's mean already
            counted = attention_mask[:, -hidden.shape[1] :].to(hidden)
        mean = (hidden * counted[..., None]).sum(1) / counted.sum(1, keepdim=True)
        logits: Tensor = self.classifier(self.dropout(mean))
        return SequenceClassifierOutput(logits=logits)
