"""What `fm_site.yaml` says: the models and data a site offers under aliases, its limits, whom it works for.

Every limit has a value, and a site works for nobody it does not name. Read by the site alone; what it says to a job is
`policy`.
"""

import codecs
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeVar

from pydantic import BeforeValidator, Field, StringConstraints

from ...config import (
    CANDIDATES,
    LABELS,
    LENGTH,
    MANY,
    ROWS,
    STEPS,
    WIDEST,
    Counts,
    Fingerprint,
    LabelStatistics,
    Modules,
    Quantizations,
    Settings,
    TaskPlan,
    Text,
    one,
)
from ...errors import ConfigError, PolicyError
from ...job.aliases import not_an_alias
from ...privacy.egress import Floor
from ...registry import nearest
from .site_yaml import read_yaml

T = TypeVar("T")
Alias = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$", max_length=64)]
Place = Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f\x7f]*$", max_length=4096)]
Identity = Annotated[str, StringConstraints(min_length=1, max_length=256)]
_nobody = BeforeValidator(lambda v: () if v is None else v)
Listed = Annotated[Annotated[tuple[Identity, ...], Field(max_length=1000)] | None, one, _nobody]
Protections = Annotated[tuple[Literal["clip", "noise", "encryption"], ...], Field(max_length=3), one]
_EXPONENT = re.compile(r"[0-9]{1,3}(\.[0-9]{1,17})?[eE]-?[0-9]{1,3}")
Small = Annotated[float, BeforeValidator(lambda v: float(v) if isinstance(v, str) and _EXPONENT.fullmatch(v) else v)]
FILE_NAME, ANYONE = "fm_site.yaml", "*"
AUTO: Final = "auto"


def _codec(name: Any) -> Any:
    """An encoding's name as Python has it: cp1252 for windows-1252."""
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9 _:.()-]{0,39}", name):
        return name
    try:
        return codecs.lookup(name).name.removesuffix("-sig")
    except (LookupError, ValueError):
        return name


Encoding = Annotated[
    Literal[
        "auto", "utf-8", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "ascii", "cp1250", "cp1251", "cp1252", "cp1253",
        "cp1254", "cp1255", "cp1256", "cp1257", "cp1258", "iso8859-1", "iso8859-2", "iso8859-5", "iso8859-7",
        "iso8859-9", "iso8859-15", "mac-roman", "cp437", "cp850", "cp852", "cp866", "koi8-r", "koi8-u", "gb18030",
        "big5", "cp932", "shift_jis", "euc_jp", "cp949", "euc_kr", "tis-620",
    ],
    BeforeValidator(_codec),
]  # fmt: skip
Delimiter = Annotated[
    str,
    BeforeValidator(lambda v: "\t" if v in ("tab", "\\t") else v),
    StringConstraints(pattern=r"^(auto|[^A-Za-z0-9\r\n\f\v\x00\"'. -])$", max_length=4),
]


class ModelSource(Settings):
    """A base model the site offers. Exactly one of `path` and `hub_id`."""

    path: Place = Field("", description="Local folder with config.json and *.safetensors.")
    hub_id: Text = Field("", description="owner/name on the Hugging Face hub, instead of path.")
    revision: Text = Field("", description="Commit of the hub repository; needed with hub_id.")
    fingerprint: Fingerprint = Field("", description="Fingerprint that the weights must have; empty: any.")
    quantizations: Quantizations | None = Field(
        None, description="Precisions in which this model may be loaded; unset: as in limits."
    )


class DataSource(Settings):
    """A data set the site offers. Paths are relative to its folder, or to that of this file, unless absolute."""

    train: Place = Field(description="File or folder with the training rows.")
    validation: Place = Field("", description="File or folder with the validation rows; empty: a tenth of train.")
    folder: Place = Field(
        "", description="Nothing outside this folder is read, not even through links; empty: the folder of each file."
    )
    format: Literal["auto", "jsonl", "json", "csv", "conll", "parquet", "datasets", "excel"] = Field(
        AUTO,
        description="Format; auto: by the file's ending and beginning. A folder holds Hugging Face `datasets`.",
    )
    encoding: Encoding = Field(AUTO, description="Encoding of a text file, such as utf-8 or cp1252; auto: guessed.")
    delimiter: Delimiter = Field(
        AUTO, description="Character between two columns of a text file, or tab; auto: the likeliest of , ; tab |."
    )
    columns: Mapping[Text, Text] = Field(
        default_factory=dict,
        max_length=100,
        description="Names of columns: the name that a task uses → the name in the file.",
    )
    labels: Mapping[Text, Text] = Field(
        default_factory=dict,
        max_length=LABELS,
        description="Names of labels: a label in the file → the plan's label that it stands for.",
    )
    max_bad_rows: float = Field(
        0.05, ge=0, lt=1, description="Largest share of rows that cannot be read; with more the site stops, 0 to 1."
    )


class Limits(Settings):
    """The most a job may ask of this site."""

    max_rank: int = Field(64, ge=1, le=WIDEST, description="Largest rank of an adapter that is trained.")
    max_batch_size: int = Field(
        1024, ge=1, le=ROWS, description="Most rows in memory at once, in training or measuring."
    )
    max_rows_per_step: int = Field(
        1024,
        ge=1,
        le=MANY,
        description="Most rows per optimizer step: batch_size × gradient_accumulation_steps × processes.",
    )
    max_steps_per_round: int = Field(10_000, ge=1, le=STEPS, description="Most optimizer steps per round.")
    max_seconds_per_round: float = Field(
        3600, gt=0, le=31_536_000, description="Most seconds of training and measuring per round, without loading."
    )
    max_length: int = Field(4096, ge=8, le=LENGTH, description="Most tokens of a text.")
    max_labels: int = Field(1000, ge=2, le=LABELS, description="Most classes of a task.")
    max_vera_rank: int = Field(1024, ge=1, le=WIDEST, description="Largest rank of VeRA's shared random matrices.")
    max_virtual_tokens: int = Field(256, ge=1, le=WIDEST, description="Longest prompt or prefix, in positions.")
    max_adapter_mib: float = Field(
        1024,
        gt=0,
        le=1e6,
        description="Most MiB of all that is trained, at 4 bytes a number. Training takes up to four times that.",
    )
    max_processes: int = Field(8, ge=1, le=1024, description="Most trainer processes, one GPU each.")
    memory_gib: float = Field(
        16, gt=0, le=1e6, description="GiB that the trainer may use: of GPU memory where there is a GPU."
    )
    quantizations: Quantizations = Field(
        ("nf4", "fp4", "int8", "bf16", "fp16", "fp32"), description="Precisions in which base models may be loaded."
    )
    threads: int = Field(0, ge=0, le=4096, description="CPU threads of the trainer; 0: torch decides.")
    max_weight: float = Field(
        1.0, gt=0, le=1, description="Largest share of the global adapter that this site wants to have, up to 1."
    )
    personalize: bool = Field(
        True,
        description="false: where a job asks for it, no adapter of the site's own is trained after the last round.",
    )
    pinned_only: bool = Field(False, description="true: a model without a fingerprint in this file is not used.")
    train_embeddings: bool = Field(
        False,
        description="true: word embeddings may be trained, which tells what words the site's texts hold.",
    )
    trainable_modules: Modules = Field(
        (), description="Ends of the names of modules that a job may train whole, besides a new head."
    )


class Privacy(Settings):
    """What must hold before anything learned from the data may leave.

    Rows are told apart by what of them is trained on: a row that is there twice counts once.
    """

    min_examples: int = Field(10, ge=1, le=MANY, description="Fewest different rows on which a job may train.")
    min_update_rows: int = Field(10, ge=1, le=MANY, description="Fewest different rows behind each round's update.")
    min_metric_rows: int = Field(
        10,
        ge=1,
        le=MANY,
        description="Fewest different rows behind each metric; with fewer, no metric leaves the site.",
    )
    counts: Counts = Field(
        (),
        description="Counts that may leave: examples, tokens, bad_rows, and steps where they follow from the number of "
        "rows; empty: none.",
    )
    label_statistics: LabelStatistics = Field(
        (),
        description="Statistics of the labels that may leave: skew, their distance from even; features, for each label "
        "with at least min_metric_rows rows the sum of what the base model makes of its texts; empty: none.",
    )
    max_epsilon: float | None = Field(
        None,
        gt=0,
        le=1000,
        description="Most ε that all jobs together may cost a record of one data set; unset: no limit. Where it is "
        "set, no update leaves without differential privacy, and no metric, loss or count leaves at all.",
        examples=[8.0],
    )
    delta: Small = Field(  # YAML takes 1e-5 for a text
        1e-5,
        gt=0,
        le=0.01,
        description="δ at which max_epsilon is counted, and the largest of a job: less than one in the number of "
        "records.",
    )
    unit: Text = Field(
        "row",
        description="Record that is protected: row, or the column that says whose row it is. A job that protects less "
        "is refused.",
        examples=["patient_id"],
    )
    required_protection: Protections = Field(
        (),
        description="Protection without which no update leaves: clip and noise (differential privacy), encryption. As "
        "with max_epsilon, no metric, loss or count leaves at all.",
    )
    max_membership_auc: float = Field(
        1.0,
        gt=0.5,
        le=1,
        description="Largest AUC with which an update may tell rows it was trained on from validation rows; 1: not "
        "measured. The upper end of its 95 % interval counts, on up to 200 rows of either side. An update above it is "
        "refused, and the refusal tells one bit about the rows that no ε covers.",
    )

    @property
    def floor(self) -> Floor | None:
        """What must hold for whatever leaves; None: the site demands nothing."""
        if self.max_epsilon is None and not self.required_protection:
            return None
        return Floor(self.max_epsilon, self.delta, self.unit, self.required_protection)

    def floor_of(self, plan: TaskPlan) -> Floor | None:
        """What must hold for what leaves in answer to a plan: votes are noised at every site."""
        if self.floor is None and plan.votes:
            return Floor(None, self.delta, self.unit, ("noise",))
        return self.floor


class Synthetic(Settings):
    """What the site does with rows that a model wrote. Unless it says so, nothing.

    Whatever a job asks, no row that is nearly a copy of one of the site's own, none twice, and none with what looks
    like personal data is trained on; none is measured on, and none is counted.
    """

    votes: bool = Field(
        False,
        description="true: the site's rows vote on which synthetic rows are like them. Only their number leaves, under "
        "noise, and is paid for from max_epsilon.",
    )
    accepts: bool = Field(False, description="true: jobs may train on synthetic rows beside the site's own.")
    max_share: float = Field(0.4, gt=0, le=0.9, description="Largest share of the training rows that may be synthetic.")
    max_rows: int = Field(10_000, ge=1, le=CANDIDATES, description="Most synthetic rows.")


class Welcome(Settings):
    """Whom the site works for, and on what. It works for nobody unless submitters, orgs or both are named; "*": anyone.

    What is there and left empty lets nobody in, or nothing. NVFlare authenticates the submitter. A job's template is
    what the job says of itself: `tasks` is the lock.
    """

    submitters: Listed = Field(
        None,
        description="Submitters, by the names in their certificates; unset: all of orgs.",
        examples=[["lead@company.example"]],
    )
    orgs: Listed = Field(None, description="Organisations of submitters; unset: any.", examples=[["company"]])
    templates: Listed = Field(
        None, description="Job templates, by name; unset: any.", examples=[["lora_text_classification"]]
    )
    tasks: Listed = Field(
        None,
        description="Tasks: causal_lm, sequence_classification, token_classification; unset: any.",
        examples=[["sequence_classification"]],
    )

    @property
    def nobody(self) -> bool:
        """Whether no job at all is welcome."""
        named = [listed for listed in (self.submitters, self.orgs, self.templates, self.tasks) if listed is not None]
        return (self.submitters is None and self.orgs is None) or () in named

    def __str__(self) -> str:
        """In words, for the site's admin."""
        if self.nobody:
            return "nobody is welcome"
        parts = {"submitters": self.submitters, "of": self.orgs, "with templates": self.templates, "for": self.tasks}
        told = {word: listed for word, listed in parts.items() if listed is not None and ANYONE not in listed}
        who = " ".join(f"{word} {', '.join(listed)}" for word, listed in told.items())
        return who if "submitters" in told else f"anyone {who}".strip()


class SiteConfig(Settings):
    """The whole of `fm_site.yaml`."""

    models: Mapping[Alias, ModelSource] = Field(
        default_factory=dict, max_length=1000, description="Base models that the site offers, by alias."
    )
    data: Mapping[Alias, DataSource] = Field(
        default_factory=dict, max_length=1000, description="Data sets that the site offers, by alias."
    )
    limits: Limits = Field(Limits(), description="The most that a job may ask of this site.")
    privacy: Privacy = Field(Privacy(), description="What must hold before anything learned may leave.")
    synthetic: Synthetic = Field(Synthetic(), description="What the site does with rows that a model wrote.")
    welcome: Welcome = Field(Welcome(), description="Whose jobs the site runs.")

    def model(self, alias: str) -> ModelSource:
        return _offered(self.models, alias, "model")

    def data_set(self, alias: str) -> DataSource:
        return _offered(self.data, alias, "data")


_KINDS = {"model": "model", "data": "data set"}  # a plan's setting, and what it names


def _offered(offers: Mapping[str, T], alias: str, setting: str) -> T:
    if alias not in offers:
        if said := not_an_alias(alias):
            raise PolicyError(
                f"{setting} is {said}; a job names aliases, and the site what they stand for",
                repr(alias),
                code="not_an_alias",
            )
        hint = nearest(alias, list(offers))
        raise PolicyError(
            f"{setting}: this site offers no {_KINDS[setting]} of that name; {hint}ask its admin to add it to "
            f"{FILE_NAME}",
            repr(alias),
            code="not_offered",
        )
    return offers[alias]


def load_site(file: Path) -> SiteConfig:
    """Reads `fm_site.yaml`; relative paths in it are taken from its own folder.

    A group that is there without settings says no more than one that is not there: each setting has its default.

    Raises:
        ConfigError: the file is missing, is not YAML as `read_yaml` reads it, or has an unknown or wrong setting.
    """
    values: Any = read_yaml(file, FILE_NAME)
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise ConfigError(
            f"{FILE_NAME} must hold settings by name, it holds a {type(values).__name__}",
            str(file),
            code="site_file_malformed",
        )
    try:
        config = SiteConfig.read({k: {} if v is None else v for k, v in values.items()}, FILE_NAME)
    except ConfigError as error:  # it names aliases, and how the file is made is nobody else's business
        raise ConfigError(
            f"{FILE_NAME} has a setting that is wrong; the site's log names it", str(error), code="site_file_wrong"
        ) from None
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
        held = (file, *file.rglob("*")) if file.is_dir() else (file,)
        places = {place: place.resolve(strict=place.is_symlink()) for place in held}
    except (OSError, RuntimeError) as error:  # a link to itself, or to what is not there
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
                code="outside_data_folder",
            )
    return file
