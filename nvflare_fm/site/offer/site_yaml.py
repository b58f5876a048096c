"""YAML as a person writes settings: small, flat, each key once, nothing that stands for something else.

PyYAML's safe loader without what a settings file does not need: aliases (which can make a few lines stand for
gigabytes, or contain themselves), tags, merge keys. A key that is written twice is an error, not the last one's win.
"""

from pathlib import Path
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node

from ...errors import ConfigError
from ...files import read_bytes

SIZE, DEPTH = 2**18, 12  # bytes of a file, and levels of lists and groups in it


class _Refused(yaml.MarkedYAMLError):
    """YAML that is well formed and not read here."""


class _DoubleKey(_Refused):
    """A key that is written twice."""


class _Loader(yaml.SafeLoader):
    depth = 0

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise _Refused(problem="write the value itself instead of *alias", problem_mark=event.start_mark)
        if getattr(event, "tag", None) is not None:
            raise _Refused(problem="leave the tag (!…) out", problem_mark=event.start_mark)
        if self.depth == DEPTH:
            raise _Refused(problem=f"no settings lie deeper than {DEPTH} levels", problem_mark=event.start_mark)
        self.depth += 1
        node: Node | None = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            name = str(key.value)
            if name in seen:
                raise _DoubleKey(problem=f"{name!r:.80} is written twice; keep one", problem_mark=key.start_mark)
            seen.add(name)
        found: dict[Any, Any] = super().construct_mapping(node, deep)
        return found

    def flatten_mapping(self, node: MappingNode) -> None:
        """Without merge keys: `<<` is then a key that no setting has."""


def read_yaml(file: Path, name: str) -> Any:
    """Read a small YAML file in UTF-8, in bounded time and memory.

    Args:
        name: what the file is called where no path may be told.
    Returns:
        Its content in plain Python; None where it is empty.
    Raises:
        ConfigError: it cannot be read, is not YAML, or holds what is not read here; the line is in the local part.
    """
    try:
        return yaml.load(read_bytes(file, SIZE).decode("utf-8-sig"), _Loader)
    except _DoubleKey as error:
        raise ConfigError(
            f"{name} has a key that is written twice; the site's log names it", f"{file}: {error}", code="double_key"
        ) from None
    except OSError as error:
        raise ConfigError(
            f"{name} cannot be read; write one or mend it", f"{file}: {error}", code="site_file_unreadable"
        ) from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # ValueError: a date or number that is none
        raise ConfigError(
            f"{name} is not YAML as it is read here: a text in UTF-8 of at most {SIZE} bytes, without aliases and "
            "tags; the site's log has the line",
            f"{file}: {error}",
            code="site_file_malformed",
        ) from None
