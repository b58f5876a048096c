"""What NVFlare adds to the parent process of a site or server, by a file beside its resources: both check the files of
every job, and the server ends the jobs it was running when it was killed.
"""

import json
from pathlib import Path
from typing import Any

from nvflare.apis.fl_constant import SystemComponents

from ...errors import ConfigError
from . import allow_list

FILE = "nvflare_fm__p_resources.json"  # NVFlare reads *__p_resources.json beside a parent process's resources.json
_DEPLOYER, _VALIDATOR = SystemComponents.APP_DEPLOYER, "app_validator"
_AT_SITE = {"components": [{"id": _DEPLOYER, "path": "nvflare_fm.flare.deployment.SiteDeployer"}]}
_AT_SERVER = {
    _VALIDATOR: {"path": "nvflare_fm.flare.deployment.ServerValidator"},
    "components": [
        {"id": "nvflare_fm_recovery", "path": "nvflare_fm.flare.recovery.JobRecovery"},
        {"id": "nvflare_fm_restarted", "path": "nvflare_fm.flare.restarted.RestartedSites"},
    ],
}


def install(local: Path, is_site: bool) -> Path:
    """Puts the check into the `local/` folder of a site or of the server; returns the file written.

    Raises:
        ConfigError: it has another component in this place.
    """
    _, resources = allow_list.read(local)
    ids = [component.get("id") for component in resources.get("components", []) if isinstance(component, dict)]
    if _DEPLOYER in ids if is_site else _VALIDATOR in resources:
        raise ConfigError(
            f"resources.json has an {_DEPLOYER if is_site else _VALIDATOR} of its own, and NVFlare takes one only: "
            "nvflare_fm cannot check jobs here; remove it",
            str(local),
            code="job_check_taken",
        )
    return allow_list.write(local / FILE, _entry(is_site))


def installed(local: Path, is_site: bool) -> bool:
    """Whether the kit with this `local` folder checks job files before NVFlare parses them."""
    try:
        return bool(json.loads((local / FILE).read_text()) == _entry(is_site))
    except (OSError, ValueError):
        return False


def _entry(is_site: bool) -> dict[str, Any]:
    return _AT_SITE if is_site else _AT_SERVER
