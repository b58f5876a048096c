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
    try:
        resources = json.loads(file.read_text()) if file.exists() else {"format_version": 2}
    except ValueError as error:
        raise ConfigError(f"{file.name} is not JSON; mend it", f"{file}: {error}") from None
    return file, resources


def write(file: Path, resources: Mapping[str, Any]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(resources, indent=2) + "\n")
    return file


def allow(local: Path) -> Path:
    """Lets jobs use this package at the site whose `local/` folder this is; returns the file written."""
    _, resources = read(local)
    return write(local / OWN, with_package(resources))


def disallow(local: Path) -> list[Path]:
    """Takes the entry out of every file it is in, and returns those."""
    changed = []
    for file in (local / OWN, local / DEFAULT):
        if file.exists() and (resources := json.loads(file.read_text())) != without_package(resources):
            changed.append(write(file, without_package(resources)))
    return changed
