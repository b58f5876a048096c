"""Whose classes a site lets jobs build: this package's entry in NVFlare's `class_allow_list`, put in and taken out.

A site's own list replaces NVFlare's default one, so the default is written out with it.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nvflare.apis.fl_constant import WorkspaceConstants
from nvflare.app_common.default_component_policy import DEFAULT_CLASS_ALLOW_LIST
from nvflare.app_common.widgets.component_path_authorizer import ALLOW_ALL, CLASS_ALLOW_LIST

from ..errors import ConfigError
from ..files import read_object, write_text

PACKAGE = "nvflare_fm."
OWN, DEFAULT = WorkspaceConstants.RESOURCES_CONFIG, WorkspaceConstants.DEFAULT_RESOURCES_CONFIG


def with_package(resources: Mapping[str, Any]) -> dict[str, Any]:
    """The site's resources with the entry; doing it twice changes nothing."""
    listed = list(resources.get(CLASS_ALLOW_LIST, DEFAULT_CLASS_ALLOW_LIST))
    return {**resources, CLASS_ALLOW_LIST: listed if {PACKAGE, ALLOW_ALL} & {*listed} else [*listed, PACKAGE]}


def without_package(resources: Mapping[str, Any]) -> dict[str, Any]:
    """The site's resources without the entry. A site without a list of its own needs none: the default lacks it."""
    if CLASS_ALLOW_LIST not in resources:
        return dict(resources)
    return {**resources, CLASS_ALLOW_LIST: [entry for entry in resources[CLASS_ALLOW_LIST] if entry != PACKAGE]}


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
        return read_object(file) if file.exists() else {}
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{file.name} cannot be read as JSON; mend it", f"{file}: {error}", code="kit_unreadable"
        ) from None


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
    """Lets jobs use this package at the site whose `local/` folder this is; returns the file written."""
    _, resources = read(local)
    return write(local / OWN, with_package(resources))


def disallow(local: Path) -> list[Path]:
    """Takes the entry out of every file it is in, and returns those."""
    changed = []
    for file in (local / OWN, local / DEFAULT):
        if file.exists() and (resources := load(file)) != without_package(resources):
            changed.append(write(file, without_package(resources)))
    return changed
