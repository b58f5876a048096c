"""Which configuration a job may bring: files in which every value stands for itself, under the names NVFlare reads.

NVFlare and the libraries it uses would otherwise put the reader's own files and environment in a value's place: HOCON's
`include` and `${NAME}`, OmegaConf's `${oc.env:NAME}`, and in any format NVFlare's `{$NAME}`. NVFlare also looks for its
own files by name in all folders below a kit, so that a job's `resources.json` could be taken for the site's.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import PurePosixPath
from typing import Any

from ..errors import ConfigError
from ..synthesis import candidates
from . import hocon, synthetic

MAX_BYTES = 256 * 1024  # of one file of configuration
MAX_FILES = 1000  # of an app
FORMATS = (".json", ".conf")
CLIENT, SERVER = "config_fed_client", "config_fed_server"
_READ_AS_CONFIG = re.compile(r"\.(json|conf|yml|yaml)(\.default)?$", re.IGNORECASE)
_BROUGHT = {"adapter_config.json", "provenance.json", "sealed.json"}  # of an adapter; see `export`
SYNTHETIC = f"config/{synthetic.FILE}"  # the only lines of JSON that a job may bring
_SIGNATURE = ".__nvfl_sig.json"  # NVFlare puts one into each folder
_ODD = re.compile(r"[\x00-\x1f\x7f\\]")
_PASSED_ON = "events_to_convert"  # an argument of NVFlare's ConvertToFedEvent, which a log line is an event for, too
METRICS = "analytix_log_stats"  # the event of a metric


def check_app(names: Iterable[str], read: Callable[[str], bytes], needs: str = "") -> None:
    """Check the files of one app of a job, before anything else reads them.

    Args:
        names: of all files and folders, relative to the app, as an archive or a folder lists them; folders end in /.
        read: gives a file's first bytes, one more than `most_bytes`.
        needs: `CLIENT` or `SERVER`, where the app must have that configuration.
    Raises:
        ConfigError: a file that a job may not bring, or one that takes a value from elsewhere. Names the file.
    """
    listed = [name for name, _ in zip(names, range(MAX_FILES + 1), strict=False)]
    if len(listed) > MAX_FILES:
        raise ConfigError(f"the app has more than {MAX_FILES} files; leave some out", code="too_many_files")
    configs = [name for name in _plain(listed) if not name.endswith("/") and _is_configuration(name)]
    stems = Counter(PurePosixPath(name).stem for name in configs)
    for stem, times in stems.items():
        if times > 1:
            raise ConfigError(f"the app has {times} files {stem}.*; keep one", code="ambiguous_file")
    if needs and needs not in stems:
        raise ConfigError(f"the app has no config/{needs}.json or .conf", code="missing_file")
    for name in configs:
        _check_values(name, parse_config(name, read(name)))
    for name in listed:
        if name == SYNTHETIC:
            candidates.read(read(name), name)
        elif name.lower().endswith(".jsonl") and name.split("/")[0] != "custom":
            raise ConfigError(
                f"{name[:80]!r} is no file that a job may bring; its synthetic rows are {SYNTHETIC}",
                code="unexpected_file",
            )


def most_bytes(name: str) -> int:
    """The largest size of a file that is read before a job is let in."""
    return candidates.LARGEST if name.endswith(SYNTHETIC) else MAX_BYTES


def _plain(names: list[str]) -> list[str]:
    """The names, where each is the one path it seems to be."""
    for name in names:
        if name.startswith("/") or ".." in name.split("/") or _ODD.search(name) or not name:
            raise ConfigError(f"{name[:80]!r} is no name for a file of a job; rename it", code="odd_file_name")
    for name, times in Counter(str(PurePosixPath(name)) for name in names).items():
        if times > 1:
            raise ConfigError(f"{name[:80]!r} is in the app {times} times; keep one", code="ambiguous_file")
    return names


def _is_configuration(name: str) -> bool:
    """Whether NVFlare reads this file as a job's configuration. Other files that could be read as configuration may not
    be there at all, except those of an adapter, which NVFlare does not look for, and code, which is a right of its own.
    """
    folder, _, file = name.rpartition("/")
    if not _READ_AS_CONFIG.search(file) or folder.split("/")[0] == "custom":
        return False
    if folder == "config" and file in {f"{stem}{format_}" for stem in (CLIENT, SERVER) for format_ in FORMATS}:
        return True
    if (file in _BROUGHT and re.fullmatch("config/[^/]+", folder)) or file == _SIGNATURE:
        return False
    raise ConfigError(
        f"{name[:80]!r} is no file that a job may bring; its configuration is config/{CLIENT} and config/{SERVER}, as "
        ".json or .conf",
        code="unexpected_file",
    )


def parse_config(name: str, data: bytes) -> dict[str, Any]:
    """What a file of configuration says, without reading anything but `data`.

    Args:
        name: with the ending that tells its format, .json or .conf.

    Raises:
        ConfigError: it is not plain JSON or HOCON. Names the file and the line or setting.
    """
    name = name[-80:]
    if len(data) > MAX_BYTES:
        raise ConfigError(f"{name} is larger than {MAX_BYTES} bytes; make it smaller", code="file_too_large")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name}: byte {error.start} is not UTF-8; save it as UTF-8", code="not_utf8") from None
    return hocon.parse(text, name) if name.endswith(".conf") else _json(text, name)


def _json(text: str, name: str) -> dict[str, Any]:
    try:
        values = json.loads(text, object_pairs_hook=_unique, parse_constant=_finite, parse_float=_finite)
        for _ in _leaves(values):
            pass  # each is no deeper than allowed
    except (ValueError, RecursionError) as error:  # a number of thousands of digits is a ValueError, too
        raise ConfigError(f"{name} is not plain JSON: {str(error)[:200]}", code="not_json") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{name} must hold one JSON object", code="not_json")
    return values


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        twice = next(key for key, times in Counter(key for key, _ in pairs).items() if times > 1)
        raise ValueError(f"{twice[:40]!r} is set twice")
    return values


def _finite(written: str) -> float:
    if not math.isfinite(value := float(written)):
        raise ValueError(f"{written[:40]} is no number that a setting can have")
    return value


def _leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every value that is no object and no list, and every empty one, with the way to it.

    Raises:
        ValueError: the way to one is too long.
    """
    if len(path) > hocon.MAX_DEPTH + 1:
        raise ValueError(f"more than {hocon.MAX_DEPTH} objects and lists inside each other")
    if value and isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _leaves(inner, (*path, str(key)))
    else:
        yield path, value


def _check_values(name: str, config: dict[str, Any]) -> None:
    """No text that NVFlare would put another value in the place of, and no local event but metrics sent on."""
    for path, value in _leaves(config):
        setting = ".".join(path)[:120]
        if isinstance(value, str) and re.search("[{}]", value):
            raise ConfigError(
                f"{name}: {setting!r} has {{ or }} in it, where NVFlare puts in values of the machine that reads it, "
                "such as its environment; leave them out",
                code="reads_environment",
            )
        if _PASSED_ON in path and value not in (METRICS, [], {}):
            raise ConfigError(
                f"{name}: {setting!r} sends another event than {METRICS!r} to the server, and every log line is an "
                "event; leave it out",
                code="sends_events",
            )
