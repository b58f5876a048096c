"""`fm_site.yaml`: the models and data a site offers under aliases, its limits, whom it works for.

Read by the site alone; what it says to a job is `policy`.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import yaml
from pydantic import BeforeValidator, Field, StringConstraints

from ..config import LabelStatistics, Names, Quantization, Settings
from ..errors import ConfigError, PolicyError
from ..registry import nearest

T = TypeVar("T")
Alias = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$", max_length=64)]
_one = BeforeValidator(lambda v: (v,) if isinstance(v, str) else v)
Protections = Annotated[tuple[Literal["clip", "noise", "encryption"], ...], _one]
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
    max_weight: float = Field(1.0, gt=0, le=1, description="the largest share of the global adapter this site wants")
    pinned_only: bool = Field(False, description="a model without a fingerprint in this file is not used")


class Privacy(Settings):
    """What must hold before anything learned from the data may leave."""

    min_examples: int = Field(1, ge=1, description="no job trains on fewer rows than this")
    required_protection: Protections = Field(
        (), description="of every update: clip, noise, encryption. No job can give any yet: naming one refuses all"
    )
    label_statistics: LabelStatistics = Field(
        (), description="what may leave of how often each label occurs: skew, its distance to even; empty: nothing"
    )


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
    try:
        root = Path(folder).resolve() if folder else file.parent.resolve()
        places = {place: place.resolve() for place in ((file, *file.rglob("*")) if file.is_dir() else (file,))}
    except (OSError, RuntimeError) as error:  # a link that leads to itself
        raise PolicyError(
            "a data file is a link that leads nowhere; the site's admin must put the file itself there",
            f"{file}: {error}",
            code="data_link_broken",
        ) from None
    for place, target in places.items():
        if not target.is_relative_to(root):
            raise PolicyError(
                "a data file is a link that leads out of its data folder; the site's admin must put the file itself "
                "there, or name the folder it is in",
                f"{place} → {target}, outside {root}",
            )
    return file
