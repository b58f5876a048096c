"""Where a recipe runs: the simulator is told what each site offers, a real site says so in its own `local/` folder."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from nvflare.apis.fl_constant import WorkspaceConstants
from nvflare.app_common.default_component_policy import DEFAULT_CLASS_ALLOW_LIST
from nvflare.app_common.widgets.component_path_authorizer import CLASS_ALLOW_LIST
from nvflare.job_config.api import FedJob
from nvflare.recipe import sim_env

from ..site.policy import FILE_NAME, SiteConfig

PACKAGE = "nvflare_fm."


class SimEnv(sim_env.SimEnv):
    """NVFlare's simulator with sites that are set up for this package.

    Args:
        sites: name → what its `fm_site.yaml` says; relative paths are taken from the current folder. Sites that set no
            `limits.threads` share the machine's cores evenly.
        workspace_root: results are written to `<workspace_root>/<job name>/`.
        gpu_config, log_config: as in NVFlare.
    """

    def __init__(
        self,
        sites: Mapping[str, SiteConfig | Mapping[str, Any]],
        workspace_root: str | Path = sim_env.WORKSPACE_ROOT,
        gpu_config: str | None = None,
        log_config: str | None = None,
    ) -> None:
        super().__init__(
            clients=list(sites), workspace_root=str(workspace_root), gpu_config=gpu_config, log_config=log_config
        )
        self.sites = {n: s if isinstance(s, SiteConfig) else SiteConfig.read(s, n) for n, s in sites.items()}

    def deploy(self, job: FedJob) -> str:
        local = Path(self.workspace_root) / job.name / WorkspaceConstants.SITE_FOLDER_NAME
        allow(local)
        for stale in local.glob(f"*.{FILE_NAME}"):
            stale.unlink()
        share = max(1, len(os.sched_getaffinity(0)) // len(self.sites))
        for name, site in self.sites.items():
            write_site(local / f"{name}.{FILE_NAME}", site, threads=share)
        return str(super().deploy(job))


def allow(local: Path, package: str = PACKAGE) -> Path:
    """Lets jobs use the classes of `package` at the site whose `local/` folder this is; returns the file written.

    A site's own list replaces NVFlare's default one, so the default is written out with it. Doing it twice is harmless.
    """
    file, default = local / WorkspaceConstants.RESOURCES_CONFIG, local / WorkspaceConstants.DEFAULT_RESOURCES_CONFIG
    source = file if file.exists() else default
    resources = json.loads(source.read_text()) if source.exists() else {"format_version": 2}
    allowed = resources.get(CLASS_ALLOW_LIST) or list(DEFAULT_CLASS_ALLOW_LIST)
    resources[CLASS_ALLOW_LIST] = allowed if package in allowed else [*allowed, package]
    local.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(resources, indent=2) + "\n")
    return file


def write_site(file: Path, site: SiteConfig, threads: int = 0) -> None:
    """Writes a site file with absolute paths; `threads` is for a site that sets none."""
    values = site.model_dump(mode="json")
    for source in values["models"].values():
        _resolve(source, "path")
    for source in values["data"].values():
        _resolve(source, *(("folder",) if source["folder"] else ("train", "validation")))
    values["limits"]["threads"] = values["limits"]["threads"] or threads
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(values, sort_keys=False))


def _resolve(source: dict[str, Any], *keys: str) -> None:
    source |= {key: str(Path(source[key]).resolve()) for key in keys if source[key]}
