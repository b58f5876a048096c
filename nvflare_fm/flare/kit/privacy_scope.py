"""A site's `local/privacy.json`: our filter ends every privacy scope, and one scope is the default, so that no job can
go around it. And which jobs a site with a floor lets its processes build at all.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ...errors import ConfigError, FmError, PolicyError
from ...site.offer.site_config import FILE_NAME, load_site
from .. import components
from . import allow_list

FILE, SCOPE = "privacy.json", "nvflare_fm"
FILTER, GUARD = "nvflare_fm.flare.egress.EgressFilter", "nvflare_fm.flare.egress.EgressGuard"
_GUARD_ID = "nvflare_fm_egress_guard"
_FILTERS = "task_result_filters"
_BUILT_FROM = ("path", "class_path", "name")


def install(local: Path) -> Path:
    """Put our filter into every scope of the kit with this `local` folder; returns the file written.

    Raises:
        ConfigError: the site's own file has scopes and no default one, so that a job without a scope would go around
            the filter.
    """
    return allow_list.write(local / FILE, with_ours(_load(local)))


def remove(local: Path) -> Path | None:
    """Take our filter out again; returns the file changed or removed, if there is one."""
    file, said = local / FILE, _load(local)
    if (left := without_ours(said)) == said:
        return None
    if left.get("scopes") or left.get("components"):
        return allow_list.write(file, left)
    file.unlink()
    return file


def with_ours(said: Mapping[str, Any]) -> dict[str, Any]:
    """The content of `privacy.json` with our filter last in each scope; doing it twice changes nothing.

    Raises:
        ConfigError: there are scopes and none is the default.
    """
    scopes = [_without_filter(scope) for scope in said.get("scopes", [])] or [_own_scope()]
    default = said.get("default_scope") or (SCOPE if scopes == [_own_scope()] else None)
    if default not in [scope.get("name") for scope in scopes]:
        raise ConfigError(
            f"{FILE} of this kit has privacy scopes and no default_scope, so a job that names no scope would pass no "
            "filter; set default_scope to the name of one of them",
            code="no_default_scope",
        )
    filtered = [{**scope, _FILTERS: [*scope.get(_FILTERS, []), {"path": FILTER, "args": {}}]} for scope in scopes]
    guard = {"id": _GUARD_ID, "path": GUARD, "args": {}}
    return {**said, "scopes": filtered, "default_scope": default, "components": [*_others(said), guard]}


def without_ours(said: Mapping[str, Any]) -> dict[str, Any]:
    """The content of `privacy.json` without what `with_ours` puts in."""
    scopes = [_without_filter(scope) for scope in said.get("scopes", [])]
    left = {**said, "scopes": [scope for scope in scopes if scope != _own_scope()], "components": _others(said)}
    if left.get("default_scope") not in [scope.get("name") for scope in left["scopes"]]:
        left.pop("default_scope", None)
    return {key: value for key, value in left.items() if value or key not in ("scopes", "components")}


def fault(local: Path, scope: str = "") -> str:
    """Why a job of this privacy scope would go around our filter; empty where it cannot.

    Args:
        scope: as the job names it; empty: it names none.
    """
    try:
        said = _load(local)
    except FmError as error:
        return error.message
    scopes = {each.get("name"): each for each in said.get("scopes", [])}
    name = scope or said.get("default_scope")
    if name not in scopes:
        return f"{FILE} has no scope of this name" if scope else f"{FILE} has no default_scope"
    filters = scopes[name].get(_FILTERS) or [{}]
    is_last = filters[-1] in ({"path": FILTER, "args": {}}, {"path": FILTER})
    guards = any(each.get("path") == GUARD for each in said.get("components", []))
    return "" if is_last and guards else f"{FILE} does not end every scope with {FILTER}, or lacks {GUARD}"


def faults(local: Path) -> list[str]:
    """Why some job would go around our filter; best nothing."""
    try:
        names = [str(each.get("name")) for each in _load(local).get("scopes", [])]
    except FmError as error:
        return [error.message]
    return list(dict.fromkeys(said for name in ("", *names) if (said := fault(local, name))))


def has_floor(local: Path) -> bool:
    """Whether the site file states a floor; also where it cannot be read, and not where there is none."""
    try:
        return (local / FILE_NAME).exists() and load_site(local / FILE_NAME).privacy.floor is not None
    except FmError:
        return True


def check_job(local: Path, scope: str, brings_code: bool, client: Mapping[str, Any]) -> None:
    """Refuse to deploy a job that could go around the filter, where the site file states a floor.

    Args:
        scope: of the job; empty: it names none.
        brings_code: whether it brings any.
        client: the configuration of its client.

    Raises:
        PolicyError: names what the job must leave out, or the site's admin mend.
    """
    if not has_floor(local):
        return
    if said := fault(local, scope):
        raise PolicyError(
            f"this site has a privacy floor and its egress filter is not in force: {said}", code="no_egress"
        )
    if brings_code:
        raise PolicyError(
            "this site has a privacy floor and runs no code of a job; leave custom/ out", code="brings_code"
        )
    if others := {*_built(client)} - {*components.SITE, *components.NVFLARE_SITE}:
        raise PolicyError(
            f"this site has a privacy floor, and a job may build only {', '.join(components.SITE)} here; leave the "
            f"{len(others)} others out",
            code="other_components",
        )


def _load(local: Path) -> dict[str, Any]:
    said = allow_list.load(local / FILE)
    scopes = said.get("scopes", [])
    lists = [scopes, said.get("components", []), *(s.get(_FILTERS, []) for s in scopes if isinstance(s, dict))]
    names = [said.get("default_scope") or "", *(s.get("name") for s in scopes if isinstance(s, dict))]
    parts = [each for listed in lists if isinstance(listed, list) for each in listed]
    if not (
        all(isinstance(listed, list) for listed in lists)
        and all(isinstance(part, dict) for part in parts)
        and all(isinstance(name, str) for name in names)
    ):
        raise ConfigError(f"{FILE} is not as NVFlare reads it; mend it", str(local), code="kit_unreadable")
    return said


def _own_scope() -> dict[str, Any]:
    return {"name": SCOPE, "properties": {}, "task_data_filters": [], _FILTERS: []}


def _without_filter(scope: Mapping[str, Any]) -> dict[str, Any]:
    left = [each for each in scope.get(_FILTERS, []) if each.get("path") != FILTER]
    return {**scope, _FILTERS: left} if _FILTERS in scope else dict(scope)


def _others(said: Mapping[str, Any]) -> list[Any]:
    return [each for each in said.get("components", []) if each.get("path") != GUARD]


def _built(value: Any) -> Iterator[str]:
    """Whatever NVFlare would build of a configuration, at any depth."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if key in _BUILT_FROM and isinstance(inner, str):
                yield inner
            yield from _built(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _built(inner)
