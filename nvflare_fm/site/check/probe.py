"""What a base model takes and what it does with a few tokens: looked at once, when it is loaded, so that nothing of it
comes up in the middle of training.
"""

import re
from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from transformers import AutoModel

from ...errors import ConfigError, ModelError
from ..training.memory import ran_out

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


def unreached(model: Any) -> frozenset[str]:
    """The modules that no text goes through, such as those for images: an adapter there would never move.

    A module counts as its like in other layers does, for a short text does not meet each expert. On the meta device a
    few models cannot be tried; there, none is said to be unreached.

    Raises:
        ModelError: no text comes through the model.
    """
    called: set[str] = set()

    def call(name: str) -> Callable[..., None]:
        return lambda *_: called.add(_kind(name))

    hooks = [module.register_forward_pre_hook(call(name)) for name, module in model.named_modules()]
    try:
        with torch.inference_mode():
            model(input_ids=torch.zeros(1, TOKENS, dtype=torch.long, device=model.device))
    except Exception as error:
        if ran_out(error):
            raise
        if model.device.type == "meta":
            return frozenset()
        raise ModelError(
            "no text comes through the base model alone; offer one that reads texts",
            f"{type(error).__name__}: {error}",
            code="no_text",
        ) from None
    finally:
        for hook in hooks:
            hook.remove()
    return frozenset(name for name, _ in model.named_modules() if _kind(name) not in called)


def _kind(name: str) -> str:
    return re.sub(r"\b\d+\b", "*", name)


def stacked(model: Any, unreached: Collection[str] = ()) -> list[str]:
    """The modules that keep the weights of several layers, such as experts, in one tensor."""
    return [
        name
        for name, module in model.named_modules()
        if name not in unreached
        and not isinstance(module, _ConvNd)
        and any(p.ndim == 3 and p.shape[0] > 1 for p in module.parameters(recurse=False))
    ]


def positions(model: Any, unreached: Collection[str] = ()) -> int | None:
    """The longest text that a model's tables have a row for; None: its positions are not looked up in a table."""
    says = [getattr(model.config, name, None) for name in ("n_positions", "max_seq_len")]  # their tables are no modules
    return min(
        [*(table.num_embeddings - _first(table) for table in _tables(model, unreached)), *filter(None, says)],
        default=None,
    )


def counts_from_padding(config: Any) -> bool:
    """Whether a model's first position is the one after its padding's, as in RoBERTa."""
    with torch.device("meta"):
        model = AutoModel.from_config(config, trust_remote_code=False)
    return any(table.padding_idx is not None for table in _tables(model))


def _tables(model: Any, unreached: Collection[str] = ()) -> list[nn.Embedding]:
    """Where positions are looked up."""
    return [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and name not in unreached and re.search(r"pos|wpe", name.rpartition(".")[2])
    ]


def _first(table: nn.Embedding) -> int:
    """The row of the first token: after those of padding, as in RoBERTa, or after two that nobody uses, as in OPT."""
    offset = getattr(table, "offset", None)
    return int(offset) if offset is not None else 0 if table.padding_idx is None else table.padding_idx + 1


def check_length(rows: int | None, max_length: int, virtual_tokens: int) -> None:
    """Hold a plan's longest text against the positions that a model has rows for.

    Raises:
        ConfigError: texts may be longer than the model has positions for.
    """
    if rows is not None and max_length + virtual_tokens > rows:
        beside = f" and {virtual_tokens} virtual tokens" if virtual_tokens else ""
        raise ConfigError(
            f"max_length {max_length}{beside} is more than the {rows} positions of the base model; lower max_length to "
            f"{max(0, rows - virtual_tokens)} or less",
            code="too_long",
        )


def check_ids(ids: Iterable[int], rows: int | None) -> None:
    """Hold a tokenizer's ids against the rows of a model's embedding.

    Raises:
        ModelError: the tokenizer gives ids that the model has no row for.
    """
    if rows is not None and (without := sorted({i for i in ids if not 0 <= i < rows})):
        raise ModelError(
            f"the tokenizer gives id {without[-1]} and the base model has {rows} rows; use the tokenizer that belongs "
            "to it, without tokens that were added later",
            code="ids_without_rows",
        )
