"""What names a job may give to a model or to data: aliases, which each site resolves in its own `fm_site.yaml`."""

import re

_LOOKS = [  # the first that matches says what a name is that is no alias
    (r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", ""),
    (r"(.*[/\\])?\.\.([/\\].*)?", "a way out of a folder"),
    (r"[A-Za-z]:\\.*|\\.*", "a path"),
    (r"[A-Za-z_]\w*([.:][A-Za-z_]\w*)*:[A-Za-z_]\w*", "a class path"),
    (r"[a-z][a-z0-9+.-]*:.*", "a URL"),
    (r"[\w.-]+/[\w.-]+", "a hub id"),
    (r"[~.]?[\w .~-]*[/\\].*|.*\.(jsonl?|csv|parquet|safetensors|bin|gz|txt)", "a path"),
    (r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", "a class path"),
]


def not_an_alias(name: str) -> str:
    """Tell what `name` looks like, if it is no alias; empty where it is one."""
    return next((kind for pattern, kind in _LOOKS if re.fullmatch(pattern, name, re.DOTALL)), "code or not a name")
