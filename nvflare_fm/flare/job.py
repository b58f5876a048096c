"""A job folder read back: what it asks of which site. Whatever a server or site would refuse about it is refused here.

Nothing but this package's own components is built.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from nvflare.fuel.utils.config_factory import ConfigFactory

from .. import export
from ..adapter import Adapter, Manifest
from ..combination import settle
from ..config import Aggregation, RoundPlan
from ..errors import ConfigError
from .aggregator import AdapterAggregator
from .controller import FedPEFT
from .executor import PeftExecutor
from .locator import AdapterLocator
from .persistor import AdapterPersistor
from .stats import RoundStats

T = TypeVar("T")
ALL = "@ALL"  # NVFlare's word in a deploy_map
_OURS = (FedPEFT, AdapterAggregator, AdapterPersistor, AdapterLocator, RoundStats, PeftExecutor)
_KINDS: dict[str, type] = {f"{kind.__module__}.{kind.__name__}": kind for kind in _OURS}


@dataclass(frozen=True)
class Job:
    """What a job folder says."""

    name: str
    plan: RoundPlan  # settled
    how: Aggregation
    rounds: range  # that it trains, counted on from those of the adapter where it resumes; empty: it only measures
    sites: Mapping[str, PeftExecutor]  # what runs where; `ALL` stands for every site
    adapter: Adapter | None  # that it starts from
    min_sites: int  # without so many it does not start, or its first round stops it


def read_job(folder: Path) -> Job:
    """
    Raises:
        ConfigError: it is no job, or one of its settings cannot work.
        ModelError: the adapter it is to start from cannot be read.
    """
    meta = _config(folder, "meta")
    name, apps = str(meta.get("name", folder.name)), meta.get("deploy_map") or {}
    server, home = _server(folder, list(apps))
    persistor, sites = _only(AdapterPersistor, server), _sites(folder, apps)
    saved = export.read_adapter(home / persistor.initial_adapter) if persistor.initial_adapter else None
    adapter, manifest, made = saved or (None, None, export.Provenance())
    measured = next((p.asked for p in server if isinstance(p, AdapterLocator) and p.asked), None)
    if measured:
        return Job(name, measured.applied(made.plan), Aggregation(), range(0), sites, adapter, _min_sites(meta))
    controller = _only(FedPEFT, server)
    how, last = controller.aggregator.how, controller.total_rounds
    plan = settle(controller.round_plan, how, {site: executor.overrides for site, executor in sites.items()})
    if manifest:
        _check_fits(plan, manifest)
    first = made.round + 1 if persistor.resume and made.round is not None else 0
    if first >= last:
        raise ConfigError(f"the adapter is of round {made.round} and num_rounds is {last}: raise num_rounds")
    return Job(name, plan, how, range(first, last), sites, adapter, max(_min_sites(meta), controller.min_responses))


def _min_sites(meta: Mapping[str, Any]) -> int:
    said = meta.get("min_clients", 1)
    if not (isinstance(said, int) and said >= 1):
        raise ConfigError(f"meta: min_clients must be a whole number of at least 1, got {said!r}", code="min_clients")
    return said


def _server(folder: Path, apps: Sequence[str]) -> tuple[list[Any], Path]:
    """The server's components of ours, and the folder its configuration lies in."""
    for app in apps:
        home = folder / app / "config"
        if any(home.glob("config_fed_server.*")):
            config = _config(home, "config_fed_server")
            parts = [*config.get("workflows", []), *config.get("components", [])]
            return [_built(part) for part in parts if part.get("path") in _KINDS], home
    raise ConfigError("the job has no app with a config_fed_server.conf or .json among those of its deploy_map")


def _sites(folder: Path, apps: Mapping[str, list[str]]) -> dict[str, PeftExecutor]:
    found: dict[str, PeftExecutor] = {}
    for app, targets in apps.items():
        home = folder / app / "config"
        if any(home.glob("config_fed_client.*")):
            executors = [entry["executor"] for entry in _config(home, "config_fed_client").get("executors", [])]
            (executor,) = [_built(part) for part in executors if part.get("path") in _KINDS] or [None]
            if isinstance(executor, PeftExecutor):
                found |= {site: executor for site in targets if site != "server"}
    if not found:
        raise ConfigError("no site of the job runs a PeftExecutor; is it a job of nvflare_fm?")
    return found


def _config(folder: Path, name: str) -> dict[str, Any]:
    files = sorted(folder.glob(f"{name}.*"))
    if not files:
        raise ConfigError(f"no {name}.conf or .json; is this the folder of a job?", str(folder))
    try:
        config = ConfigFactory.load_config(str(files[0]))
        return dict(config.to_dict())
    except Exception as error:  # each format's parser raises its own kinds
        raise ConfigError(f"{files[0].name} cannot be read: {str(error)[:200]}", str(files[0])) from None


def _built(part: Mapping[str, Any]) -> Any:
    args = dict(part.get("args") or {})
    args |= {name: _built(value) for name, value in args.items() if isinstance(value, dict) and "path" in value}
    kind = _KINDS[part["path"]]
    try:
        return kind(**args)
    except TypeError as error:
        raise ConfigError(f"{kind.__name__}: {error}") from None


def _only(kind: type[T], parts: Sequence[Any]) -> T:
    found = [part for part in parts if isinstance(part, kind)]
    if len(found) != 1:
        raise ConfigError(
            f"the job's server needs one {kind.__name__} and has {len(found)}; is it a job of nvflare_fm?"
        )
    return found[0]


def _check_fits(plan: RoundPlan, manifest: Manifest) -> None:
    asked = (plan.task, plan.labels, plan.peft["method"])
    had = (manifest.task, manifest.labels, manifest.peft)
    for name, ours, theirs in zip(("task", "labels", "peft.method"), asked, had, strict=True):
        if ours != theirs:
            raise ConfigError(f"the adapter was trained with {name} {theirs!r} and the job asks {ours!r}; take its own")
