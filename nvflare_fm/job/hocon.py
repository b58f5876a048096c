"""The part of HOCON in which every value stands in the text itself, read without pyhocon.

Left out is what takes a value from elsewhere (`include`, `${…}`, `+=`: pyhocon reads files, addresses and the
environment for them) and what two readers could take differently: a key written twice, `a.b = 1`, texts joined from
parts, units such as `10 s`, `\\u0041`. After https://github.com/lightbend/config/blob/main/HOCON.md
"""

import math
import re
from typing import Any

from ..errors import ConfigError

MAX_DEPTH = 24  # blocks and lists inside each other
_LONGEST_NUMBER = 32
_TOKEN = re.compile(
    r"""
    (?P<blank>   [ \t]+ | (?:\#|//)[^\n]* )
  | (?P<newline> \n )
  | (?P<mark>    [{}\[\],=:] )
  | (?P<text>    "(?:[^"\\\x00-\x1f]|\\["\\nrt])*" (?!") )
  | (?P<number>  -?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)? )
  | (?P<word>    [A-Za-z_][A-Za-z0-9_-]* (?!/) )
    """,
    re.VERBOSE,
)
# Other readers may end a line or a word at one of these.
_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u2000-\u200f\u2028-\u202f\u2060-\u206f\ufeff\ud800-\udfff]")
_ESCAPED = {'\\"': '"', "\\\\": "\\", "\\n": "\n", "\\r": "\r", "\\t": "\t"}
_WORDS = {"true": True, "false": False, "null": None}
Token = tuple[str, str, int]  # its kind, how it is written, and in which line


def parse(text: str, name: str = "HOCON") -> dict[str, Any]:
    """Read a text of this part of HOCON.

    Args:
        name: of the text, for messages.
    Returns:
        The same values as pyhocon, which for such a text reads nothing but the text.
    Raises:
        ConfigError: it is not of this part; names the line and what to write.
    """
    try:
        return _Reader(_tokens(text.replace("\r\n", "\n"))).root()
    except _NotPlain as error:
        raise ConfigError(f"{name}, {error}", code="not_plain_hocon") from None


class _NotPlain(Exception):
    def __init__(self, line: int, why: str) -> None:
        super().__init__(f"line {line}: {why}")


def _tokens(text: str) -> list[Token]:
    tokens, at, line = [], 0, 1
    if unseen := _UNSEEN.search(text):
        raise _NotPlain(
            text.count("\n", 0, unseen.start()) + 1, f"the character {unseen[0]!r} is not allowed; remove it"
        )
    while at < len(text):
        found = _TOKEN.match(text, at)
        if not found:
            raise _NotPlain(line, f"{text[at : at + 20]!r}: {_advice(text[at:])}")
        kind = str(found.lastgroup)
        if kind != "blank":
            tokens.append((kind, found[0], line))
        line += kind == "newline"
        at = found.end()
    return [*tokens, ("end", "", line)]


def _advice(text: str) -> str:
    if text.startswith("$"):
        return "no value is taken from elsewhere; write the value itself"
    if text.startswith("+="):
        return "nothing is added to a value; write the whole value"
    if text.startswith('"'):
        return 'a text stands on one line, between single "; the escapes are \\" \\\\ \\n \\r \\t'
    return 'write a text in quotes, "like this"'


class _Reader:
    """Goes through the tokens once."""

    def __init__(self, tokens: list[Token]) -> None:
        self.tokens, self.at, self.depth = tokens, 0, 0

    def root(self) -> dict[str, Any]:
        self._lines()
        value = self._block("}") if self._take("{") else self._block("")
        self._lines()
        if self.kind != "end":
            raise self._unexpected("the end of the file")
        return value

    @property
    def kind(self) -> str:
        return self.tokens[self.at][0]

    @property
    def written(self) -> str:
        return self.tokens[self.at][1]

    def _unexpected(self, wanted: str) -> _NotPlain:
        _, written, line = self.tokens[self.at]
        return _NotPlain(line, f"{written[:40]!r} where {wanted} should be")

    def _take(self, mark: str) -> bool:
        if self.kind == "mark" and self.written == mark:
            self.at += 1
            return True
        return False

    def _lines(self) -> bool:
        """Whether a line ended here; any number may."""
        before = self.at
        while self.kind == "newline":
            self.at += 1
        return self.at > before

    def _separated(self) -> bool:
        ended = self._lines()
        if self._take(","):
            self._lines()
            return True
        return ended

    def _ends(self, mark: str) -> bool:
        return self._take(mark) if mark else self.kind == "end"

    def _block(self, end: str) -> dict[str, Any]:
        values: dict[str, Any] = {}
        self._lines()
        while not self._ends(end):
            line = self.tokens[self.at][2]
            key = self._key()
            if key in values:
                raise _NotPlain(line, f"{key[:40]!r} is set twice; keep one")
            if not (self.kind == "mark" and self.written == "{") and not (self._take("=") or self._take(":")):
                raise self._unexpected("= or {")
            values[key] = self._value()
            if not self._separated() and not self._closes(end):
                raise self._unexpected("the end of the line")
        return values

    def _list(self) -> list[Any]:
        values: list[Any] = []
        self._lines()
        while not self._take("]"):
            line = self.tokens[self.at][2]
            values.append(self._value())
            if values[-1] is None or values[-1] == "":
                raise _NotPlain(line, "HOCON loses an empty text or null in a list; leave it out, or write JSON")
            if not self._separated() and not self._closes("]"):
                raise self._unexpected(", or ]")
        return values

    def _closes(self, mark: str) -> bool:
        return self.kind == "end" if not mark else self.kind == "mark" and self.written == mark

    def _key(self) -> str:
        kind, written, line = self.tokens[self.at]
        if kind not in ("word", "text") or written == '""' or "\\" in written:
            raise self._unexpected("the name of a setting")
        if written.lower() == "include":
            raise _NotPlain(line, "nothing is included; write the settings here")
        self.at += 1
        return written.strip('"')

    def _value(self) -> Any:
        kind, written, line = self.tokens[self.at]
        self.at += 1
        if kind == "text":
            return re.sub(r"\\.", lambda escape: _ESCAPED[escape[0]], written[1:-1])
        if kind == "number":
            return _number(written, line)
        if kind == "word" and "-" not in written and written.lower() != "include":
            return _WORDS.get(written.lower(), written)
        if kind == "mark" and written in "{[":
            self.depth += 1
            if self.depth > MAX_DEPTH:
                raise _NotPlain(line, f"more than {MAX_DEPTH} blocks and lists inside each other")
            value = self._block("}") if written == "{" else self._list()
            self.depth -= 1
            return value
        self.at -= 1
        raise self._unexpected("a value")


def _number(written: str, line: int) -> int | float:
    value = int(written) if re.fullmatch("-?[0-9]+", written) and len(written) <= _LONGEST_NUMBER else float(written)
    if len(written) > _LONGEST_NUMBER or not math.isfinite(value):
        raise _NotPlain(line, f"{written[:40]} is no number that a setting can have")
    return value
