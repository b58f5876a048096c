"""Every setting: frozen, typed, bounded, documented beside the field. A key nobody reads is an error.

After pydantic's own way of saying what is wrong, with the nearest known key added. A value may have been read from a
site's own files or environment before it came here, so no message repeats one; the site's own log has it.
"""

import math
from collections.abc import Mapping, Sequence
from types import UnionType
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)

from .errors import ConfigError
from .registry import nearest

SEED = 2**63 - 1  # the largest seed
LENGTH, LABELS, ROWS = 2**20, 10_000, 2**16  # no plan asks for more tokens in a text, classes, or rows at a time
WIDEST = 2**16  # no adapter has a larger rank or a longer prompt
STEPS, MANY = 10**6, 10**9  # no round has more steps, no site more rows

one = BeforeValidator(lambda v: (v,) if isinstance(v, str) else v)
_one_rule = BeforeValidator(lambda v: (v,) if isinstance(v, str | Mapping) else v)
_listed = BeforeValidator(lambda v: tuple(v) if isinstance(v, list) else v)

Quantization = Literal["nf4", "fp4", "int8", "bf16", "fp16", "fp32"]
Quantizations = Annotated[tuple[Quantization, ...], Field(max_length=6), one]
Rest = Literal["none", "tail", "all"]
Factors = Literal["AB", "A", "B"]
Text = Annotated[str, StringConstraints(max_length=256)]
Name = Annotated[str, StringConstraints(max_length=64, pattern=r"^[A-Za-z0-9_.-]*$")]
Fingerprint = Annotated[str, StringConstraints(max_length=64, pattern=r"^[0-9a-f]*$")]
ModuleName = Annotated[str, StringConstraints(min_length=1, max_length=256, pattern=r"^[A-Za-z0-9_.-]+$")]
Labels = Annotated[tuple[Text, ...], Field(max_length=LABELS), one]
Modules = Annotated[tuple[ModuleName, ...], Field(max_length=1024), one]
Statistic = Literal["skew"]
LabelStatistics = Annotated[tuple[Statistic, ...], Field(max_length=1), one]
Count = Literal["examples", "tokens", "steps", "bad_rows"]
Counts = Annotated[tuple[Count, ...], Field(max_length=4), one]
Negotiable = Annotated[tuple[Literal["rank", "batch_size", "local_steps"], ...], Field(max_length=3), one]
Whole = Annotated[int, Field(ge=-SEED, le=SEED)]
Number = Annotated[float, Field(ge=-1e300, le=1e300)]
Texts = Annotated[tuple[Text, ...], Field(max_length=1024), _listed]
PeftSettings = Annotated[Mapping[Name, bool | Whole | Number | Text | Texts | None], Field(max_length=32)]
RuleSettings = Annotated[Mapping[Name, bool | Whole | Number | Name], Field(max_length=16)]
Rule = Name | RuleSettings  # by name, or {"rule": name, setting: value}
Rules = Annotated[tuple[Rule, ...], Field(max_length=16), _one_rule]


_TOLD = 20  # mistakes at most


class Settings(BaseModel):
    """A frozen group of settings that refuses unknown keys, and values that are not of the type they should be: no
    number is read from a text, and none from true or false.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, strict=True)

    @model_validator(mode="before")
    @classmethod
    def _as_written(cls, values: Any) -> Any:
        """Lists in JSON, YAML and HOCON are our tuples."""
        if not isinstance(values, Mapping):
            return values
        return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}

    @classmethod
    def read(cls, values: Mapping[str, Any], where: str) -> Self:
        """Validates `values`.

        Raises:
            ConfigError: names `where`, the key, what is wrong with it and the nearest known key. What was found there
                is for the local log alone.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            errors = error.errors(include_url=False, include_context=False)[:_TOLD]
        wrong: dict[str, list[str]] = {}
        for each in errors:
            place, said = _explained(cls, each)
            wrong.setdefault(place, []).append(said)
        told = [f"{place}: " * bool(place) + " or ".join(dict.fromkeys(said)) for place, said in wrong.items()]
        found = dict.fromkeys(map(_found, errors))
        raise ConfigError(f"{where}: {'; '.join(told)}", "; ".join(found)[:2000], code="wrong_setting")


def _explained(cls: type[BaseModel], error: Any) -> tuple[str, str]:
    """Where a setting is wrong and how, in names of settings alone."""
    if error["type"] != "extra_forbidden":
        return ".".join(_along(cls, error["loc"])[0]), error["msg"].replace("valid tuple", "list")
    *path, last = error["loc"]
    names, group = _along(cls, path)
    known = sorted(group.model_fields)
    inside = f" in {'.'.join(names)}" if names else ""
    return "", f"unknown setting{inside}; {nearest(str(last)[:80], known)}known: {known}"


def _along(cls: Any, path: Sequence[Any]) -> tuple[list[str], Any]:
    """The names of the settings on the way from `cls`, with * for an alias, and the type the way ends at. Beyond a
    setting, pydantic's path goes on with names of types and keys of the job.
    """
    names: list[str] = []
    for part in path:
        if isinstance(cls, type) and issubclass(cls, BaseModel) and part in cls.model_fields:
            names.append(str(part))
            cls = _present(cls.model_fields[part].annotation)
        elif (inside := get_args(cls)) and isinstance(inside[-1], type) and issubclass(inside[-1], BaseModel):
            names.append("*")
            cls = inside[-1]
        else:
            break
    return names, cls


def _present(kind: Any) -> Any:
    """The group of settings that `group | None` may hold."""
    choices = get_args(kind) if isinstance(kind, UnionType) else ()
    return next((c for c in choices if isinstance(c, type) and issubclass(c, BaseModel)), kind)


def _found(error: Any) -> str:
    where = ".".join(map(str, error["loc"]))[:400]
    if error["type"] in ("missing", "extra_forbidden"):  # the input of what is missing is the whole group
        return where
    try:
        return f"{where} = {error['input']!r:.200}"
    except (ValueError, RecursionError):  # a number too long, or a list too deep, to be written out
        return f"{where} is a {type(error['input']).__name__}"


class TrainingSettings(Settings):
    """How a site trains in one round. Names are those of `transformers.TrainingArguments` where it has them."""

    local_steps: int = Field(
        20, ge=0, le=1_000_000, description="optimizer steps a round; 0: count local_epochs instead"
    )
    local_epochs: float = Field(
        1.0, gt=0, le=1000, description="passes over the site's data a round, where local_steps is 0"
    )
    batch_size: int = Field(8, ge=1, le=ROWS, description="examples per step and process")
    gradient_accumulation_steps: int = Field(1, ge=1, le=ROWS)
    gradient_checkpointing: bool = Field(False, description="less memory for about a third more time")
    learning_rate: float = Field(1e-3, gt=0, le=10)
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="over all rounds of the federation, not over each"
    )
    warmup_ratio: float = Field(0.0, ge=0, le=1, description="share of all steps of the federation")
    optim: Literal["adamw_torch", "sgd", "paged_adamw_8bit"] = "adamw_torch"
    weight_decay: float = Field(0.0, ge=0, le=10)
    max_grad_norm: float = Field(1.0, gt=0, le=1e9)
    head_lr_ratio: float | None = Field(
        None,
        ge=0,
        le=1000,
        description="a head moves this many times learning_rate, in the root mean square and by one second moment a "
        "tensor (NovoGrad, arXiv:1905.11286); 0: like all else; unset: 8 for classifiers with LoRA and Adam",
    )
    proximal_mu: float = Field(
        0.0,
        ge=0,
        le=1e6,
        description="FedProx (arXiv:1812.06127): μ/2 · ‖ΔW − ΔW_global‖² is added; for LoRA, of products",
    )
    restricted_softmax: float = Field(
        1.0,
        ge=0,
        le=1,
        description="FedRS (KDD 2021): what logits of classes a site lacks count in training",
    )
    logit_calibration: float = Field(
        0.0,
        ge=0,
        le=1000,
        description="FedLC (arXiv:2209.00189): τ; logits are lowered by τ·n^(−1/4) in training",
    )
    logit_adjustment: float = Field(
        0.0,
        ge=0,
        le=1000,
        description="logit adjustment (arXiv:2007.07314): τ; a site adds τ·log of its class frequencies in training",
    )


class EvaluationSettings(Settings):
    """When a site measures the adapter on its own validation data."""

    before: bool = Field(True, description="the adapter received: what chooses the best round")
    after: bool = Field(True, description="the adapter after local training")
    batch_size: int = Field(16, ge=1, le=ROWS)
    max_examples: int = Field(
        0,
        ge=0,
        le=MANY,
        description="0: all of them; a site measures a multiple of its privacy.min_metric_rows, so that two answers "
        "never differ by a few rows",
    )


class RoundPlan(Settings):
    """All that the server asks of a site in a round. Travels with every task: one source of truth.

    `model` and `data` are aliases. What they stand for is the site's to say, never the job's.
    """

    task: Name = Field("causal_lm", description="causal_lm, sequence_classification, token_classification")
    model: Text = Field("base", description="alias in the site's models")
    data: Text = Field("notes", description="alias in the site's data")
    fingerprint: Fingerprint = Field(
        "", description="of the base model all sites must hold; empty: the sites must agree"
    )
    quantization: Quantization = "nf4"
    double_quant: bool = Field(True, description="quantize the quantization constants too (QLoRA, arXiv:2305.14314)")
    compute_dtype: Literal["auto", "bf16", "fp16", "fp32"] = Field(
        "auto", description="auto: bf16 where the GPU, or a CPU with AMX, is fast in it; fp32 on other CPUs"
    )
    peft: PeftSettings = Field(default_factory=lambda: {"method": "lora"}, description="a PEFT method and its settings")
    labels: Labels = Field((), description="classes, in order, for the classification tasks")
    max_length: int = Field(512, ge=8, le=LENGTH, description="tokens; longer texts are cut")
    rest: Rest = Field(
        "tail",
        description="what of the global adapter rides along frozen; from the merge rule, as the next two",
    )
    factors: Factors = Field("AB", description="those a site trains in this round")
    shares: Factors = Field("AB", description="those that leave a site")
    label_statistics: LabelStatistics = Field(
        (), description="what a site is asked to tell of how often its labels occur; follows from the weights"
    )
    counts: Counts = Field((), description="of its rows and steps, what a site is asked to tell; from the weights, too")
    uplink: Rules = Field(
        (),
        description="transforms of what a site sends, in order, such as int8; empty: tensors travel as float32",
    )
    downlink: Rules = Field((), description="transforms of the global adapter on its way to the sites")
    training: TrainingSettings = TrainingSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    seed: int = Field(0, ge=0, le=SEED)
    negotiable: Negotiable = Field(
        (), description="of rank, batch_size and local_steps, what a site may lower to its limits; the rest it refuses"
    )
    template: Name = Field(
        "", description="the job template this plan came from; sites may welcome some and not others"
    )

    @property
    def rank(self) -> int:
        """Of the adapter that is trained; 0: the method has none, or does not say."""
        rank = self.peft.get("rank")
        return rank if isinstance(rank, int) else 0


DERIVED = (
    "rest",
    "factors",
    "shares",
    "label_statistics",
    "counts",
)  # of a plan: they follow from how adapters are merged


class Aggregation(Settings):
    """How many adapters become one. A rule with settings is written `{rule = "name", setting = value}`."""

    merge: Name = Field("exact", description="a merge rule")
    weigh: Rules = Field(("uniform",), description="weight factors; a site's weight is their product, normalised")
    max_weight: float = Field(1.0, gt=0, le=1, description="no site counts more than this share")
    guard: Rules = Field(
        ("clip_norm",), description="guards: how much of a change counts that is far from the other sites'; empty: none"
    )
    normalize_steps: bool = Field(
        False, description="FedNova (arXiv:2007.07481): a site's change counts per step, however many steps it took"
    )
    step: Rule | None = Field(
        None,
        description="a server step: what is done with the mean of the sites' changes; unset: fedexp for causal_lm with "
        "exact or stack, else plain",
    )
    max_rank: int = Field(0, ge=0, le=WIDEST, description="of the global adapter; 0: the plan's rank")
    max_staleness: int = Field(
        0,
        ge=0,
        le=1000,
        description="an answer counts up to so many rounds late, and its site trains on undisturbed; 0: a round's end "
        "calls off who is still at it",
    )
    keep_energy: float = Field(
        1.0, gt=0, le=1, description="a layer keeps no more directions than hold this share of ‖ΔW‖²"
    )
    sigma: Literal["B", "balanced", "A"] = Field("B", description="the factor that holds the singular values")
    seed: int = Field(0, ge=0, le=SEED)


def at_rank(peft: Mapping[str, Any], rank: int) -> dict[str, Any]:
    """The same PEFT settings at another rank. The scale changes with 1/√rank, as in rsLoRA (arXiv:2312.03732), so that
    a step of training changes ΔW as much at every site: without `use_rslora`, `lora_alpha` changes with √rank.
    """
    changed, was, alpha = {**peft, "rank": rank}, peft.get("rank"), peft.get("lora_alpha")
    if not peft.get("use_rslora") and isinstance(alpha, int | float) and isinstance(was, int) and was > 0:
        changed["lora_alpha"] = alpha * math.sqrt(rank / was)
    return changed  # what is no number stays, for the method to refuse


class SiteOverrides(Settings):
    """What a job asks of one site differently from the plan. None: as the plan says."""

    rank: int | None = Field(None, ge=1, le=WIDEST)
    lora_alpha: float | None = Field(
        None, gt=0, le=1e6, description="else it follows the rank, so that the scale changes with 1/√rank"
    )
    quantization: Quantization | None = None
    batch_size: int | None = Field(None, ge=1, le=ROWS)
    local_steps: int | None = Field(None, ge=1, le=STEPS)
    model: Text | None = None
    data: Text | None = None

    def applied(self, plan: RoundPlan) -> RoundPlan:
        """The plan as this site is to carry it out."""
        given = self.model_dump(exclude_none=True, exclude={"rank", "lora_alpha"})
        peft = at_rank(plan.peft, self.rank) if self.rank else dict(plan.peft)
        if self.lora_alpha:
            peft["lora_alpha"] = self.lora_alpha
        training: dict[str, Any] = {k: given.pop(k) for k in ("batch_size", "local_steps") if k in given}
        return plan.model_copy(update={**given, "peft": peft, "training": plan.training.model_copy(update=training)})
