"""The job templates: which there are, the settings each has, and how one becomes a job of the user's own.

A template's own lines are the one source of truth: a setting is a line `name = value  # what it means`, or the same
behind a `# `, which is left out until it is set.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..config import SiteOverrides
from ..errors import ConfigError
from ..registry import nearest

_SETTING = re.compile(r"(?P<indent>\s+)(?P<off># )?(?P<name>\w+) = (?P<value>.*?) (?P<gap> +)# (?P<meaning>.+)")
_PLAIN = re.compile(r"\s+(?P<name>\w+) = (?P<value>[^#]+)")  # a line of NVFlare's own, which no user sets
_OPENS, _CLOSES = re.compile(r"\s*([\w-]*) ?=? ?[{\[](  #.*)?"), re.compile(r"\s*[}\]]")
_SILENT = {
    "",
    "args",
    "settings",
    "workflows",
    "executors",
    "components",
    "controller",
}  # blocks that no setting is named after
_SITE_APP, _CLIENT = "app_", "config/config_fed_client.conf"  # where sites differ, app_<site> is the folder of each
_NO_SETTINGS = {"config", "events_to_convert", "initial_adapter"}  # nor what ends in _id: they hold a job together
SITES, ADAPTER, ROWS = "sites", "adapter", "synthetic"  # the words of `nvflare-fm new` that are no setting's


@dataclass(frozen=True)
class TemplateSetting:
    """One setting of a template, and where it stands."""

    path: tuple[str, ...]  # its name, after those of the blocks around it
    value: str  # as it is written
    meaning: str
    is_set: bool  # False: the line is behind a #
    file: str
    line: int

    def __str__(self) -> str:
        return ".".join(self.path)


@dataclass(frozen=True)
class Template:
    """A job as text: the content of each of its files, by the path inside the job."""

    name: str
    files: Mapping[str, str]

    @property
    def description(self) -> str:
        return str(json.loads(next(k.value for k in self._lines() if k.path == ("description",))))

    @property
    def sites(self) -> list[str]:
        """The sites that have an app of their own; none: all sites are treated alike."""
        apps = sorted(file.split("/")[0] for file in self.files if file.endswith(_CLIENT))
        return [app.removeprefix(_SITE_APP) for app in apps if app.startswith(_SITE_APP)]

    @property
    def adapter_folder(self) -> str:
        """Where in the job the adapter lies that it starts from; empty: it starts afresh."""
        lines = (line for line in self._lines() if line.path[-1] == "initial_adapter")
        name = json.loads(line.value) if (line := next(lines, None)) else ""
        return f"{line.file.rpartition('/')[0]}/{name}" if line and name else ""

    def settings(self) -> list[TemplateSetting]:
        lines = [setting for setting in self._lines() if setting.meaning and setting.path[-1] not in _NO_SETTINGS]
        return [setting for setting in lines if not setting.path[-1].endswith("_id")]

    def setting(self, key: str) -> TemplateSetting:
        """The setting that `key` names, by as much of the end of its path as no other setting shares. Those that are
        not set give way to those that are.

        Raises:
            ConfigError: there is none, or more than one.
        """
        settings = self.settings()
        found = [setting for setting in settings if _named(setting, key)]
        found = [setting for setting in found if setting.is_set] or found
        if not found:
            known = sorted({shortest(k, settings) for k in settings} | {str(k) for k in settings} | {ADAPTER})
            hint = nearest(key, known) or nearest(key.rpartition(".")[2], known)
            raise ConfigError(
                f"{self.name} has no setting {key!r}; {hint}`nvflare-fm new {self.name} --help` lists them",
                code="wrong_setting",
            )
        if len(found) > 1:
            raise ConfigError(
                f"{key!r} can mean {' or '.join(shortest(setting, settings) for setting in found)}; say which",
                code="ambiguous_setting",
            )
        return found[0]

    def with_values(self, values: Mapping[str, Any]) -> "Template":
        """The same job with settings set. A text is read as what the setting holds so far: number, list, text.

        Raises:
            ConfigError: an unknown or ambiguous setting.
        """
        files = dict(self.files)
        for setting, value in [(self.setting(key), value) for key, value in values.items()]:
            lines = files[setting.file].splitlines(keepends=True)
            lines[setting.line] = _rewritten(lines[setting.line], written(value, setting.value))
            files[setting.file] = "".join(lines)
        return replace(self, files=files)

    def for_sites(self, sites: Sequence[str]) -> "Template":
        """The same job for these sites. One that the template does not know has an app in which nothing is set.

        Raises:
            ConfigError: this template treats all sites alike, or no site can have that name.
        """
        if not self.sites:
            raise ConfigError(
                f"{self.name} treats all sites alike; lora_mixed_hardware has an app for each", code="sites_alike"
            )
        if wrong := [site for site in sites if not re.fullmatch(r"[A-Za-z0-9][\w-]*", site) or site == "server"]:
            raise ConfigError(
                f"{wrong[0]!r} cannot be a site of a job; sites are named in letters, digits, _ and -", code="site_name"
            )
        apps = {_app(site): self.files.get(_app(site)) or self._blank(site) for site in sites}
        kept = {file: text for file, text in self.files.items() if file not in map(_app, self.sites)}
        deployed = "".join(f'    {_SITE_APP}{site} = ["{site}"]\n' for site in sites)
        others = rf"(?:    {_SITE_APP}(?!server )\S+ = .*\n)+"
        meta = re.sub(others, lambda _: deployed, self.files["meta.conf"])
        return replace(self, files={**kept, **apps, "meta.conf": meta})

    def _blank(self, site: str) -> str:
        text = re.sub(r"# What .*", f"# What {site} runs.", self.files[_app(self.sites[0])], count=1)
        lines = text.splitlines(keepends=True)
        for setting in _read("", text):
            if setting.is_set and setting.path[-1] in SiteOverrides.model_fields:
                lines[setting.line] = re.sub(r"^(\s+)(.*?)  ( *#)", r"\1# \2\3", lines[setting.line])
        return "".join(lines)

    def _lines(self) -> list[TemplateSetting]:
        return [setting for file in sorted(self.files, key=_order) for setting in _read(file, self.files[file])]


def _app(site: str) -> str:
    return f"{_SITE_APP}{site}/{_CLIENT}"


def folder() -> Path:
    """Inside the package where it is installed from a wheel, beside it in a checkout."""
    inside = Path(__file__).parents[1] / "job_templates"
    return inside if inside.is_dir() else inside.parents[1] / inside.name


def names() -> list[str]:
    """List the names of the job templates."""
    return sorted(file.parent.name for file in folder().glob("*/info.conf"))


def load(name: str) -> Template:
    """Load the job template of this name.

    Raises:
        ConfigError: there is no such template.
    """
    if name not in names():
        raise ConfigError(f"no template {name!r}; {nearest(name, names())}known: {names()}", code="unknown_name")
    root = folder() / name
    return Template(name, {f.relative_to(root).as_posix(): f.read_text("utf-8") for f in sorted(root.rglob("*.conf"))})


def shortest(setting: TemplateSetting, settings: Sequence[TemplateSetting]) -> str:
    """As little of a setting's path as tells it from the others."""
    ends = [".".join(setting.path[i:]) for i in range(len(setting.path) - 1, -1, -1)]
    for end in ends:
        rivals = [k for k in settings if _named(k, end) and (k.is_set or not setting.is_set)]
        if rivals == [setting]:
            return end
    return str(setting)


def _named(setting: TemplateSetting, key: str) -> bool:
    parts = tuple(key.split("."))
    return setting.path == parts if setting.path[0] == SITES else setting.path[-len(parts) :] == parts


def _order(file: str) -> tuple[int, str]:
    """What concerns all of a job first, what concerns one site last."""
    return ("meta.conf" not in file) + ("client" in file), file


def _read(file: str, text: str) -> Iterator[TemplateSetting]:
    """The lines that set something, with the blocks they are in."""
    app = file.split("/")[0]
    root = [SITES, app.removeprefix(_SITE_APP)] if file.endswith(_CLIENT) and app.startswith(_SITE_APP) else []
    blocks: list[str] = []
    for number, line in enumerate(text.splitlines()):
        if opened := _OPENS.fullmatch(line):
            blocks.append(opened[1])
        elif _CLOSES.match(line):
            blocks.pop()
        elif found := _SETTING.fullmatch(line) or _PLAIN.fullmatch(line):
            said = found.groupdict()
            if said["name"] == "id":
                blocks[-1] = json.loads(said["value"])
            inside = [block for block in blocks if block not in _SILENT and not (root and block == "executor")]
            path = (*root, *inside, said["name"])
            yield TemplateSetting(path, said["value"], said.get("meaning", ""), not said.get("off"), file, number)


def _rewritten(line: str, value: str) -> str:
    """A setting's line with another value, no longer behind a #, its comment in its old column where there is room."""
    found = _SETTING.fullmatch(line.rstrip("\n"))
    assert found  # the line was found by it
    start, column = f"{found['indent']}{found['name']} = {value}", line.index("# ", found.start("gap"))
    return f"{start:<{column - 2}}  # {found['meaning']}\n"


def written(value: Any, now: str) -> str:
    """`value` as HOCON. A text is taken for what a setting that holds `now` can hold; whether it may, the settings
    classes say, so what is no number goes in as a text, to be refused there.
    """
    if not isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    held = json.loads(now)
    if value.startswith("{"):
        return json.dumps(_rule(value), ensure_ascii=False)
    if isinstance(held, list) or value.startswith("[") or (isinstance(held, str) and "," in value):
        return json.dumps(_items(value), ensure_ascii=False)
    if isinstance(held, str):
        return json.dumps(value, ensure_ascii=False)
    literal = re.fullmatch(r"true|false|[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", value)
    return _number(value) if literal else json.dumps(value, ensure_ascii=False)


def _number(value: str) -> str:
    if value in ("true", "false"):
        return value
    return value if re.fullmatch(r"-?\d+(\.\d+)?([eE][+-]?\d+)?", value) else repr(float(value))


def _rule(value: str) -> Any:
    """`{"rule": "adam", "beta1": 0.5}`.

    Raises:
        ConfigError: it is not JSON.
    """
    try:
        return json.loads(value)
    except ValueError:
        raise ConfigError(f'{value} is not JSON; write {{"rule": "adam", "beta1": 0.5}}', code="not_json") from None


def _items(value: str) -> list[Any]:
    """`["a", "b"]`, `[a, b]` or `a,b`; of rules with settings, the first."""
    try:
        return [item if isinstance(item, dict) else str(item) for item in json.loads(value)]
    except (ValueError, TypeError):
        bare = value.removeprefix("[").removesuffix("]")
        return [item.strip().strip("'\"") for item in bare.split(",") if item.strip()]
