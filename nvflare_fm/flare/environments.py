"""Where a recipe runs: `SimEnv` writes what each simulated site offers; a real site has its own `fm_site.yaml`."""

import os
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from nvflare.apis.fl_constant import WorkspaceConstants
from nvflare.job_config.api import FedJob
from nvflare.recipe import sim_env

from ..errors import FmError
from ..record.round import in_words
from ..site.offer.site_config import ANYONE, FILE_NAME, SiteConfig
from .kit import allow_list
from .simulation import Simulation


class SimEnv(sim_env.SimEnv):
    """Run a recipe in NVFlare's simulator, at sites that are set up for this package.

    Sites that set no `limits.threads` share the machine's cores evenly. Nobody submits a job in the simulator, so sites
    that list no submitter accept anyone.

    Args:
        sites: name of the site → the settings of its `fm_site.yaml`; relative paths start at the current folder.
        workspace_root: folder of the results, which go into `<workspace_root>/<job name>/`.
        gpu_config: as in NVFlare.
        log_config: as in NVFlare.
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
        """Run the job and print a line for each round. NVFlare's output goes into `<workspace_root>/<job name>.log`.

        Args:
            job: what a recipe has made; `recipe.run` calls this.

        Returns:
            The name of the job.
        Raises:
            RuntimeError: the job failed; the message says why.
        """
        workspace = Path(self.workspace_root) / job.name
        set_up(workspace, self.sites)
        with TemporaryDirectory() as exported:
            job.export_job(exported)
            run = Simulation(Path(exported) / job.name, workspace, list(self.sites), self.gpu_config, self.log_config)
            try:
                for line in run.run():
                    print(*in_words(line), sep="\n")
            except FmError as error:
                self.last_run_failed = True
                raise RuntimeError(str(error)) from None
        self.last_run_failed = False
        print(f"results: {run.results}\nlog: {run.log}")
        return str(job.name)


def set_up(workspace: Path, sites: Mapping[str, SiteConfig]) -> None:
    """Write what each simulated site offers, and that jobs may use this package there. Sites that set no
    `limits.threads` share the machine's cores evenly.
    """
    local = workspace / WorkspaceConstants.SITE_FOLDER_NAME
    allow_list.allow(local)
    for stale in local.glob(f"*.{FILE_NAME}"):
        stale.unlink()
    share = max(1, len(os.sched_getaffinity(0)) // len(sites))
    for name, site in sites.items():
        write_site(local / f"{name}.{FILE_NAME}", site, threads=share)


def write_site(file: Path, site: SiteConfig, threads: int = 0) -> None:
    """Writes the file of a simulated site, with absolute paths; `threads` is for one that sets none."""
    values = site.model_dump(mode="json", exclude_none=True)
    if not {"submitters", "orgs"} & {*values["welcome"]}:
        values["welcome"]["submitters"] = [ANYONE]
    for source in values["models"].values():
        _resolve(source, "path")
    for source in values["data"].values():
        _resolve(source, *(("folder",) if source["folder"] else ("train", "validation")))
    values["limits"]["threads"] = values["limits"]["threads"] or threads
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(values, sort_keys=False))


def _resolve(source: dict[str, Any], *keys: str) -> None:
    source |= {key: str(Path(source[key]).resolve()) for key in keys if source[key]}
