"""Next-token prediction: chat `messages`, `prompt` and `completion`, or plain `text`; only the answer is learned.

Which tokens are learned is decided by characters: a token counts if it covers any character of an answer. Tokenizing
the whole text at once gives the ids that inference will see, also where a token straddles the start of the answer. An
answer that ends the text is followed by the tokenizer's end token, which is learned, so that generation stops there.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, pad
from transformers import PreTrainedTokenizerBase

from ...config import RoundPlan
from . import IGNORED, BadRow, Columns, Task, registry, text_of

Span = tuple[int, int]  # characters, end excluded
_TURNS = 200  # the template is rendered once and again for each, so time grows with their square


class CausalLM(Task):
    auto_class = "AutoModelForCausalLM"
    peft_type = "CAUSAL_LM"
    trains_head = False
    needs_labels = False

    def model_config(self, plan: RoundPlan) -> dict[str, Any]:
        return {}

    def encode(self, row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, plan: RoundPlan) -> dict[str, Any]:
        text, answers, templated = _text_and_answers(row, tokenizer)
        # A chat template writes its own special tokens; elsewhere the tokenizer adds its own.
        encoded = tokenizer(text, add_special_tokens=not templated, return_offsets_mapping=True, verbose=False)
        ids, spans = _ended(encoded["input_ids"], encoded["offset_mapping"], text, tokenizer.eos_token_id)
        ids, spans = ids[: plan.max_length], spans[: plan.max_length]
        learned = [i > 0 and _answers(span, answers) for i, span in enumerate(spans)]
        if not any(is_learned and start < stop for is_learned, (start, stop) in zip(learned, spans, strict=True)):
            raise BadRow(f"no part of an answer lies within max_length = {plan.max_length} tokens")
        labels = [token if is_learned else IGNORED for token, is_learned in zip(ids, learned, strict=True)]
        covered = [span for span, is_learned in zip(spans, learned, strict=True) if is_learned]
        return {"input_ids": ids, "labels": labels, "bytes": _bytes(text, answers, covered)}

    def targets(self, labels: Tensor) -> Tensor:
        return pad(labels[:, 1:], (0, 1), value=IGNORED)

    def score(self, logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
        nats = cross_entropy(logits, targets, reduction="none").double().sum()
        return {"nats": nats[None], "tokens": torch.tensor([len(targets)])}

    def counts(self, batch: Columns) -> dict[str, Tensor]:
        return {"bytes": batch["bytes"].sum()[None]}

    def metrics(self, columns: Columns, plan: RoundPlan) -> dict[str, float]:
        """Nats per learned token; perplexity; bits to code the answers, ends of turns included, per UTF-8 byte."""
        nats = float(columns["nats"].double().sum())
        loss = nats / int(columns["tokens"].sum())
        size = int(columns["bytes"].sum())
        per_byte = {"bits_per_byte": nats / math.log(2) / size} if size else {}
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), **per_byte}


def _ended(ids: Sequence[int], spans: Sequence[Span], text: str, end_token: int | None) -> tuple[list[int], list[Span]]:
    """The tokens of `text` with an end token behind it, where the text, its template or the tokenizer put none there.

    What the tokenizer adds has no characters; what it adds behind the text stands at the text's end.
    """
    ids, spans, end = list(ids), [(start, stop) for start, stop in spans], (len(text), len(text))
    behind = next((i for i in range(len(spans), 0, -1) if spans[i - 1][0] < spans[i - 1][1]), 0)
    spans[behind:] = [end] * (len(spans) - behind)
    ends = any(token == end_token and not text[stop:].strip() for token, (_, stop) in zip(ids, spans, strict=True))
    return (ids, spans) if ends or end_token is None else ([*ids, end_token], [*spans, end])


def _answers(span: Span, answers: Sequence[Span]) -> bool:
    """Whether a token covers part of an answer. One without characters stands for what lies before it: a blank that the
    tokenizer trims off, or the end of the text.
    """
    start, stop = span
    if start == stop:
        return any(answer_start < stop <= answer_end for answer_start, answer_end in answers)
    return any(start < answer_end and stop > answer_start for answer_start, answer_end in answers)


def _bytes(text: str, answers: Sequence[Span], covered: Sequence[Span]) -> int:
    """UTF-8 bytes of the answers that the learned tokens stand for."""
    ends = max((stop for _, stop in covered), default=0)
    starts = min((start for start, _ in covered), default=0)
    return sum(len(text[max(start, starts) : min(stop, ends)].encode()) for start, stop in answers if start < ends)


def _text_and_answers(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[Span], bool]:
    if row.get("messages") is not None:
        return *_render(row["messages"], tokenizer), True
    if row.get("completion") is not None or row.get("prompt") is not None:
        prompt, completion = text_of(row, "prompt"), text_of(row, "completion")
        return prompt + completion, [(len(prompt), len(prompt) + len(completion))], False
    if row.get("text") is None:
        raise BadRow("none of 'messages', 'prompt' and 'completion', 'text' is there")
    text = text_of(row, "text")
    return text, [(0, len(text))], False


def _render(messages: Any, tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[Span]]:
    """The conversation in the tokenizer's chat template, and where in it each assistant turn stands."""
    if tokenizer.chat_template is None:
        raise BadRow("the base model's tokenizer has no chat template; offer 'prompt' and 'completion' instead")
    _check_messages(messages)
    try:
        whole = tokenizer.apply_chat_template(messages, tokenize=False)
        spans = [_turn(messages, i, whole, tokenizer) for i, m in enumerate(messages) if m["role"] == "assistant"]
    except BadRow:
        raise
    except Exception:  # a template raises what it likes, and may repeat the row
        raise BadRow("the base model's chat template refuses this conversation (order of roles?)") from None
    return whole, spans


def _turn(messages: Sequence[Any], i: int, whole: str, tokenizer: PreTrainedTokenizerBase) -> Span:
    before = tokenizer.apply_chat_template(messages[:i], tokenize=False, add_generation_prompt=True)
    after = tokenizer.apply_chat_template(messages[: i + 1], tokenize=False)
    if not (after.startswith(before) and whole.startswith(after)):
        raise BadRow("the chat template rewrites earlier turns, so answers cannot be told apart; send one turn a row")
    return len(before), len(after)


def _check_messages(messages: Any) -> None:
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
        raise BadRow("'messages' is not a list of {role, content}")
    if len(messages) > _TURNS:
        raise BadRow(f"the conversation has more than {_TURNS} messages")
    if not all(isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages):
        raise BadRow("a message lacks a 'role' or a 'content' text")
    if not any(m["role"] == "assistant" and m["content"].strip() for m in messages):
        raise BadRow("'messages' has no assistant turn to learn from")


registry.register("causal_lm")(CausalLM())
