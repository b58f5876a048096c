"""A job folder read back: what it asks of which site. Whatever a server or site would refuse about it is refused here.

Nothing but this package's own components is built.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isclose
from pathlib import Path
from typing import Any, TypeVar

from ...adapter import Adapter, Manifest
from ...aggregation.admit import Terms
from ...aggregation.needed import needed as guarded_by
from ...config import RoundPlan, SiteOverrides, TaskPlan
from ...errors import ConfigError
from ...job import job_files, synthetic
from ...job.feasible import check_fewest, check_plan, check_sites
from ...job.peft import read
from ...job.settle import CHECKED, SettledPlan
from ...privacy import clients
from ...synthesis.candidates import CandidateSet
from .. import components
from ..controller import FedPEFT
from ..deployment import check_folder, first_bytes
from ..executor import PeftExecutor
from ..locator import AdapterLocator
from ..persistor import AdapterPersistor
from ..sealed import read_any
from ..votes import SyntheticVotes

T = TypeVar("T")
ALL = "@ALL"  # NVFlare's word in a deploy_map


@dataclass(frozen=True)
class Job:
    """What a job folder says."""

    name: str
    plan: TaskPlan  # as its first task sends it
    settled: SettledPlan | None  # none: it only measures, or votes
    rounds: range  # that it trains, from those of the adapter on where it resumes; empty: it trains none
    sites: Mapping[str, PeftExecutor]  # what runs where; `ALL` stands for every site
    adapter: Adapter | None  # that it starts from
    min_sites: int  # without so many it does not start, or its first round stops it


def read_job(folder: Path) -> Job:
    """Read a job's folder, and check it as its server and sites would.

    Raises:
        ConfigError: it is no job, or one of its settings cannot work.
        ModelError: the adapter it is to start from cannot be read.
    """
    meta = _meta(folder)
    apps = _apps(folder, meta)
    name = str(meta.get("name", folder.name))
    server, home = _server(folder, list(apps))
    sites, needed = _sites(folder, apps), _min_sites(meta)
    check_sites(set(sites) - {ALL}, needed, _mandatory(meta))
    if votes := next((part for part in server if isinstance(part, SyntheticVotes)), None):
        needed = max(needed, votes.min_responses)
        check_sites(set(sites) - {ALL}, needed)
        plan = synthetic.voting(votes.asked, _synthetic_rows(folder, apps, votes.asked))
        return Job(name, plan, None, range(0), sites, None, needed)
    persistor = _only(AdapterPersistor, server)
    saved = read_any(home / persistor.initial_adapter) if persistor.initial_adapter else None
    adapter, trained_by = (saved.adapter, saved.plan) if saved else (None, None)
    measured = next((p.asks for p in server if isinstance(p, AdapterLocator) and p.asks), None)
    if measured:
        return Job(name, measured.applied(trained_by), None, range(0), sites, adapter, needed)
    controller = _only(FedPEFT, server)
    needed = max(needed, controller.min_responses)
    check_sites(set(sites) - {ALL}, needed)
    check_fewest(len(set(sites) - {ALL}), guarded_by(controller.settled.aggregation).fewest)
    settled, last = controller.settled, controller.num_rounds
    if settled.plan.synthetic.asked:
        synthetic.check_labels(settled.plan, _synthetic_rows(folder, apps, settled.plan))
    check_plan(settled.plan, {site: executor.overrides for site, executor in sites.items()})
    for site, executor in sites.items():
        for each in (ALL, *settled.sites) if site == ALL else (site,):
            _check_admitted(each, executor.overrides, settled.terms(each), settled.plan)
    if saved:
        _check_fits(settled.plan, saved.manifest)
    if (private := settled.aggregation.client_privacy).asked:
        clients.checked(private, last, adapter)
    made_by = saved.round if saved and persistor.resume else None
    first = 0 if made_by is None else made_by + 1
    if first >= last:
        raise ConfigError(
            f"the adapter is of round {made_by} and num_rounds is {last}: raise num_rounds", code="no_round_left"
        )
    return Job(name, settled.plan, settled, range(first, last), sites, adapter, needed)


def _synthetic_rows(folder: Path, apps: Mapping[str, list[str]], plan: RoundPlan) -> CandidateSet:
    """The synthetic rows that the job brings: the same in each app, for NVFlare takes each to others."""
    found = [synthetic.read_brought(folder / app / "config", plan.synthetic.digest) for app in apps]
    return found[0]


def _min_sites(meta: Mapping[str, Any]) -> int:
    said = meta.get("min_clients", 1)
    if not (isinstance(said, int) and said >= 1):
        raise ConfigError("meta: min_clients must be a whole number of at least 1", repr(said), code="min_clients")
    return said


def _mandatory(meta: Mapping[str, Any]) -> list[str]:
    said = meta.get("mandatory_clients") or []
    if not (isinstance(said, list) and all(isinstance(site, str) for site in said)):
        raise ConfigError("meta: mandatory_clients must be a list of sites' names", code="mandatory_clients")
    return said


def _apps(folder: Path, meta: Mapping[str, Any]) -> dict[str, list[str]]:
    """The job's apps, each with the names of those it is for; their files are what a site and the server let in."""
    deployed = meta.get("deploy_map") or {}
    wrong = ConfigError('deploy_map must say which app runs where: app = ["site", …]', code="wrong_deploy_map")
    if not isinstance(deployed, dict):
        raise wrong
    for app, targets in deployed.items():
        named = isinstance(targets, list) and all(isinstance(target, str) for target in targets)
        if not (named and re.fullmatch(r"\w[\w.-]*", app)):
            raise wrong
        check_folder(folder / app)
    return deployed


def _server(folder: Path, apps: Sequence[str]) -> tuple[list[Any], Path]:
    """The server's components of ours, and the folder its configuration lies in."""
    file, config = _server_config(folder, apps)
    parts = [*_entries(config, "workflows"), *_entries(config, "components")]
    return [_built(part) for part in parts if part.get("path") in components.SERVER], file.parent


def server_config(folder: Path) -> tuple[Path, dict[str, Any]]:
    """Read the configuration of a job's server.

    Returns:
        Its file, and what it says.
    Raises:
        ConfigError: the folder is no job.
    """
    return _server_config(folder, list(_apps(folder, _meta(folder))))


def _server_config(folder: Path, apps: Sequence[str]) -> tuple[Path, dict[str, Any]]:
    for app in apps:
        if found := _file(folder / app / "config", job_files.SERVER):
            return found
    raise ConfigError(
        "the job has no app with a config_fed_server.conf or .json among those of its deploy_map", code="no_server_app"
    )


def _sites(folder: Path, apps: Mapping[str, list[str]]) -> dict[str, PeftExecutor]:
    found: dict[str, PeftExecutor] = {}
    for app, targets in apps.items():
        if found_here := _file(folder / app / "config", job_files.CLIENT):
            executors = [entry.get("executor") for entry in _entries(found_here[1], "executors")]
            ours = [each for each in executors if isinstance(each, dict) and each.get("path") in components.SITE]
            if len(ours) > 1:
                raise ConfigError(f"app {app} has {len(ours)} PeftExecutors; keep one", code="two_executors")
            if ours:
                found |= dict.fromkeys((site for site in targets if site != "server"), _built(ours[0]))
    if not found:
        raise ConfigError("no site of the job runs a PeftExecutor; is it a job of nvflare_fm?", code="no_executor")
    return found


def _meta(folder: Path) -> dict[str, Any]:
    if (found := _file(folder, "meta")) is None:
        raise ConfigError("no meta.conf or .json; is this the folder of a job?", str(folder), code="no_job")
    return found[1]


def _file(folder: Path, stem: str) -> tuple[Path, dict[str, Any]] | None:
    """The folder's file of this name, in the one format it is there in, and what it says."""
    there = [file for file in (folder / f"{stem}{ending}" for ending in job_files.FORMATS) if file.exists()]
    if len(there) > 1:
        raise ConfigError(f"the job has {stem} in two formats; keep one", str(folder), code="ambiguous_file")
    return (there[0], job_files.parse_config(there[0].name, first_bytes(there[0]))) if there else None


def _entries(config: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    entries = config.get(name) or []
    if not (isinstance(entries, list) and all(isinstance(entry, dict) for entry in entries)):
        raise ConfigError(f"{name} must be a list of components", code="wrong_component")
    return entries


def _built(part: Mapping[str, Any]) -> Any:
    """One of our components, with those in its arguments."""
    name, args = part.get("path"), part.get("args") or {}
    if name not in components.OURS or not isinstance(args, dict):
        raise ConfigError("a component of nvflare_fm holds one that no job may build", code="wrong_component")
    inner = {key: _built(value) for key, value in args.items() if isinstance(value, dict) and "path" in value}
    kind = components.load(name)
    try:
        return kind(**{**args, **inner})
    except TypeError as error:
        raise ConfigError(f"{kind.__name__}: {error}", code="wrong_component") from None


def _only(kind: type[T], parts: Sequence[Any]) -> T:
    found = [part for part in parts if isinstance(part, kind)]
    if len(found) != 1:
        raise ConfigError(
            f"the job's server needs one {kind.__name__} and has {len(found)}; is it a job of nvflare_fm?",
            code="not_one_component",
        )
    return found[0]


def _check_admitted(site: str, overrides: SiteOverrides, asked: Terms, plan: TaskPlan) -> None:
    """Whether the server will take what the job has `site` send.

    Raises:
        ConfigError: names the site, and what the controller must be told of it.
    """
    mine = overrides.applied(plan)
    rank, steps = mine.rank, mine.training.local_steps
    refused = {
        "rank": asked.ranks and rank not in asked.ranks,
        "lora_alpha": asked.ranks and not isclose(read(mine.peft).scale, asked.scale(rank), rel_tol=1e-6),
        "local_steps": asked.steps is not None and steps not in asked.steps,
    }
    if any(refused.values()):
        given = overrides.model_dump(include={*CHECKED}, exclude_none=True)
        raise ConfigError(
            f"{site} is to train at {', '.join(name for name, found in refused.items() if found)} of its own, and the "
            f"server would refuse its updates: give FedPEFT the same, sites = {{ {site} = {given} }}",
            code="site_not_listed",
        )


def _check_fits(plan: TaskPlan, manifest: Manifest) -> None:
    asked = (plan.task, plan.labels, plan.peft["method"])
    had = (manifest.task, manifest.labels, manifest.peft)
    for name, ours, theirs in zip(("task", "labels", "peft.method"), asked, had, strict=True):
        if ours != theirs:
            raise ConfigError(
                f"the adapter was trained with {name} {theirs!r} and the job asks {ours!r}; take its own",
                code="other_adapter",
            )
