"""The job in ten lines of Python: run it in a simulator or a real federation, or export it for `nvflare job submit`.

The exported folder holds configuration only, so no site needs to grant the right to bring code.
"""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from nvflare.apis.job_def import ALL_SITES
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.workflows.cross_site_model_eval import CrossSiteModelEval
from nvflare.app_common.workflows.global_model_eval import GlobalModelEval
from nvflare.job_config.base_fed_job import BaseFedJob
from nvflare.recipe.spec import Recipe

from ..config import Aggregation, RoundPlan, RoundSettings, SiteOverrides, VoteSettings
from ..errors import ConfigError
from ..job import synthetic
from ..job.feasible import check_plan, check_sites
from ..job.settle import CHECKED
from ..registry import nearest
from .aggregator import AdapterAggregator
from .controller import FedPEFT
from .executor import PeftExecutor
from .locator import AdapterLocator
from .persistor import AdapterPersistor
from .sealed import files_of, read_any
from .stats import RoundStats
from .votes import SyntheticVotes

TASKS = [AppConstants.TASK_TRAIN, AppConstants.TASK_VALIDATION, AppConstants.TASK_SUBMIT_MODEL]
INITIAL, LOCATOR = "initial_adapter", "locator"  # what the adapter's folder and its locator are called inside the job


class AdapterRecipe(Recipe):
    """What all jobs on adapters share: no code, one account of the rounds, an executor at every site or each its own.

    Args:
        name: see `FedPEFTRecipe`.
        min_sites: see `FedPEFTRecipe`.
        tasks: what the sites serve.
        sites: see `FedPEFTRecipe`.
        processes: see `FedPEFTRecipe`.
        launch_timeout_s: see `FedPEFTRecipe`.
        persistor: see `AdapterPersistor`.
        brings: the folder of an adapter that travels inside the job; empty: none.
        rows: the file of synthetic rows that travels inside the job; empty: none.
        components: of the server besides, in order, each with its id; a workflow has none.
    """

    def __init__(
        self,
        name: str,
        min_sites: int,
        tasks: Sequence[str],
        sites: Mapping[str, Mapping[str, Any]],
        processes: int,
        launch_timeout_s: float,
        persistor: AdapterPersistor | None,
        brings: str | Path,
        rows: str | Path,
        components: Sequence[tuple[Any, str | None]],
    ) -> None:
        check_sites(sites, min_sites)
        self._folder: TemporaryDirectory[str] | None = None
        self.tasks, self.sites = list(tasks), dict(sites)
        self.processes, self.launch_timeout_s = processes, launch_timeout_s
        job = BaseFedJob(name=name, min_clients=min_sites, key_metric="")  # FedPEFT selects the best itself
        job.set_app_packages(["nvflare_fm"])  # installed at every site: the job brings no code
        if persistor:
            job.to_server(persistor, id="persistor")
        job.to_server(RoundStats(), id="round_stats")
        for component, identity in components:
            job.to_server(component, **({"id": identity} if identity else {}))
        if brings:
            _bring(job, Path(brings))
        if rows:
            self._folder = TemporaryDirectory()  # NVFlare copies a file under its own name when it writes the job
            shutil.copyfile(rows, self._rows)
            job.add_file_to_server(str(self._rows), app_folder_type="config")
        super().__init__(job)

    def _prepare_client_apps(self) -> None:
        if not self.sites:
            self._job.to_clients(self._executor({}), tasks=self.tasks)
        for site, values in self.sites.items():
            self._job.to(self._executor(values), site, tasks=self.tasks)
        for site in (self.sites or [ALL_SITES]) if self._folder else []:
            self._job.add_file_to(str(self._rows), site, app_folder_type="config")

    @property
    def _rows(self) -> Path:
        return Path(self._folder.name if self._folder else "") / synthetic.FILE

    def _executor(self, values: Mapping[str, Any]) -> PeftExecutor:
        return PeftExecutor(self.processes, self.launch_timeout_s, dict(values))


class FedPEFTRecipe(AdapterRecipe):
    """Describe a job that fine-tunes with PEFT at several sites.

    `recipe.run(env)` runs the job in an environment: `SimEnv`, or NVFlare's `PocEnv` and `ProdEnv`.
    `recipe.export(folder)` writes it for `nvflare job submit`.

    Args:
        name: of the job.
        min_sites: sites that the job needs to start, and usable updates that it needs in every round.
        sites: site → what it does differently from the plan, see `config.SiteOverrides`. If given, only these sites
            take part.
        processes: trainer processes of each site, usually one for each of its GPUs.
        launch_timeout_s: seconds that a site waits for its trainer to start.
        keep_rounds: keep the adapter of every round.
        initial_adapter: folder of an adapter that nvflare_fm has written; it is copied into the job.
        resume: continue the round count and the learning rate schedule after the initial adapter's round.
        cross_site_evaluation: at the end, measure the adapters of the sites and of the server at every site.
        synthetic_rows: file of synthetic rows that sites may train on beside their own; it is copied into the job.
        settings: fields of `config.RoundPlan` (task, model, data, peft, training, …), `config.Aggregation` (merge,
            weigh, step, max_rank, …) and `config.RoundSettings` (num_rounds, deadline_s, grace_s, key_metric, …).

    Raises:
        ConfigError: an unknown setting, a value out of range, or a combination that cannot work.
    """

    def __init__(
        self,
        name: str,
        *,
        min_sites: int = 1,
        sites: Mapping[str, Mapping[str, Any]] | None = None,
        processes: int = 1,
        launch_timeout_s: float = 600.0,
        keep_rounds: bool = False,
        initial_adapter: str | Path = "",
        resume: bool = False,
        cross_site_evaluation: bool = False,
        synthetic_rows: str | Path = "",
        **settings: Any,
    ) -> None:
        overrides = {site: SiteOverrides.read(values, f"sites: {site}") for site, values in (sites or {}).items()}
        plan, aggregation, rounds = sorted_out(settings)
        plan = synthetic.naming(plan, synthetic.read_rows(Path(synthetic_rows))) if synthetic_rows else plan
        asked = RoundPlan.read(plan, "plan")
        check_plan(asked, overrides)
        if cross_site_evaluation and aggregation.get("client_privacy"):
            raise ConfigError(
                "client_privacy does not go with cross_site_evaluation: no noise covers the sites' own adapters; leave "
                "it out",
                code="client_alone",
            )
        controller = FedPEFT(
            min_responses=min_sites,
            plan=plan,
            aggregator=AdapterAggregator(aggregation),
            sites=held_to(overrides),
            **rounds,
        )
        components: list[tuple[Any, str | None]] = [(controller, None)]
        if cross_site_evaluation:
            components += [(AdapterLocator(), LOCATOR), (CrossSiteModelEval(model_locator_id=LOCATOR), None)]
        persistor = AdapterPersistor(keep_rounds, INITIAL if initial_adapter else "", resume)
        brought = initial_adapter, synthetic_rows
        super().__init__(
            name, min_sites, TASKS, sites or {}, processes, launch_timeout_s, persistor, *brought, components
        )


def sorted_out(settings: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Sort settings into those of the plan, of the aggregation and of the controller. The seed goes to the first two.

    Raises:
        ConfigError: a setting that none of them has.
    """
    owners = [set(group.model_fields) for group in (RoundPlan, Aggregation, RoundSettings)]
    owners[-1].discard("min_responses")  # min_sites
    known = sorted(set().union(*owners))
    if unknown := sorted(settings.keys() - set(known)):
        raise ConfigError(
            f"recipe: unknown setting {unknown[0]!r}; {nearest(unknown[0], known)}known: {known}", code="wrong_setting"
        )
    plan, aggregation, rounds = ({k: v for k, v in settings.items() if k in owner} for owner in owners)
    return plan, aggregation, rounds


class EvaluateAdapterRecipe(AdapterRecipe):
    """Describe a job that measures a finished adapter at every site. The sites train nothing.

    NVFlare writes the metrics of each site into `cross_site_val/cross_val_results.json`. Refusals are beside it, in
    `cross_val_refused.json`.

    Args:
        name: of the job.
        adapter: folder of an adapter that nvflare_fm has written; it is copied into the job.
        min_sites: sites that the job needs to start.
        sites: site → what it does differently, see `config.SiteOverrides`. If given, only these sites take part.
        processes: trainer processes of each site.
        launch_timeout_s: seconds that a site waits for its trainer to start.
        validation_timeout: seconds after which the job goes on without sites that have not answered.
        measurement: fields of `locator.Measurement` (model, data, quantization, …); unset ones are as in training.

    Raises:
        ConfigError: an unknown setting, or a value out of range.
        ModelError: the adapter cannot be read.
    """

    def __init__(
        self,
        name: str,
        adapter: str | Path,
        *,
        min_sites: int = 1,
        sites: Mapping[str, Mapping[str, Any]] | None = None,
        processes: int = 1,
        launch_timeout_s: float = 600.0,
        validation_timeout: int = 6000,
        **measurement: Any,
    ) -> None:
        for site, values in (sites or {}).items():
            SiteOverrides.read(values, f"sites: {site}")
        controller = GlobalModelEval(model_locator_id=LOCATOR, validation_timeout=validation_timeout)
        components = [(AdapterLocator(measurement=measurement), LOCATOR), (controller, None)]
        tasks, persistor = [AppConstants.TASK_VALIDATION], AdapterPersistor(initial_adapter=INITIAL)
        super().__init__(
            name, min_sites, tasks, sites or {}, processes, launch_timeout_s, persistor, adapter, "", components
        )


class SyntheticVotesRecipe(AdapterRecipe):
    """Describe a job in which the sites' rows vote on synthetic rows, and nothing is trained.

    The chosen rows are the file `synthetic.jsonl` of the job's result.

    Args:
        name: of the job.
        rows: the file of candidates, which is copied into the job.
        min_sites: sites that the job needs to start, and that must vote.
        sites: site → what it does differently, see `config.SiteOverrides`. If given, only these sites take part.
        processes: trainer processes of each site.
        launch_timeout_s: seconds that a site waits for its trainer to start.
        settings: fields of `config.RoundPlan` (task, model, data, labels, privacy, …) and `config.VoteSettings`
            (per_label, chance, …).

    Raises:
        ConfigError: an unknown setting, a value out of range, or candidates that the plan cannot use.
    """

    def __init__(
        self,
        name: str,
        rows: str | Path,
        *,
        min_sites: int = 1,
        sites: Mapping[str, Mapping[str, Any]] | None = None,
        processes: int = 1,
        launch_timeout_s: float = 600.0,
        **settings: Any,
    ) -> None:
        for site, values in (sites or {}).items():
            SiteOverrides.read(values, f"sites: {site}")
        own = {k: settings.pop(k) for k in VoteSettings.model_fields if k in settings and k != "min_responses"}
        found = synthetic.read_rows(Path(rows))
        plan = synthetic.naming(settings, found)
        synthetic.voting(RoundPlan.read(plan, "plan"), found)
        components = [(SyntheticVotes(plan=plan, min_responses=min_sites, **own), None)]
        tasks = [AppConstants.TASK_TRAIN]
        super().__init__(name, min_sites, tasks, sites or {}, processes, launch_timeout_s, None, "", rows, components)


def held_to(overrides: Mapping[str, SiteOverrides]) -> dict[str, dict[str, Any]]:
    """Pick what the server must know of the sites' own settings to check their updates."""
    told = {site: said.model_dump(include={*CHECKED}, exclude_none=True) for site, said in sorted(overrides.items())}
    return {site: said for site, said in told.items() if said}


def _bring(job: BaseFedJob, folder: Path) -> None:
    read_any(folder)  # a folder that cannot be read is found out here, not at the server
    for file in files_of(folder):
        job.add_file_to_server(str(folder / file), dest_dir=INITIAL, app_folder_type="config")
