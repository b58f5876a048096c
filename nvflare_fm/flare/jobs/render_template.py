"""Renders the job templates: `job_templates/NAME.toml` says what NAME sets, the fields of the settings explain it.

`make templates` writes each folder `job_templates/NAME` anew. A source has `description` (for lists), `about` (the
head of the server's file), what it sets differently from the defaults, under the names that `FedPEFTRecipe` or
`EvaluateAdapterRecipe` takes (of a vote, the `votes`), and, where sites differ, `sites`: each may say `about` itself.
"""

import json
import re
import shutil
import textwrap
import tomllib
from collections.abc import Collection, Iterator, Mapping, Sequence
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from ...config import Aggregation, RoundPlan, RoundSettings, SiteOverrides, VoteSettings, summary
from ...job import peft as peft_methods
from ...job import templates
from ..components import load
from ..locator import Measurement
from ..recipe import INITIAL, TASKS, held_to, sorted_out

MIN_SITES = 2  # unless a source says otherwise
_WIDTH = 120
_ALIGNED = 40  # a longer setting has its meaning after two blanks, and the others do not wait for it

_OF_TRAINING = {  # settings of a plan that mean nothing in a vote
    "peft", "training", "evaluation", "personalize", "target_mean", "target_scale", "uplink", "downlink", "negotiable",
    "seed", "privacy.max_grad_norm", "synthetic.share", "synthetic.required",
}  # fmt: skip
_META = """\
{
  <meta>
  resource_spec {}  # per site, e.g. hospital-a { num_of_gpus = 1, mem_per_gpu_in_GiB = 24 }
  <deploy_map>
}
"""
_INFO = """\
{
  <info>
  execution_api_type = "client_api"
  controller_type = "server"
}
"""
_CLIENT = """\
<about>
# The job sets values only; the code is the nvflare_fm that the site has installed.
{
  format_version = 2
  executors = [
    {
      tasks = <tasks>
      executor {
        path = "nvflare_fm.flare.executor.PeftExecutor"
        args {
          <executor>
          settings {  # what differs here from the plan; take the "# " off a line to set it
            <overrides>
          }
        }
      }
    }
  ]
  task_data_filters = []
  task_result_filters = []
  components = [
    {
      id = "event_to_fed"
      path = "nvflare.app_common.widgets.convert_to_fed_event.ConvertToFedEvent"
      args {
        events_to_convert = ["analytix_log_stats"]  # Losses and metrics for the server's TensorBoard and the like
      }
    }
  ]
}
"""
_SERVER = """\
<about>
{
  format_version = 2
  workflows = [
    {
      <workflow>
    }
  ]
  components = [
    <persistor>
    {
      id = "round_stats"
      path = "nvflare_fm.flare.stats.RoundStats"
      args {}
    }
    {
      id = "metrics_artifact_writer"
      path = "nvflare.app_common.widgets.metrics_artifact_writer.MetricsArtifactWriter"
      args {}
    }
    {
      id = "json_generator"
      path = "nvflare.app_common.widgets.validation_json_generator.ValidationJsonGenerator"
      args {}
    }
    <trackers>
  ]
  task_data_filters = []
  task_result_filters = []
}
"""
_PERSISTOR = """\
{
  id = "persistor"
  path = "nvflare_fm.flare.persistor.AdapterPersistor"
  args {
    <persistor>
  }
}
"""
_ROUNDS = """\
id = "controller"
path = "nvflare_fm.flare.controller.FedPEFT"
args {
  <controller>
  aggregator {
    path = "nvflare_fm.flare.aggregator.AdapterAggregator"
    args {
      settings {
        <aggregation>
      }
    }
  }
  plan {
    <plan>
  }
}
"""
_VOTING = """\
id = "controller"
path = "nvflare_fm.flare.votes.SyntheticVotes"
args {
  <controller>
  plan {
    <plan>
  }
}
"""
_MEASURING = """\
id = "controller"
path = "nvflare.app_common.workflows.global_model_eval.GlobalModelEval"
args {
  model_locator_id = "locator"  # Id of the component below
  validation_timeout = 6000     # Seconds after which sites that have not answered are left out
}
"""
_LOCATOR = """\
{
  id = "locator"
  path = "nvflare_fm.flare.locator.AdapterLocator"
  args {
    <arguments>
    measurement {  # a line behind "# " is as in the adapter's training
      <measurement>
    }
  }
}
"""
_TRACKERS = """\
# To watch in TensorBoard, take the "# " off the next five lines; the job's folder tb_events fills while it runs.
# {
#   id = "receiver"
#   path = "nvflare.app_opt.tracking.tb.tb_receiver.TBAnalyticsReceiver"
#   args { tb_folder = "tb_events" }
# }
# To watch in MLflow, off these; add tracking_uri = "http://…" to args, or read mlflow.db among the job's results.
# {
#   id = "receiver"
#   path = "nvflare.app_opt.tracking.mlflow.mlflow_receiver.MLflowReceiver"
#   args { kw_args { experiment_name = "federated" } }
# }
"""


def sources() -> dict[str, dict[str, Any]]:
    """What each template sets, by its name."""
    return {file.stem: tomllib.loads(file.read_text("utf-8")) for file in sorted(templates.folder().glob("*.toml"))}


def render(name: str, source: Mapping[str, Any]) -> dict[str, str]:
    """Write out the job template `name`.

    Returns:
        The text of each of its files, by the path inside the template's folder.
    Raises:
        ConfigError: the source has an unknown setting, or a value that is out of range.
    """
    given = dict(source)
    description, about = given.pop("description"), given.pop("about")
    min_sites, sites = given.pop("min_sites", MIN_SITES), given.pop("sites", {})
    meta = [
        _line("name", name, "What `nvflare job list` calls the job"),
        _line("min_clients", min_sites, "Sites that must be connected before the job starts"),
        _line("mandatory_clients", [], "Names of sites without which the job does not start"),
    ]
    if "measurement" in given:
        server, tasks = _measuring(name, given.pop("measurement")), ["validate"]
    elif "votes" in given:
        server, tasks = _voting(name, given.pop("votes"), min_sites), TASKS[:1]
    else:
        server, tasks = _rounds(name, given, min_sites, sites), TASKS
    files = {
        "meta.conf": _filled(_META, meta=_aligned(meta), deploy_map=_deploy_map(sites)),
        "info.conf": _filled(_INFO, info=[f"description = {_value(description)}"]),
        f"{'app_server' if sites else 'config'}/config/config_fed_server.conf": _filled(
            _SERVER, about=_comment(about), **server
        ),
    }
    for site in sites or ["each site"]:
        folder = f"app_{site}" if sites else "config"
        files[f"{folder}/config/config_fed_client.conf"] = _client(site, sites.get(site, {}), tasks)
    return files


def write(folder: Path) -> None:
    """Write every template into its folder, and nothing that was there before stays."""
    for name, files in {name: render(name, source) for name, source in sources().items()}.items():
        shutil.rmtree(folder / name, ignore_errors=True)
        for file, text in files.items():
            (folder / name / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / name / file).write_text(text, encoding="utf-8")


def _rounds(
    name: str, given: dict[str, Any], min_sites: int, sites: Mapping[str, Mapping[str, Any]]
) -> dict[str, Sequence[str]]:
    brings = given.pop(INITIAL, False)
    plan, aggregation, rounds = sorted_out(given)
    RoundPlan.read(plan, f"{name}: plan")
    Aggregation.read(aggregation, f"{name}: aggregation")
    RoundSettings.read(rounds, f"{name}: controller")
    overrides = {site: SiteOverrides.read(_own(settings), f"{name}: {site}") for site, settings in sites.items()}
    rounds |= {"min_responses": min_sites, "sites": held_to(overrides)}
    workflow = _filled(
        _ROUNDS,
        controller=_arguments("nvflare_fm.flare.controller.FedPEFT", rounds, {"plan", "aggregator"}),
        aggregation=_settings(Aggregation, aggregation, () if brings else {"client_privacy"}),  # it needs an adapter
        plan=_settings(RoundPlan, {**plan, "template": name}),
    )
    persistor = _arguments("nvflare_fm.flare.persistor.AdapterPersistor", {INITIAL: INITIAL} if brings else {})
    return {
        "workflow": workflow.splitlines(),
        "persistor": _filled(_PERSISTOR, persistor=persistor).splitlines(),
        "trackers": _TRACKERS.splitlines(),
    }


def _voting(name: str, given: Mapping[str, Any], min_sites: int) -> dict[str, Sequence[str]]:
    plan = {key: value for key, value in given.items() if key not in VoteSettings.model_fields}
    RoundPlan.read(plan, f"{name}: plan")
    settings = {key: value for key, value in given.items() if key not in plan} | {"min_responses": min_sites}
    VoteSettings.read(settings, f"{name}: votes")
    workflow = _filled(
        _VOTING,
        controller=_settings(VoteSettings, settings),
        plan=_settings(RoundPlan, {**plan, "template": name}, _OF_TRAINING),
    )
    return {"workflow": workflow.splitlines(), "persistor": [], "trackers": []}


def _measuring(name: str, measurement: Mapping[str, Any]) -> dict[str, Sequence[str]]:
    Measurement.read(measurement, f"{name}: measurement")
    locator = _filled(
        _LOCATOR,
        arguments=_arguments("nvflare_fm.flare.locator.AdapterLocator", {}, {"measurement"}),
        measurement=_settings(Measurement, {**measurement, "template": name}),
    )
    persistor = "nvflare_fm.flare.persistor.AdapterPersistor"
    brought = _arguments(persistor, {INITIAL: INITIAL}, {"keep_rounds", "resume"})
    return {
        "workflow": _MEASURING.splitlines(),
        "persistor": [*_filled(_PERSISTOR, persistor=brought).splitlines(), *locator.splitlines()],
        "trackers": [],
    }


def _client(site: str, settings: Mapping[str, Any], tasks: Sequence[str]) -> str:
    why = f": {settings['about']}" if "about" in settings else ""
    idle = () if tasks == TASKS else SiteOverrides.model_fields.keys() - RoundPlan.model_fields.keys()
    text = _filled(
        _CLIENT,
        about=[f"# What {site} runs{why}."],
        executor=_arguments("nvflare_fm.flare.executor.PeftExecutor", {}, {"settings"}),
        overrides=_settings(SiteOverrides, _own(settings), idle),  # what does not train knows neither rank nor steps
    )
    return text.replace("<tasks>", _value(tasks))


def _own(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name != "about"}


def _deploy_map(sites: Collection[str]) -> list[str]:
    if not sites:
        where = ['  config = ["@ALL"]  # every connected site; called config, as `nvflare job create` wants it']
        return ["deploy_map {", *where, "}"]
    apps = [f'  app_{site} = ["{site}"]' for site in ("server", *sites)]
    return ["deploy_map {  # app → where it runs; replace the names by your sites', one app each", *apps, "}"]


def _arguments(component: str, given: Mapping[str, Any], without: Collection[str] = ()) -> list[str]:
    """The lines of a component's arguments; its constructor has their defaults."""
    defaults = {p.name: p.default for p in signature(load(component)).parameters.values()}
    group = import_module(component.rpartition(".")[0])._Arguments
    return _settings(group, {**defaults, **given}, without)


def _settings(group: type[BaseModel], given: Mapping[str, Any], without: Collection[str] = ()) -> list[str]:
    """A line for each setting of a group, those given and those not, and a block for each group inside it."""
    lines, blocks = [], []
    for name, field in group.model_fields.items():
        if name in without:
            continue
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            inside = {each.removeprefix(f"{name}.") for each in without}
            blocks += _block(name, _settings(kind, given.get(name, {}), inside))
        elif name == "peft":
            blocks += _block(name, _peft(given.get(name, field.get_default(call_default_factory=True))))
        else:
            lines.append(_setting(name, field, given))
    return [*_aligned(lines), *blocks]


def _peft(given: Mapping[str, Any]) -> list[str]:
    method = _line("method", given["method"], "PEFT method; docs/reference/settings.md lists them and their settings")
    fields = peft_methods.registry[given["method"]].model_fields
    return _aligned([method, *(_setting(name, inner, given) for name, inner in fields.items())])


def _setting(name: str, field: FieldInfo, given: Mapping[str, Any]) -> tuple[str, str]:
    """The line of a setting. One that is unset, and has an example, shows the example behind a `# `."""
    if name not in given and field.examples:
        text, meaning = _line(name, field.examples[0], summary(field))
        return f"# {text}", meaning
    default = None if field.is_required() else field.get_default(call_default_factory=True)
    return _line(name, given.get(name, default), summary(field))


def _line(name: str, value: Any, meaning: str) -> tuple[str, str]:
    return f"{name} = {_value(value)}", meaning


def _value(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _aligned(lines: Sequence[tuple[str, str]]) -> list[str]:
    width = max((len(text) for text, _ in lines if len(text) <= _ALIGNED), default=0)
    return [f"{text:<{width}}  # {meaning}" for text, meaning in lines]


def _block(name: str, lines: Sequence[str]) -> list[str]:
    return [f"{name} {{", *(f"  {line}" for line in lines), "}"]


def _comment(about: str) -> list[str]:
    return textwrap.wrap(about, _WIDTH, initial_indent="# ", subsequent_indent="# ")


def _filled(text: str, **slots: Sequence[str]) -> str:
    """`text` with lines in place of each line that is a slot, as far in as the slot."""

    def lines() -> Iterator[str]:
        for line in text.splitlines():
            slot = re.fullmatch(r"( *)<(\w+)>", line)
            yield from (slot[1] + each for each in slots[slot[2]]) if slot else [line]

    return "\n".join(lines()) + "\n"


if __name__ == "__main__":
    write(templates.folder())
