"""Rows of the shapes in which people keep conversations, as the messages that a chat template takes.

    OpenAI      {"messages": [{"role", "content"}, …], "tools": […]}; content may be a list of parts
    ShareGPT    {"conversations": [{"from": "human", "value"}, …], "system": …}
    TRL         {"prompt": [messages], "completion": [messages]}
    Alpaca      {"instruction", "input", "output"}

Contents are joined, and arguments of tool calls parsed, as vLLM does before it fills in a chat template.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from . import BadRow, text_of

Message = dict[str, Any]
TURNS = 200  # a template is rendered once and again for each, so time grows with their square
_TOOLS = 200
_CALLS = 50  # of one message
_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
    "bot": "assistant", "model": "assistant", "system": "system", "tool": "tool", "observation": "tool",
    "function_response": "tool", "function_call": "function_call",
}  # fmt: skip
_BESIDE = {  # texts that a template may take, too, and what it calls them
    "name": "name", "tool_call_id": "tool_call_id", "thinking": "thinking",
    "reasoning": "reasoning_content", "reasoning_content": "reasoning_content",
}  # fmt: skip


@dataclass(frozen=True)
class Conversation:
    """Messages, the numbers of those to learn from, and the tools that are named to the model."""

    messages: list[Message]
    learned: tuple[int, ...]
    tools: list[dict[str, Any]] | None = None


def conversation(row: Mapping[str, Any]) -> Conversation | None:
    """The conversation that a row holds, of whatever shape; None: it holds a plain text, or a plain prompt.

    Raises:
        BadRow: it holds one that cannot be used.
    """
    column = _shape(row)
    if column is None:
        return None
    messages, learned = _SHAPES[column](row)
    if not any(messages[i]["content"].strip() or messages[i].get("tool_calls") for i in learned):
        raise BadRow(f"{column!r} has no assistant turn to learn from", code="no_assistant_turn")
    system = _optional(row, "system")
    if system and messages[0]["role"] == "system":
        raise BadRow(
            "'system' stands beside a conversation that has a system message of its own", code="two_system_messages"
        )
    first = [{"role": "system", "content": system}] if system else []
    return Conversation([*first, *messages], tuple(i + len(first) for i in learned), _tools(row.get("tools")))


def alpaca_prompt(row: Mapping[str, Any]) -> str:
    """What Alpaca's authors put before an answer, for tokenizers without a chat template (github.com/tatsu-lab)."""
    instruction, given = text_of(row, "instruction"), _optional(row, "input")
    task = "Below is an instruction that describes a task"
    ask = "Write a response that appropriately completes the request."
    if given:
        context = f"{task}, paired with an input that provides further context. {ask}"
        return f"{context}\n\n### Instruction:\n{instruction}\n\n### Input:\n{given}\n\n### Response:\n"
    return f"{task}. {ask}\n\n### Instruction:\n{instruction}\n\n### Response:\n"


def is_plain_alpaca(row: Mapping[str, Any]) -> bool:
    """Whether Alpaca's prompt says all that a row says: it has no shape but Alpaca's, and nothing said before."""
    return _shape(row) == "output" and not any(row.get(column) for column in ("system", "history", "tools"))


def _shape(row: Mapping[str, Any]) -> str | None:
    """The column that tells a conversation's shape; None: there is none, or the completion is a plain text."""
    column = next((column for column in _SHAPES if row.get(column) is not None), None)
    return None if column == "completion" and isinstance(row["completion"], str) else column


def _messages(row: Mapping[str, Any], column: str) -> tuple[list[Message], list[int]]:
    given = row[column]
    if not isinstance(given, list) or not given or not all(isinstance(m, Mapping) for m in given):
        raise BadRow(f"{column!r} is not a list of {{role, content}} or {{from, value}}", code="not_a_conversation")
    if len(given) > TURNS:
        raise BadRow(f"the conversation has more than {TURNS} messages", code="too_many_messages")
    messages = [_message(m) for m in given]
    unlearned = {i for i, m in enumerate(given) if m.get("weight") == 0}  # OpenAI's way to leave a turn out
    return messages, [i for i, m in enumerate(messages) if m["role"] == "assistant" and i not in unlearned]


def _openai(row: Mapping[str, Any]) -> tuple[list[Message], list[int]]:
    return _messages(row, "messages")


def _sharegpt(row: Mapping[str, Any]) -> tuple[list[Message], list[int]]:
    return _messages(row, "conversations")


def _prompted(row: Mapping[str, Any]) -> tuple[list[Message], list[int]]:
    """TRL's: the assistant's turns in the completion are learned, those in the prompt are not."""
    if row.get("prompt") is None:
        raise BadRow("'prompt' is missing", code="value_missing")
    before, (after, learned) = _messages(row, "prompt")[0], _messages(row, "completion")
    if len(before) + len(after) > TURNS:
        raise BadRow(f"the conversation has more than {TURNS} messages", code="too_many_messages")
    return [*before, *after], [i + len(before) for i in learned]


def _alpaca(row: Mapping[str, Any]) -> tuple[list[Message], list[int]]:
    given, history = _optional(row, "input"), row.get("history") or []
    asked = "\n\n".join([text_of(row, "instruction"), *([given] if given else [])])
    if not isinstance(history, list) or not all(_is_pair(pair) for pair in history):
        raise BadRow("'history' is not a list of pairs of texts", code="wrong_history")
    if len(history) >= TURNS // 2:
        raise BadRow(f"the conversation has more than {TURNS} messages", code="too_many_messages")
    said = [text for pair in history for text in pair]
    roles = ("user", "assistant")
    turns = [{"role": roles[i % 2], "content": text} for i, text in enumerate([*said, asked, text_of(row, "output")])]
    return turns, list(range(1, len(turns), 2))


_SHAPES: dict[str, Callable[[Mapping[str, Any]], tuple[list[Message], list[int]]]] = {
    "messages": _openai, "conversations": _sharegpt, "completion": _prompted, "output": _alpaca,
}  # fmt: skip  # a row is of the first shape of which it has the column


def _is_pair(pair: Any) -> bool:
    return isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(text, str) for text in pair)


def _optional(row: Mapping[str, Any], column: str) -> str:
    value = row.get(column)
    if value is not None and not isinstance(value, str):
        raise BadRow(f"{column!r} is not a text", code="value_not_text")
    return value if value and value.strip() else ""


def _message(given: Mapping[str, Any]) -> Message:
    """One message with the keys that templates read; a value that a table left empty is as if it were not there."""
    given = {name: value for name, value in given.items() if value is not None}
    role, content = given.get("role", given.get("from")), given.get("content", given.get("value"))
    if not isinstance(role, str) or not role:
        raise BadRow("a message lacks a 'role'", code="no_role")
    if "role" not in given:
        if role not in _ROLES:
            raise BadRow("a message's 'from' is none of human, gpt, system, tool and the like", code="unknown_role")
        role = _ROLES[role]
    older = [{"function": given["function_call"]}] if "function_call" in given else []  # OpenAI's, before tool_calls
    calls = given.get("tool_calls") or older
    if role == "function_call":  # the value is the call
        role, content, calls = "assistant", None, [{"function": _object(content)}]
    message: Message = {"role": role}
    if calls and (not isinstance(calls, list) or len(calls) > _CALLS or role != "assistant"):
        raise BadRow(f"'tool_calls' is not an assistant's list of up to {_CALLS} calls", code="wrong_tool_call")
    message["content"] = "" if content is None and calls else _text(content)
    if calls:
        message["tool_calls"] = [_call(call) for call in calls]
    for theirs, name in _BESIDE.items():
        if theirs in given:
            if not isinstance(given[theirs], str):
                raise BadRow(f"a message's {theirs!r} is not a text", code="value_not_text")
            message[name] = given[theirs]
    return message


def _text(content: Any) -> str:
    """A content, its parts joined."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise BadRow("a message lacks a 'content' text", code="wrong_content")
    if not all(isinstance(part, Mapping) for part in content):
        raise BadRow("a message's 'content' is neither a text nor a list of parts", code="wrong_content")
    texts = [part.get("text") for part in content if part.get("type") in ("text", "input_text", "output_text")]
    if len(texts) < len(content) or not all(isinstance(text, str) for text in texts):
        raise BadRow(
            "a message has a part that is no text, such as an image; only texts are learned from",
            code="content_not_text",
        )
    return "\n".join(str(text) for text in texts)


def _call(given: Any) -> dict[str, Any]:
    """A tool call; its arguments are values, whether they were written as JSON or not."""
    function = given.get("function") if isinstance(given, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise BadRow("a tool call lacks its function's name", code="wrong_tool_call")
    arguments = function.get("arguments")
    values = _object(arguments or "{}") if isinstance(arguments, str | None) else _without_none(arguments)
    if not isinstance(values, Mapping):
        raise BadRow("the arguments of a tool call are no JSON object", code="wrong_tool_arguments")
    call = {"type": "function", "function": {"name": function["name"], "arguments": values}}
    return {"id": given["id"], **call} if isinstance(given.get("id"), str) else call


def _object(text: Any) -> dict[str, Any]:
    values = _parsed(text)
    if not isinstance(values, dict):
        raise BadRow("the arguments of a tool call are no JSON object", code="wrong_tool_arguments")
    return values


def _tools(given: Any) -> list[dict[str, Any]] | None:
    if given is None or given in ("", []):
        return None
    tools = _without_none(_parsed(given) if isinstance(given, str) else given)
    if not isinstance(tools, list) or len(tools) > _TOOLS or not all(isinstance(tool, dict) for tool in tools):
        raise BadRow(f"'tools' is not a list of up to {_TOOLS} descriptions", code="wrong_tools")
    return tools


def _parsed(text: Any) -> Any:
    try:
        return json.loads(text)
    except (TypeError, ValueError, RecursionError):
        raise BadRow("tools, or the arguments of a tool call, are not JSON", code="tools_not_json") from None


def _without_none(value: Any) -> Any:
    """Without what a table adds: every row of a Parquet file has the keys of all rows, empty where it has none."""
    if isinstance(value, Mapping):
        return {name: _without_none(each) for name, each in value.items() if each is not None}
    return [_without_none(each) for each in value] if isinstance(value, list) else value
