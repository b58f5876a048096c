"""Any job folder on one machine: the sites are those for which a file is named, and all hold the same base model."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import get_args

from ...config import CANDIDATES, Count, Statistic
from ...errors import ConfigError
from ...registry import nearest
from ...site.offer.site_config import DataSource, ModelSource, Privacy, SiteConfig, Synthetic
from ..environments import set_up
from ..simulation import Simulation
from .job import ALL, Job, read_job

OWN_ROWS = Privacy(
    min_examples=1,
    min_update_rows=1,
    min_metric_rows=1,
    counts=get_args(Count),
    label_statistics=get_args(Statistic),
    delta=0.01,
)  # they are all the user's, on the user's machine: nothing has to be kept from anyone
OWN_SYNTHETIC = Synthetic(votes=True, accepts=True, max_share=0.9, max_rows=CANDIDATES)


def prepare_simulation(
    folder: Path, model: Path, data: Mapping[str, Path], validation: Mapping[str, Path], workspace: Path
) -> tuple[Job, Simulation]:
    """Write what each site offers, ready to run the job.

    Args:
        folder: of the job.
        model: folder of the base model, whatever alias the job has for it.
        data: site → file or folder with its rows, whatever alias the job has for them.
        validation: site → the same for validation; for other sites a tenth of the rows is held out.
        workspace: where each site gets a folder; made anew.
    Returns:
        What the job asks, and the run.
    Raises:
        FmError: the job cannot work, its sites are others, a file is missing, or the workspace is something else.
    """
    job = read_job(folder)
    _check_sites(job, data, validation)
    for path in (model, *data.values(), *validation.values()):
        if not path.exists():
            raise ConfigError(f"there is no {path}", code="no_such_file")
    if workspace.exists() and not ((workspace / "local").is_dir() and (workspace / "server").is_dir()):
        raise ConfigError(
            f"{workspace} exists and was not made by a simulation; choose another place with -o",
            code="not_a_simulation",
        )
    offers = {site: _offer(job, site, model, data[site], validation.get(site)) for site in data}
    set_up(workspace, offers)
    return job, Simulation(folder, workspace, list(data))


def _check_sites(job: Job, data: Mapping[str, Path], validation: Mapping[str, Path]) -> None:
    named = set(job.sites) - {ALL}
    for site in (*data, *validation):
        if not re.fullmatch(r"[A-Za-z0-9][\w-]*", site, re.ASCII) or site == "server":
            raise ConfigError(
                f"{site!r} cannot be a site; sites are named in letters, digits, _ and -", code="site_name"
            )
        if ALL not in job.sites and site not in named:
            hint = nearest(site, sorted(named))
            raise ConfigError(f"the job has no site {site!r}; {hint}it has {sorted(named)}", code="unknown_site")
    if missing := sorted((named | set(validation)) - set(data)):
        raise ConfigError(f"no file is named for site {missing[0]!r}: add --data {missing[0]}=FILE", code="no_data")
    if not data:
        raise ConfigError("name each site with its file: --data north=a.jsonl --data south=b.jsonl", code="no_data")
    if job.min_sites > len(data):
        raise ConfigError(f"the job needs {job.min_sites} sites and --data names {len(data)}", code="too_few_sites")


def _offer(job: Job, site: str, model: Path, train: Path, validation: Path | None) -> SiteConfig:
    plan = job.sites[site if site in job.sites else ALL].overrides.applied(job.plan)
    rows = DataSource(train=str(train.resolve()), validation=str(validation.resolve()) if validation else "")
    models = {plan.model: ModelSource(path=str(model.resolve()))}
    return SiteConfig(models=models, data={plan.data: rows}, privacy=OWN_ROWS, synthetic=OWN_SYNTHETIC)
