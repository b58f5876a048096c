"""`fm_site.yaml`: the models and data a site offers under aliases, and its limits. The site's word is final."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, TypeVar

import yaml
from pydantic import Field

from ..config import Quantization, RoundPlan, Settings
from ..errors import ConfigError, PolicyError
from ..registry import nearest

T = TypeVar("T")
FILE_NAME = "fm_site.yaml"


class ModelSource(Settings):
    """Where a base model is. Exactly one of `path` and `hub_id`."""

    path: str = Field("", description="a local folder with config.json and *.safetensors")
    hub_id: str = Field("", description="owner/name on the Hugging Face hub")
    revision: str = Field("", description="commit of the hub repository; needed with hub_id")
    fingerprint: str = Field("", description="pins the weights; empty: not pinned")


class DataSource(Settings):
    """A data set the site offers. Paths are relative to the folder of the site file unless absolute."""

    train: str
    validation: str = ""
    format: Literal["auto", "jsonl", "csv", "parquet", "datasets"] = Field(
        "auto", description="auto: by the file's ending; a folder is a saved `datasets` folder"
    )
    columns: Mapping[str, str] = Field(default_factory=dict, description="the name we use → the name in the file")
    max_bad_rows: float = Field(0.05, ge=0, lt=1, description="a larger share of bad rows in a file stops the site")


class Limits(Settings):
    """The most a job may ask of this site."""

    max_rank: int = Field(64, ge=1)
    max_steps_per_round: int = Field(10_000, ge=1)
    quantizations: tuple[Quantization, ...] = ("nf4", "fp4", "int8", "bf16", "fp16", "fp32")
    threads: int = Field(0, ge=0, description="CPU threads of the trainer; 0: torch decides")


class SiteConfig(Settings):
    """The whole of `fm_site.yaml`."""

    models: Mapping[str, ModelSource] = Field(default_factory=dict)
    data: Mapping[str, DataSource] = Field(default_factory=dict)
    limits: Limits = Limits()

    def model(self, alias: str) -> ModelSource:
        return _offered(self.models, alias, "model")

    def data_set(self, alias: str) -> DataSource:
        return _offered(self.data, alias, "data set")


def _offered(offers: Mapping[str, T], alias: str, kind: str) -> T:
    if alias not in offers:
        hint = nearest(alias, list(offers))
        raise PolicyError(f"this site offers no {kind} {alias!r}; {hint}ask its admin to add it to {FILE_NAME}")
    return offers[alias]


def load_site(file: Path) -> SiteConfig:
    """Reads `fm_site.yaml`; relative paths in it are taken from its own folder.

    Raises:
        ConfigError: the file is missing, is not YAML, or has an unknown setting.
    """
    try:
        values = yaml.safe_load(file.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{FILE_NAME} cannot be read; write one or mend it", f"{file}: {error}") from None
    config = SiteConfig.read(values or {}, FILE_NAME)
    root = file.parent
    models = {k: m.model_copy(update={"path": str(root / m.path)}) if m.path else m for k, m in config.models.items()}
    data = {
        k: d.model_copy(update={f: str(root / getattr(d, f)) for f in ("train", "validation") if getattr(d, f)})
        for k, d in config.data.items()
    }
    return config.model_copy(update={"models": models, "data": data})


def check(plan: RoundPlan, limits: Limits) -> None:
    """Refuses a plan that asks for more than the site gives.

    Raises:
        PolicyError: names the setting, what was asked and what is allowed.
    """
    rank = plan.peft.get("rank", 1)
    if rank > limits.max_rank:
        raise PolicyError(f"rank {rank} is more than the {limits.max_rank} this site allows; ask for less")
    if plan.training.local_steps > limits.max_steps_per_round:
        raise PolicyError(
            f"local_steps {plan.training.local_steps} is more than the {limits.max_steps_per_round} "
            "this site allows; ask for less"
        )
    if plan.quantization not in limits.quantizations:
        raise PolicyError(f"quantization {plan.quantization!r} is not among {list(limits.quantizations)} at this site")
