"""A conversation in the words of a tokenizer's chat template, each answer behind exactly what precedes it at inference.

What precedes an answer is the template's text of the messages before it with the generation prompt. A template whose
text of a longer conversation begins with that gives one text with all answers. Others rewrite what was said earlier,
such as Qwen3's, which leaves out what was thought; there, each answer has a text of its own.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from . import BadRow
from .conversations import Conversation, Message

Span = tuple[int, int]  # characters, end excluded


class Rendering:
    """A conversation as a tokenizer's chat template writes it.

    Args:
        conversation: with at least one answer to learn.
    Raises:
        BadRow: there is no template, it refuses the conversation, or it leaves out a part of it.
    """

    def __init__(self, conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> None:
        if tokenizer.chat_template is None:
            raise BadRow(
                "the base model's tokenizer has no chat template, which a conversation needs; offer a model that has "
                "one, or rows of 'prompt' and 'completion'",
                code="no_chat_template",
                tells_job=True,
            )
        self.conversation, self._template = conversation, _Template(tokenizer, conversation.tools)
        try:
            self.text = self._template(conversation.messages)
            self.answers, self.rewrites = [], False
            for text, answer in self.turns():
                self.answers.append(answer)
                self.rewrites |= not self.text.startswith(text)
        except BadRow:
            raise
        except Exception:  # a template raises what it likes, and may repeat the row
            raise BadRow(
                "the base model's chat template refuses this conversation (the order of roles, or a role that it does "
                "not know, such as system or tool)",
                code="template_refuses",
            ) from None
        self._check_roles()

    def turns(self) -> Iterator[tuple[str, Span]]:
        """For each answer to learn the text up to its end, and where in it the answer stands. A conversation can be
        long and have many answers, so these texts are not kept.
        """
        for i in self.conversation.learned:
            before = self._template(self.conversation.messages[:i], asks=True)
            after = self._template(self.conversation.messages[: i + 1])
            if not after.startswith(before):
                raise BadRow(
                    "the base model's chat template does not put an answer where its own prompt for one ends, so no "
                    "text shows the model what it will see; join a system message to what the user says, or offer a "
                    "model with another template",
                    code="template_rewrites",
                )
            self._check_parts(i, after, len(before))
            yield after, (len(before), len(after))

    def _check_parts(self, i: int, text: str, start: int) -> None:
        message, before = self.conversation.messages[i], self.conversation.messages[:i]
        lost = [] if _stands(message["content"], text, start) else ["a part of the text"]
        lost += [part for part, lesser in _lesser(message) if self._template.gives(text, [*before, lesser])]
        if lost:
            raise BadRow(
                f"the base model's chat template leaves out {lost[0]} of an answer: it would not be learned",
                code="template_leaves_out",
            )

    def _check_roles(self) -> None:
        for role in {m["role"] for m in self.conversation.messages} - {"user", "assistant"}:
            silent = [m | {"content": ""} if m["role"] == role else m for m in self.conversation.messages]
            if silent != self.conversation.messages and self._template.gives(self.text, silent):
                raise BadRow(
                    "the base model's chat template leaves out what another than user and assistant says",
                    code="template_leaves_out",
                )


@dataclass(frozen=True)
class _Template:
    tokenizer: PreTrainedTokenizerBase
    tools: list[dict[str, Any]] | None

    def __call__(self, messages: Sequence[Message], asks: bool = False) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                list(messages), tools=self.tools, tokenize=False, add_generation_prompt=asks
            )
        )

    def gives(self, text: str, messages: Sequence[Message]) -> bool:
        """Whether it words other messages the same. One that it refuses it does not."""
        try:
            return self(messages) == text
        except Exception:
            return False


def _stands(content: str, text: str, start: int) -> bool:
    """Whether the answer at the end of `text` says all of `content`, of which a prompt may have begun to say something.
    Blanks do not count: templates trim and add them.
    """
    bare, whole, before = ("".join(each.split()) for each in (content, text, text[:start]))
    place = whole.rfind(bare)
    return not bare or (place >= 0 and place + len(bare) > len(before))


def _lesser(message: Message) -> Iterator[tuple[str, Message]]:
    """The answer without what templates are known to leave out beside its text, by what that is."""
    calls = message.get("tool_calls", [])
    if calls:
        kept = {"tool_calls": calls[:-1]} if len(calls) > 1 else {}
        yield "a tool call", {name: value for name, value in message.items() if name != "tool_calls"} | kept
    for thought in ("reasoning_content", "thinking"):
        if message.get(thought, "").strip():
            yield "the reasoning", {name: value for name, value in message.items() if name != thought}
