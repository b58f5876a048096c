"""`fm_site.yaml`: the models and data a site offers under aliases, its limits, whom it works for. Its word is final.

What a job asks is accepted, lowered where its plan says that is negotiable, or refused with the reason: `decide`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import yaml
from pydantic import Field, StringConstraints

from ..config import Names, Quantization, RoundPlan, Settings
from ..errors import ConfigError, PolicyError
from ..registry import nearest
from .peft_methods import complete

T = TypeVar("T")
Alias = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$", max_length=64)]
FILE_NAME = "fm_site.yaml"


class ModelSource(Settings):
    """A base model the site offers. Exactly one of `path` and `hub_id`."""

    path: str = Field("", description="a local folder with config.json and *.safetensors")
    hub_id: str = Field("", description="owner/name on the Hugging Face hub")
    revision: str = Field("", description="commit of the hub repository; needed with hub_id")
    fingerprint: str = Field("", description="pins the weights; empty: not pinned")
    quantizations: tuple[Quantization, ...] | None = Field(None, description="of this model; unset: as in limits")


class DataSource(Settings):
    """A data set the site offers. Paths are relative to its folder, or to that of this file, unless absolute."""

    train: str
    validation: str = Field("", description="empty: a tenth of the training rows is held out")
    folder: str = Field("", description="nothing outside it is read, links included; empty: the folder each file is in")
    format: Literal["auto", "jsonl", "csv", "parquet", "datasets"] = Field(
        "auto", description="auto: by the file's ending; a folder is a saved `datasets` folder"
    )
    columns: Mapping[str, str] = Field(default_factory=dict, description="the name we use → the name in the file")
    max_bad_rows: float = Field(0.05, ge=0, lt=1, description="a larger share of bad rows in a file stops the site")


class Limits(Settings):
    """The most a job may ask of this site."""

    max_rank: int = Field(64, ge=1)
    max_batch_size: int = Field(1024, ge=1, description="examples in memory at once")
    max_steps_per_round: int = Field(10_000, ge=1)
    max_seconds_per_round: float = Field(0, ge=0, description="training only, without loading; 0: no limit")
    max_processes: int = Field(8, ge=1, description="trainer processes, one GPU each")
    memory_gib: float = Field(0, ge=0, description="of the trainer: GPU memory where there is one; 0: no limit")
    quantizations: tuple[Quantization, ...] = ("nf4", "fp4", "int8", "bf16", "fp16", "fp32")
    threads: int = Field(0, ge=0, description="CPU threads of the trainer; 0: torch decides")
    pinned_only: bool = Field(False, description="a model without a fingerprint in this file is not used")


class Privacy(Settings):
    """What must hold before anything learned from the data may leave."""

    min_examples: int = Field(1, ge=1, description="no job trains on fewer rows than this")


class Welcome(Settings):
    """Whom the site works for, and on what. Unset: anyone, anything; an empty list: nobody, nothing.

    NVFlare authenticates the submitter. A job's template is what the job says of itself: `tasks` is the lock.
    """

    submitters: Names | None = Field(None, description="user names as in their certificates")
    orgs: Names | None = Field(None, description="organisations of submitters")
    templates: Names | None = Field(None, description="job templates, by name")
    tasks: Names | None = Field(None, description="causal_lm, sequence_classification, token_classification")


class SiteConfig(Settings):
    """The whole of `fm_site.yaml`."""

    models: Mapping[Alias, ModelSource] = Field(default_factory=dict)
    data: Mapping[Alias, DataSource] = Field(default_factory=dict)
    limits: Limits = Limits()
    privacy: Privacy = Privacy()
    welcome: Welcome = Welcome()

    def model(self, alias: str) -> ModelSource:
        return _offered(self.models, alias, "model")

    def data_set(self, alias: str) -> DataSource:
        return _offered(self.data, alias, "data set")


def _offered(offers: Mapping[str, T], alias: str, kind: str) -> T:
    if alias not in offers:
        if said := _not_an_alias(alias):
            raise PolicyError(f"{kind} {alias[:80]!r} is {said}; a job names aliases, and the site what they stand for")
        hint = nearest(alias, list(offers))
        raise PolicyError(f"this site offers no {kind} {alias!r}; {hint}ask its admin to add it to {FILE_NAME}")
    return offers[alias]


_KINDS = [  # the first that matches says what a name is that is no alias
    (r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", ""),
    (r"(.*[/\\])?\.\.([/\\].*)?", "a way out of a folder"),
    (r"[A-Za-z]:\\.*|\\.*", "a path"),
    (r"[A-Za-z_]\w*([.:][A-Za-z_]\w*)*:[A-Za-z_]\w*", "a class path"),
    (r"[a-z][a-z0-9+.-]*:.*", "a URL"),
    (r"[\w.-]+/[\w.-]+", "a hub id"),
    (r"[~.]?[\w .~-]*[/\\].*|.*\.(jsonl?|csv|parquet|safetensors|bin|gz|txt)", "a path"),
    (r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", "a class path"),
]


def _not_an_alias(name: str) -> str:
    """What `name` looks like, if it is no alias."""
    return next((kind for pattern, kind in _KINDS if re.fullmatch(pattern, name, re.DOTALL)), "code or not a name")


def load_site(file: Path) -> SiteConfig:
    """Reads `fm_site.yaml`; relative paths in it are taken from its own folder.

    Raises:
        ConfigError: the file is missing, is not YAML, or has an unknown setting.
    """
    try:
        values = yaml.safe_load(file.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{FILE_NAME} cannot be read; write one or mend it", f"{file}: {error}") from None
    if not isinstance(values or {}, dict):
        raise ConfigError(f"{FILE_NAME} must hold settings by name, it holds a {type(values).__name__}", str(file))
    try:
        config = SiteConfig.read({k: v for k, v in (values or {}).items() if v is not None}, FILE_NAME)
    except ConfigError as error:  # it repeats what it found, which may be a path
        raise ConfigError(f"{FILE_NAME} has a setting that is wrong; the site's log names it", error.message) from None
    root = file.parent
    models = {k: m.model_copy(update={"path": str(root / m.path)}) if m.path else m for k, m in config.models.items()}
    return config.model_copy(update={"models": models, "data": {k: _placed(d, root) for k, d in config.data.items()}})


def _placed(source: DataSource, root: Path) -> DataSource:
    folder = root / source.folder
    files = {name: str(folder / file) for name in ("train", "validation") if (file := getattr(source, name))}
    return source.model_copy(update=files | ({"folder": str(folder)} if source.folder else {}))


def held_in(file: Path, folder: str) -> Path:
    """`file`, once it is sure that neither it nor anything in it leads out of the data folder.

    Raises:
        PolicyError: it does.
    """
    root = Path(folder).resolve() if folder else file.parent.resolve()
    for place in (file, *file.rglob("*")) if file.is_dir() else (file,):
        if not place.resolve().is_relative_to(root):
            raise PolicyError(
                "a data file is a link that leads out of its data folder; the site's admin must put the file itself "
                "there, or name the folder it is in",
                f"{place} → {place.resolve()}, outside {root}",
            )
    return file


@dataclass(frozen=True)
class Submitter:
    """Who asks, as NVFlare authenticated them."""

    name: str = ""
    org: str = ""


@dataclass(frozen=True)
class Decision:
    """What the site says to a plan: the plan as it will be carried out, what it lowered, and why it refuses."""

    plan: RoundPlan
    lowered: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()

    def __str__(self) -> str:
        if self.refused:
            return "refused: " + "; ".join(self.refused)
        return "lowered: " + "; ".join(self.lowered) if self.lowered else "accepted"


def decide(plan: RoundPlan, site: SiteConfig, who: Submitter) -> Decision:
    """The site's whole word on a job.

    Raises:
        ConfigError: the plan's PEFT settings say nothing.
    """
    decision = fit(plan, site)
    return Decision(decision.plan, decision.lowered, (*_unwelcome(plan, site.welcome, who), *decision.refused))


def fit(plan: RoundPlan, site: SiteConfig) -> Decision:
    """The plan within the site's limits, whoever asks.

    Raises:
        ConfigError: the plan's PEFT settings say nothing.
    """
    plan = plan.model_copy(update={"peft": complete(plan.peft)})
    plan, lowered, refused = _within(plan, site.limits)
    return Decision(plan, lowered, (*refused, *_not_offered(plan, site)))


def accept(decision: Decision) -> Decision:
    """
    Raises:
        PolicyError: the site refuses; every reason is named at once.
    """
    if decision.refused:
        raise PolicyError("; ".join(decision.refused))
    return decision


def _within(plan: RoundPlan, limits: Limits) -> tuple[RoundPlan, tuple[str, ...], tuple[str, ...]]:
    training = plan.training
    asked = {
        "rank": (int(plan.peft.get("rank", 0)), limits.max_rank),
        "batch_size": (training.batch_size, limits.max_batch_size),
        "local_steps": (training.local_steps, limits.max_steps_per_round),
    }
    over = {name: pair for name, pair in asked.items() if pair[0] > pair[1]}
    refused = tuple(
        f"{name} {value} is more than the {most} this site allows; ask for less, or list {name} as negotiable"
        for name, (value, most) in over.items()
        if name not in plan.negotiable
    )
    given = {name: _less(name, *over[name]) for name in over if name in plan.negotiable}
    lowered = tuple(f"{name} {asked[name][0]} → {value}" for name, value in given.items())
    changes: dict[str, int] = {name: value for name, value in given.items() if name != "rank"}
    if "batch_size" in given:  # as many examples a step as before, in smaller portions
        changes["gradient_accumulation_steps"] = (
            training.gradient_accumulation_steps * training.batch_size // given["batch_size"]
        )
    peft = {**plan.peft, "rank": given["rank"]} if "rank" in given else plan.peft
    return plan.model_copy(update={"peft": peft, "training": training.model_copy(update=changes)}), lowered, refused


def _less(name: str, value: int, most: int) -> int:
    return max(d for d in range(1, most + 1) if value % d == 0) if name == "batch_size" else most


def _not_offered(plan: RoundPlan, site: SiteConfig) -> list[str]:
    reasons = []
    allowed = site.limits.quantizations
    try:
        model = site.model(plan.model)
        allowed = allowed if model.quantizations is None else model.quantizations
        if site.limits.pinned_only and not model.fingerprint:
            reasons.append(
                f"model {plan.model!r} is not pinned at this site; ask its admin to add its fingerprint to {FILE_NAME}"
            )
    except PolicyError as error:
        reasons.append(error.message)
    if plan.quantization not in allowed:
        reasons.append(f"quantization {plan.quantization!r} is not among {list(allowed)} at this site; choose one")
    try:
        site.data_set(plan.data)
    except PolicyError as error:
        reasons.append(error.message)
    return reasons


def _unwelcome(plan: RoundPlan, welcome: Welcome, who: Submitter) -> list[str]:
    asked = [
        ("submitter", who.name, welcome.submitters),
        ("organisation", who.org, welcome.orgs),
        ("job template", plan.template, welcome.templates),
        ("task", plan.task, welcome.tasks),
    ]
    return [
        f"{kind} {value or 'unknown'!r} is not welcome at this site; ask its admin, or leave this site out"
        for kind, value, listed in asked
        if listed is not None and value not in listed
    ]


def check_processes(processes: int, site: SiteConfig) -> None:
    """
    Raises:
        PolicyError: a job wants more trainer processes than the site gives.
    """
    if processes > site.limits.max_processes:
        raise PolicyError(
            f"processes {processes} is more than the {site.limits.max_processes} this site allows; ask for fewer"
        )


def check_examples(examples: int, site: SiteConfig) -> None:
    """
    Raises:
        PolicyError: fewer than the site's floor; how many it has is not told.
    """
    if examples < site.privacy.min_examples:
        raise PolicyError(
            f"this site trains on no fewer than {site.privacy.min_examples} examples and the data set has fewer; "
            "choose a larger one, or leave this site out"
        )
