"""Whose classes a site or server lets jobs build: this package's entries in NVFlare's `class_allow_list`, one by one.

A site's own list replaces NVFlare's default one, so the default is written out with it. An entry may also be a prefix,
and NVFlare then builds whatever can be reached under it, functions that a module imports included: none of ours is one.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nvflare.apis.fl_constant import WorkspaceConstants
from nvflare.app_common.default_component_policy import DEFAULT_CLASS_ALLOW_LIST
from nvflare.app_common.widgets.component_path_authorizer import (
    ALLOW_ALL,
    CLASS_ALLOW_LIST,
    CLASS_LIST_ENFORCEMENT_MODE,
    ClassListEnforcementMode,
)

from ...errors import ConfigError
from ...files import read_object, write_text
from .. import components

OWN, DEFAULT = WorkspaceConstants.RESOURCES_CONFIG, WorkspaceConstants.DEFAULT_RESOURCES_CONFIG
_NVFLARE, _PACKAGE = "nvflare.", "nvflare_fm"


def with_ours(
    resources: Mapping[str, Any], ours: Sequence[str], nvflares: Sequence[str] | None = None
) -> dict[str, Any]:
    """The resources of a site or server with our components listed; doing it twice changes nothing.

    Args:
        ours: what it lets jobs build of this package, and nothing else of it.
        nvflares: what it lets jobs build of NVFlare; None: what it lets them build already. What else it lists stays.
    """
    listed = [entry for entry in _listed(resources) if not _is_ours(entry)]
    if nvflares is not None:
        listed = [*nvflares, *(entry for entry in listed if not entry.startswith(_NVFLARE) and entry != ALLOW_ALL)]
    return {**resources, CLASS_ALLOW_LIST: [*listed, *ours]}


def without_ours(resources: Mapping[str, Any]) -> dict[str, Any]:
    """The resources without our components, and with NVFlare's default list where `with_ours` had cut it.

    A site without a list of its own needs none: the default lacks our components.
    """
    if CLASS_ALLOW_LIST not in resources:
        return dict(resources)
    listed = [entry for entry in _listed(resources) if not _is_ours(entry)]
    theirs = {entry for entry in listed if entry.startswith(_NVFLARE)}
    if theirs and theirs <= {*components.NVFLARE_SERVER, *components.NVFLARE_STREAMING_SITE}:
        listed = [*DEFAULT_CLASS_ALLOW_LIST, *(entry for entry in listed if entry not in theirs)]
    return {**resources, CLASS_ALLOW_LIST: listed}


def faults(resources: Mapping[str, Any], ours: Sequence[str]) -> list[str]:
    """What lets jobs build more of this package than `ours`, or keeps them from building these; best nothing."""
    listed = _listed(resources)
    mode = resources.get(CLASS_LIST_ENFORCEMENT_MODE, ClassListEnforcementMode.ENFORCE.value)
    found = [f"{entry!r} is no component of this version" for entry in listed if _is_ours(entry) and entry not in ours]
    found += [f"{entry!r} is missing" for entry in ours if entry not in listed]
    found += [f"{CLASS_ALLOW_LIST} has {ALLOW_ALL!r}, so a job may build anything"] * (ALLOW_ALL in listed)
    return found + [f"{CLASS_LIST_ENFORCEMENT_MODE} is {mode!r}, so the list binds nobody"] * (mode != "enforce")


def others(resources: Mapping[str, Any], needed: Sequence[str]) -> list[str]:
    """What a job may build besides our components and those of NVFlare that ours need."""
    return [entry for entry in _listed(resources) if not _is_ours(entry) and entry not in needed]


def _listed(resources: Mapping[str, Any]) -> list[str]:
    return list(resources.get(CLASS_ALLOW_LIST, DEFAULT_CLASS_ALLOW_LIST))


def _is_ours(entry: str) -> bool:
    return entry.split(".")[0] == _PACKAGE


def read(local: Path) -> tuple[Path, dict[str, Any]]:
    """The file NVFlare takes a site's resources from, and what it says: the site's own, or the one the kit came with.

    Raises:
        ConfigError: it cannot be read.
    """
    file = local / (OWN if (local / OWN).exists() else DEFAULT)
    return file, load(file) or {"format_version": 2}


def load(file: Path) -> dict[str, Any]:
    """Read one file of a kit; nothing where there is none.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        resources = read_object(file) if file.exists() else {}
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{file.name} cannot be read as JSON; mend it", f"{file}: {error}", code="kit_unreadable"
        ) from None
    listed = resources.get(CLASS_ALLOW_LIST, [])
    if not (isinstance(listed, list) and all(isinstance(entry, str) for entry in listed)):
        raise ConfigError(f"{CLASS_ALLOW_LIST} in {file.name} is no list of texts", str(file), code="kit_unreadable")
    return resources


def write(file: Path, resources: Mapping[str, Any]) -> Path:
    """Write one file of a kit, as a whole.

    Raises:
        ConfigError: the kit may not be written to, or the disk is full; the old file is still there.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        return write_text(file, json.dumps(resources, indent=2) + "\n")
    except OSError as error:
        raise ConfigError(
            f"{file.name} cannot be written: {error.strerror}", f"{file}: {error}", code="kit_not_writable"
        ) from None


def allow(local: Path) -> Path:
    """Lets jobs use all of our components in a simulation, whose participants share this `local/` folder; returns the
    file written.
    """
    _, resources = read(local)
    return write(local / OWN, with_ours(resources, components.OURS))


def disallow(local: Path) -> list[Path]:
    """Takes our components out of every file they are in, and returns those."""
    changed = []
    for file in (local / OWN, local / DEFAULT):
        if file.exists() and (resources := load(file)) != without_ours(resources):
            changed.append(write(file, without_ours(resources)))
    return changed
