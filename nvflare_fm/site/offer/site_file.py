"""Writes a `fm_site.yaml` that explains itself: each setting with its meaning, those left alone commented out.

The list of settings and their meanings is `SiteConfig` itself, so the file cannot fall behind the code.
"""

import json
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from .site_config import DataSource, Limits, ModelSource, Privacy, SiteConfig, Synthetic, Welcome

_HEAD = """\
# What this site offers to federated fine-tuning (nvflare_fm), and how far it goes. Written for the site's admin.
# Jobs name the aliases below and never a path; nothing in this file but the limits is told to anyone.
# It is read again at the start of every job. Check it before the first:  nvflare-fm site check
"""
_MODELS = "Base models, by alias. Print a folder's fingerprint with: nvflare-fm site check"
_DATA = "Data sets, by alias. Nothing outside their folders is read."
_EXAMPLES: dict[str, tuple[str, type[BaseModel], dict[str, Any]]] = {
    "models": (_MODELS, ModelSource, {"base": {"path": "/srv/models/base"}}),
    "data": (_DATA, DataSource, {"notes": {"train": "train.jsonl", "folder": "/srv/data/notes"}}),
}
_GROUPS: dict[str, type[BaseModel]] = {"limits": Limits, "privacy": Privacy, "synthetic": Synthetic, "welcome": Welcome}


def render(values: Mapping[str, Any]) -> str:
    """The text of a site file that says `values`, and how to say the rest.

    Raises:
        ConfigError: `values` are not those of a site file.
    """
    SiteConfig.read(values, "site file")
    parts = [_HEAD]
    for name, (meaning, kind, example) in _EXAMPLES.items():
        given = values.get(name) or {}
        lines = [f"# {meaning}", f"{name}:"]
        lines += _aliases(kind, given) if given else [f"# {line}" for line in _aliases(kind, example)]
        parts.append("\n".join(lines) + "\n")
    for name, group in _GROUPS.items():
        given = values.get(name) or {}
        meaning = (group.__doc__ or "").splitlines()[0]
        lines = [f"# {meaning}", f"{name}:", *_settings(group, given, "  ")]
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def _aliases(kind: type[BaseModel], given: Mapping[str, Mapping[str, Any]]) -> list[str]:
    return [line for alias in given for line in (f"  {alias}:", *_settings(kind, given[alias], "    "))]


def _settings(group: type[BaseModel], given: Mapping[str, Any], indent: str) -> list[str]:
    lines = []
    for name, field in group.model_fields.items():
        value = given.get(name, field.get_default(call_default_factory=True))
        value = field.examples[0] if value is None and field.examples else value
        mark = "" if name in given else "# "
        meaning = f"  # {field.description}" if field.description else ""
        lines.append(f"{indent}{mark}{name}: {json.dumps(value, ensure_ascii=False)}{meaning}")
    return lines
