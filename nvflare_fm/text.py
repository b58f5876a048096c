"""Text for a person's terminal: paths, settings and what sites send are in it, and none of it may steer the screen."""


def printable(text: object) -> str:
    r"""Spell out every character of `text` that does not print as itself, new lines and tabs aside: `\x1b`."""
    return "".join(c if c.isprintable() or c in "\n\t" else _spelt(c) for c in str(text))


def one_line(text: object) -> str:
    """As `printable`, with every run of blanks and new lines made one blank."""
    return printable(" ".join(str(text).split()))


def _spelt(character: str) -> str:
    return character.encode("unicode_escape", "backslashreplace").decode("ascii")
