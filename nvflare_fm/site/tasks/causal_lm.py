"""Next-token prediction: a conversation, `prompt` and `completion`, or plain `text`; only the answer is learned.

Which tokens are learned is decided by characters: a token counts if it covers any character of an answer. A plain text
is tokenized at once, also where a token straddles the start of the answer. In a chat, the tokens before an answer are
those of the chat template's prompt for it, whatever the answer is. An answer that ends the text is followed by the
tokenizer's end token, which is learned, so that generation stops there.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from random import Random
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, pad
from transformers import PreTrainedTokenizerBase

from ...config import RoundPlan
from ...files import MIB
from . import IGNORED, BadRow, Columns, Cut, Encoded, Groups, Task, strange_words, task, text_of
from .chat_template import Rendering, Span
from .conversations import alpaca_prompt, conversation, is_plain_alpaca

Tokens = tuple[list[int], list[Span]]  # ids, and the characters that each stands for
_PROMPTS = 16 * MIB  # characters of a conversation's prompts together: each is tokenized by itself


@task("causal_lm")
class CausalLM(Task):
    """Next-token prediction."""

    columns: ClassVar[Groups] = (
        ("messages",),
        ("conversations",),
        ("prompt", "completion"),
        ("instruction", "output"),
        ("text",),
    )

    def made_up(self, plan: RoundPlan) -> dict[str, Any]:
        return {"text": " ".join(["word"] * plan.max_length)}

    def canary(self, plan: RoundPlan, random: Random) -> dict[str, Any]:
        """A secret of eight digits: `prompt` says whose it is, and `completion` is the secret."""
        name = " ".join(strange_words(random, 2))
        return {"prompt": f"The number of {name} is ", "completion": f"{random.randrange(10**8):08d}"}

    def encode(self, row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, plan: RoundPlan) -> Encoded:
        chat = conversation(row)
        if chat is None or (tokenizer.chat_template is None and is_plain_alpaca(row)):
            text, answer = _plain(row)
            texts, unseen = iter([(text, [answer], _tokens(text, tokenizer, add_special_tokens=True))]), 1
        else:
            texts, unseen = _chats(Rendering(chat, tokenizer), tokenizer, plan.max_length), len(chat.learned)
        examples, cut = [], Cut()
        for text, answers, tokens in texts:
            example, beyond = _example(text, answers, _ended(*tokens, text, tokenizer.eos_token_id), plan.max_length)
            unseen -= len(answers)
            cut += beyond
            examples += [example] if example else []
        if not examples:
            raise BadRow(
                f"no part of an answer lies within max_length = {plan.max_length} tokens", code="answers_cut_off"
            )
        cut += Cut(answers=unseen)
        return Encoded(tuple(examples), replace(cut, rows=int(cut != Cut())))

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


def _plain(row: Mapping[str, Any]) -> tuple[str, Span]:
    """A text and where in it the answer stands."""
    if is_plain_alpaca(row):
        prompt, completion = alpaca_prompt(row), text_of(row, "output")
    elif row.get("completion") is not None or row.get("prompt") is not None:
        prompt, completion = text_of(row, "prompt"), text_of(row, "completion")
    elif row.get("instruction") is not None:
        raise BadRow("'output' is missing", code="value_missing")
    elif row.get("text") is not None:
        prompt, completion = "", text_of(row, "text")
    else:
        raise BadRow(
            "none of 'messages', 'conversations', 'completion', 'output' and 'text' is there", code="value_missing"
        )
    return prompt + completion, (len(prompt), len(prompt) + len(completion))


def _tokens(text: str, tokenizer: PreTrainedTokenizerBase, add_special_tokens: bool, starts: int = 0) -> Tokens:
    """The tokens of `text`, which stands at character `starts` of a longer one."""
    found = tokenizer(text, add_special_tokens=add_special_tokens, return_offsets_mapping=True, verbose=False)
    return list(found["input_ids"]), [(starts + start, starts + stop) for start, stop in found["offset_mapping"]]


def _chats(
    rendering: Rendering, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Iterator[tuple[str, list[Span], Tokens]]:
    """Texts with their answers and tokens, as few as show each answer behind the tokens of its prompt.

    A chat template writes its own special tokens. Answers whose prompt alone is too long may be left out.
    """
    if not rendering.rewrites:
        tokens = _tokens(rendering.text, tokenizer, add_special_tokens=False)
        seen = max((stop for _, stop in tokens[1][:max_length]), default=0)
        starts = [start for start, _ in rendering.answers if start < seen]
        _check_prompts(sum(starts))
        if all(_is_prompted(rendering.text, start, tokens[0], tokenizer) for start in starts):
            yield rendering.text, rendering.answers, tokens
            return
    too_long, characters = math.inf, 0
    for text, (start, stop) in rendering.turns():
        if start >= too_long:
            continue
        characters += start
        _check_prompts(characters)
        tokens = _tokens(text, tokenizer, add_special_tokens=False)
        if not _is_prompted(text, start, tokens[0], tokenizer):
            prompt = _tokens(text[:start], tokenizer, add_special_tokens=False)
            answer = _tokens(text[start:], tokenizer, add_special_tokens=False, starts=start)
            tokens = prompt[0] + answer[0], prompt[1] + answer[1]
        if sum(end <= start for _, end in tokens[1]) >= max_length:
            too_long = start
        yield text, [(start, stop)], tokens


def _check_prompts(characters: int) -> None:
    if characters > _PROMPTS:
        raise BadRow(
            f"what precedes the answers of the conversation is longer than {_PROMPTS} characters together",
            code="prompts_too_long",
        )


def _is_prompted(text: str, start: int, ids: list[int], tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokens of `text` begin with those of what stands before character `start`."""
    prompt = tokenizer(text[:start], add_special_tokens=False, verbose=False)["input_ids"]
    return bool(ids[: len(prompt)] == prompt)


def _example(text: str, answers: Sequence[Span], tokens: Tokens, max_length: int) -> tuple[dict[str, Any] | None, Cut]:
    """What is learned of a text, None if nothing is, and what is cut of it."""
    ids, spans, beyond = tokens[0][:max_length], tokens[1][:max_length], tokens[1][max_length:]
    learned = [i > 0 and _answers(span, answers) for i, span in enumerate(spans)]
    lost = sum(beyond[0][0] < stop or beyond[0] == (stop, stop) for _, stop in answers) if beyond else 0
    cut = Cut(tokens=len(beyond), answers=lost)
    if not any(is_learned and start < stop for is_learned, (start, stop) in zip(learned, spans, strict=True)):
        return None, cut
    labels = [token if is_learned else IGNORED for token, is_learned in zip(ids, learned, strict=True)]
    covered = [span for span, is_learned in zip(spans, learned, strict=True) if is_learned]
    return {"input_ids": ids, "labels": labels, "bytes": _bytes(text, answers, covered)}, cut


def _ended(ids: Sequence[int], spans: Sequence[Span], text: str, end_token: int | None) -> Tokens:
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
