"""Texts that look like HOCON: what a job could say, and what one could try."""

import json
from typing import Any

from hypothesis import strategies as st

# Whole lines, so that many texts are well formed, and fragments, so that many are nearly so.
PIECES = (
    *("a = ", "b : ", "c {", "}\n", "[\n", "]\n", "a = 1\n", 'b = "t"\n', "{", "}", "[", "]", ",", "=", ":"),
    *("\n", "\n", " ", "\t", '"a"', '"b c"', '""', '"x.y"', "a", "b", "true", "FALSE", "null", "1", "-2", "0.5"),
    *("1e3", "10 s", "a-b", "a.b", "/", "\\", "# c\n", "// c\n", "#", "//", '"""', '"\\n"', '"\\\\"', '"#"'),
    *('"{x}"', '"é"', "é", "\r\n", "\r", "\x0b", "\x85", "\u2028", "$", "+=", "FM_CANARY"),
    *("${FM_CANARY}", "${?FM_CANARY}", "{$FM_CANARY}", '"{$FM_CANARY}"', '"}$FM_CANARY}"', '"{FM_CANARY}"'),
    *("include ", "Include ", "ınclude ", "file(", "url(", "package(", "required(", ")", '"canary.conf"', "*"),
    *('include "canary.conf"\n', 'include file("canary.conf")\n', 'FM_CANARY += "x"\n', "a = ${FM_CANARY}\n"),
)  # fmt: skip
texts = st.lists(st.sampled_from(PIECES) | st.text(max_size=2), max_size=24).map("".join)

_keys = st.text(min_size=1, max_size=5) | st.sampled_from("abc")
_leaves = (
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8)
)
values: st.SearchStrategy[dict[str, Any]] = st.dictionaries(
    _keys,
    st.recursive(
        _leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_keys, inner, max_size=3), max_leaves=12
    ),
    max_size=4,
)


@st.composite
def written(draw: st.DrawFn, said: st.SearchStrategy[dict[str, Any]] = values) -> tuple[dict[str, Any], str]:
    """Values, and one of the ways to write them in HOCON."""
    value, pick = draw(said), draw(st.randoms(use_true_random=False))
    inside = _members(value, pick)
    return value, inside if pick.random() < 0.5 else "{\n" + inside + "}"


def _members(value: dict[str, Any], pick: Any) -> str:
    text = ""
    for key, inner in value.items():
        bare = key.isascii() and key.isidentifier() and pick.random() < 0.7
        sign = pick.choice([" = ", ": ", "=", *[" "] * isinstance(inner, dict)])
        end = pick.choice(["\n", "\n\n  ", ",\n", ' # note "${x}\n', " // include {\n"])
        text += (key if bare else json.dumps(key, ensure_ascii=False)) + sign + _value(inner, pick) + end
    return text


def _value(value: Any, pick: Any) -> str:
    if isinstance(value, dict):
        return "{" + pick.choice(["", "\n"]) + _members(value, pick) + "}"
    if isinstance(value, list):
        items = "".join(_value(inner, pick) + pick.choice([", ", "\n", ",\n", " # c\n"]) for inner in value)
        return "[" + pick.choice(["", " ", "\n"]) + items + "]"
    return json.dumps(value, ensure_ascii=False)
