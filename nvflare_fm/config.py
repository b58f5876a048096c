"""Every setting: frozen, typed, bounded, documented beside the field. A key nobody reads is an error.

After pydantic's own way of saying what is wrong, with the nearest known key added. A value may have been read from a
site's own files or environment before it came here, so no message repeats one; the site's own log has it.
"""

import math
from collections.abc import Mapping, Sequence
from types import UnionType
from typing import Annotated, Any, Literal, Self, TypeVar, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)
from pydantic.fields import FieldInfo

from .errors import ConfigError
from .registry import nearest

SEED = 2**63 - 1  # the largest seed
LENGTH, LABELS, ROWS = 2**20, 10_000, 2**16  # no plan asks for more tokens in a text, classes, or rows at a time
WIDEST = 2**16  # no adapter has a larger rank or a longer prompt
STEPS, MANY = 10**6, 10**9  # no round has more steps, no site more rows
SITES = 100_000  # no federation has more
CANDIDATES = 20_000  # no set of synthetic rows has more
ROW = "row"  # the unit of privacy that is no column
A_YEAR = 366 * 24 * 3600.0  # seconds

one = BeforeValidator(lambda v: (v,) if isinstance(v, str) else v)
_one_rule = BeforeValidator(lambda v: (v,) if isinstance(v, str | Mapping) else v)
_listed = BeforeValidator(lambda v: tuple(v) if isinstance(v, list) else v)

Quantization = Literal["nf4", "fp4", "int8", "bf16", "fp16", "fp32"]
Quantizations = Annotated[tuple[Quantization, ...], Field(max_length=6), one]
Rest = Literal["none", "tail", "all"]
Factors = Literal["AB", "A", "B"]
Text = Annotated[str, StringConstraints(max_length=256)]
Name = Annotated[str, StringConstraints(max_length=64, pattern=r"^[A-Za-z0-9_.-]*$")]
OptionalId = Annotated[str, StringConstraints(max_length=64, pattern=r"^([A-Za-z0-9_][A-Za-z0-9_.-]*)?$")]
Fingerprint = Annotated[str, StringConstraints(max_length=64, pattern=r"^[0-9a-f]*$")]
ModuleName = Annotated[str, StringConstraints(min_length=1, max_length=256, pattern=r"^[A-Za-z0-9_.-]+$")]
Labels = Annotated[tuple[Text, ...], Field(max_length=LABELS), one]
Numbers = Annotated[tuple[Annotated[float, Field(ge=-1e6, le=1e6)], ...], Field(max_length=LABELS)]
Scales = Annotated[tuple[Annotated[float, Field(ge=1e-6, le=1e6)], ...], Field(max_length=LABELS)]
Modules = Annotated[tuple[ModuleName, ...], Field(max_length=1024), one]
Statistic = Literal["skew", "features"]
LabelStatistics = Annotated[tuple[Statistic, ...], Field(max_length=2), one]
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
        """Check `values` and make settings of them.

        Args:
            values: name → value.
            where: for errors.

        Returns:
            The settings.
        Raises:
            ConfigError: names `where`, the key, what is wrong with it and the nearest known key. The value found there
                goes into the local log only.
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
    """The names of the settings on the way from `cls`, with * for an alias or a place in a list, and the type the way
    ends at. Beyond a setting, pydantic's path goes on with names of types and keys of the job.
    """
    names: list[str] = []
    for part in path:
        if isinstance(cls, type) and issubclass(cls, BaseModel) and part in cls.model_fields:
            names.append(str(part))
            cls = _present(cls.model_fields[part].annotation)
        elif groups := [kind for kind in get_args(cls) if isinstance(kind, type) and issubclass(kind, BaseModel)]:
            names.append("*")
            cls = groups[-1]
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


def summary(field: FieldInfo) -> str:
    """What the description of a setting says first, without its full stop: the rest is for the reference."""
    return (field.description or "").partition(". ")[0].removesuffix(".")


class TrainingSettings(Settings):
    """How a site trains in one round. Names are those of `transformers.TrainingArguments` where it has them."""

    local_steps: int = Field(
        20, ge=0, le=1_000_000, description="Optimizer steps per round; 0: train for local_epochs instead."
    )
    local_epochs: float = Field(
        1.0, gt=0, le=1000, description="Passes over the site's training rows per round, where local_steps is 0."
    )
    batch_size: int = Field(8, ge=1, le=ROWS, description="Rows per batch and trainer process.")
    gradient_accumulation_steps: int = Field(
        1, ge=1, le=ROWS, description="Batches whose gradients are added up before one optimizer step."
    )
    gradient_checkpointing: bool = Field(False, description="true: less memory for about a third more time.")
    learning_rate: float = Field(1e-3, gt=0, le=10, description="Highest learning rate of the schedule.")
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="Learning rate over all rounds together: constant, linear or cosine."
    )
    warmup_ratio: float = Field(
        0.0, ge=0, le=1, description="Share of the steps of all rounds in which the learning rate rises, 0 to 1."
    )
    optim: Literal["adamw_torch", "sgd", "paged_adamw_8bit"] = Field(
        "adamw_torch", description="Optimizer: adamw_torch, sgd or paged_adamw_8bit (less GPU memory)."
    )
    weight_decay: float = Field(0.0, ge=0, le=10, description="Weight decay of the optimizer.")
    max_grad_norm: float = Field(
        1.0, gt=0, le=1e9, description="Largest ℓ₂ norm of a gradient; a longer one is scaled down to it."
    )
    head_lr_ratio: float | None = Field(
        None,
        ge=0,
        le=1000,
        description="Times learning_rate that a classifier's head moves; unset: by task; 0: as all else. "
        "Unset is 8 for a classifier with LoRA, unless texts have one of two or three labels, or with its head alone "
        "(48 under privacy), and AdamW, and 0 otherwise. "
        "Such a head has one second moment per tensor (NovoGrad, arXiv:1905.11286), and the distance is its root mean "
        "square.",
        examples=[8.0],
    )
    proximal_mu: float = Field(
        0.0,
        ge=0,
        le=1e6,
        description="FedProx: strength μ of the pull towards the global adapter; 0: off. The loss gets "
        "μ/2 · ‖ΔW − ΔW_global‖² more, for LoRA on the products (arXiv:1812.06127).",
    )
    restricted_softmax: float = Field(
        1.0,
        ge=0,
        le=1,
        description="FedRS, for classifiers: factor on the logits of classes the site lacks; 1: off. It counts in "
        "training alone (KDD 2021).",
    )
    logit_calibration: float = Field(
        0.0,
        ge=0,
        le=1000,
        description="FedLC, for classifiers: τ by which rare classes are favoured in training; 0: off. A class of n "
        "rows has its logits lowered by τ·n^(−1/4) (arXiv:2209.00189).",
    )
    dpo_beta: float = Field(
        0.1,
        gt=0,
        le=1000,
        description="preference: β of DPO; the larger, the nearer the model stays to its base (arXiv:2305.18290).",
    )
    logit_adjustment: float = Field(
        0.0,
        ge=0,
        le=1000,
        description="For classifiers: τ, how far class frequencies are discounted in training; 0: off. Logits get "
        "τ · log of the class frequencies of the site (arXiv:2007.07314).",
    )


class EvaluationSettings(Settings):
    """When a site measures the adapter on its own validation data."""

    before: bool = Field(True, description="Measure the received adapter; this chooses the best round.")
    after: bool = Field(True, description="Measure the site's own adapter after training.")
    batch_size: int = Field(16, ge=1, le=ROWS, description="Rows per batch when measuring.")
    max_examples: int = Field(
        0,
        ge=0,
        le=MANY,
        description="Most validation rows to measure on; 0: all. A site measures on a multiple of its "
        "privacy.min_metric_rows, so that two answers never differ by a few rows.",
    )


class PersonalizeSettings(Settings):
    """An adapter of its own for each site, which trains on from the last global one and keeps the result. Off unless
    `steps` is set.
    """

    steps: int = Field(
        0,
        ge=0,
        le=STEPS,
        description="Optimizer steps that each site trains on by itself after the last round; 0: off. Before, after a "
        "third, two thirds and all of them it measures the loss on its validation rows, and keeps the adapter with "
        "the lowest as personal_adapter. Neither adapter nor loss leaves the site, which may take fewer steps.",
    )
    rate: float = Field(0.5, gt=0, le=10, description="Times learning_rate at which it does.")


class PrivacySettings(Settings):
    """Differential privacy of what each site sends, by DP-SGD (arXiv:1607.00133). Off unless `epsilon` or
    `noise_multiplier` is set.
    """

    epsilon: float | None = Field(
        None,
        gt=0,
        le=100,
        description="ε that all rounds of the job together may cost a record; unset: none is asked. Each site derives "
        "its noise from it, from its number of rows and from the job's steps.",
        examples=[8.0],
    )
    noise_multiplier: float | None = Field(
        None,
        gt=0,
        le=1000,
        description="Noise on the summed gradient of a step, in multiples of max_grad_norm, in place of epsilon.",
        examples=[1.0],
    )
    delta: float = Field(1e-5, gt=0, le=0.01, description="δ of (ε, δ): less than one in the number of records.")
    max_grad_norm: float = Field(
        1.0, gt=0, le=1e6, description="ℓ₂ norm to which the gradient of one record is clipped."
    )
    unit: Annotated[Text, StringConstraints(min_length=1)] = Field(
        ROW,
        description="Record that is protected: row, or the column that says whose row it is. Rows of one patient "
        "are clipped as one.",
        examples=["patient_id"],
    )

    @property
    def asked(self) -> bool:
        """Whether the job asks for differential privacy."""
        return self.epsilon is not None or self.noise_multiplier is not None

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if self.epsilon is not None and self.noise_multiplier is not None:
            raise ValueError("set epsilon or noise_multiplier, not both: one follows from the other")
        return self


class ClientPrivacySettings(Settings):
    """Differential privacy of each site's whole part in a job: the server clips what a site changed and adds noise to
    the mean (DP-FedAvg, arXiv:1710.06963). Off unless `epsilon` or `noise_multiplier` is set.
    """

    epsilon: float | None = Field(
        None,
        gt=0,
        le=100,
        description="ε that all rounds together may cost a site; unset: none is asked. The server derives the noise "
        "from it and from the number of rounds.",
        examples=[8.0],
    )
    noise_multiplier: float | None = Field(
        None,
        ge=1e-3,
        le=1000,
        description="Noise on the sum of a round's changes, in multiples of max_norm, in place of epsilon.",
        examples=[1.0],
    )
    delta: float = Field(1e-5, ge=1e-12, le=0.01, description="δ of (ε, δ): less than one in expected_sites.")
    max_norm: float = Field(
        1.0,
        ge=1e-6,
        le=1e6,
        description="ℓ₂ norm to which what one site changed in a round is clipped. It is taken over scale · B of all "
        "layers, which is the norm of ΔW where the rows of A are orthonormal, and over all tensors without factors.",
    )
    expected_sites: int = Field(
        0,
        ge=0,
        le=SITES,
        description="Number that the sum of the changes is divided by, however many sites answer. The noise on the "
        "mean shrinks with it.",
    )

    @property
    def asked(self) -> bool:
        """Whether the job asks for it."""
        return self.epsilon is not None or self.noise_multiplier is not None

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.epsilon is not None and self.noise_multiplier is not None:
            raise ValueError("set epsilon or noise_multiplier, not both: one follows from the other")
        if self.asked != bool(self.expected_sites):
            raise ValueError("set expected_sites, and epsilon or noise_multiplier, or none of them")
        return self


class SyntheticSettings(Settings):
    """Rows that a model wrote, beside those of a site: the job brings them as `synthetic.jsonl`. Off unless `digest` is
    set.
    """

    digest: Fingerprint = Field(
        "", description="SHA-256 of the synthetic rows that the job brings; empty: none. `nvflare-fm new` fills it in."
    )
    share: float = Field(
        0.4,
        gt=0,
        le=0.9,
        description="Largest share of a site's training rows that may be synthetic. Classes of which a site has fewest "
        "rows get them first. A site may allow less, or none.",
    )
    required: bool = Field(
        False, description="true: a site that accepts no synthetic rows does not train; false: it trains without."
    )

    @property
    def asked(self) -> bool:
        """Whether the job brings synthetic rows."""
        return bool(self.digest)


class RoundPlan(Settings):
    """What a job asks of every site. `job.settle.settle` adds what follows from it and from how adapters are merged.

    `model` and `data` are aliases. Each site defines what they stand for, never the job.
    """

    task: Name = Field(
        "causal_lm", description="Task: causal_lm, sequence_classification, …; docs/how_to/your_data.md lists them."
    )
    model: Text = Field("base", description="Alias of the base model in the sites' fm_site.yaml.")
    data: Text = Field("notes", description="Alias of the data set in the sites' fm_site.yaml.")
    fingerprint: Fingerprint = Field(
        "", description="Fingerprint that every site's base model must have; empty: the sites must agree."
    )
    quantization: Quantization = Field(
        "nf4", description="Precision of the frozen base model: nf4, fp4, int8, bf16, fp16 or fp32."
    )
    double_quant: bool = Field(
        True, description="Quantize the quantization constants of nf4 and fp4 too (QLoRA, arXiv:2305.14314)."
    )
    compute_dtype: Literal["auto", "bf16", "fp16", "fp32"] = Field(
        "auto",
        description="Precision of all computation: bf16, fp16, fp32 or auto. auto is bf16 where the GPU, or a CPU with "
        "AMX, is fast in it, and fp32 on other CPUs.",
    )
    peft: PeftSettings = Field(
        default_factory=lambda: {"method": "lora"}, description="A PEFT method and its settings."
    )
    labels: Labels = Field(
        (),
        description="Classes of a classification task, in order; names of regression's numbers.",
        examples=[["no", "yes"]],
    )
    target_mean: Numbers = Field(
        (),
        description="regression: subtracted from each number before it is learned; empty: 0.",
        examples=[[50.0]],
    )
    target_scale: Scales = Field(
        (),
        description="regression: each number is then divided by it, at all sites; empty: 1.",
        examples=[[10.0]],
    )
    max_length: int = Field(512, ge=8, le=LENGTH, description="Tokens of a text; longer texts are cut.")
    training: TrainingSettings = Field(TrainingSettings(), description="How a site trains in one round.")
    evaluation: EvaluationSettings = Field(
        EvaluationSettings(), description="When a site measures the adapter on its own validation data."
    )
    personalize: PersonalizeSettings = Field(
        PersonalizeSettings(), description="An adapter of its own for each site, after the last round."
    )
    privacy: PrivacySettings = Field(PrivacySettings(), description="Differential privacy of what each site sends.")
    synthetic: SyntheticSettings = Field(
        SyntheticSettings(), description="Rows that a model wrote, beside those of a site."
    )
    seed: int = Field(
        0,
        ge=0,
        le=SEED,
        description="Seed of the adapter's first values and of which sites are drawn. In the simulator it is that of "
        "the order of the rows as well.",
    )
    head_start: Literal["random", "features"] | None = Field(
        None,
        description="First values of a classifier's head: random, or fitted to sites' texts (features); unset: by job. "
        "With features, sites whose site files allow it (privacy.label_statistics) send sums over what the base model "
        "makes of their rows, before the first round; where none does, the head is random. Unset is features for "
        "sequence_classification, and random under privacy, client_privacy or an encrypted uplink. After Fed3R, "
        "arXiv:2402.07155.",
        examples=["features"],
    )
    uplink: Rules = Field(
        (),
        description="Transforms of what a site sends, in order, such as int8. Empty: tensors are sent as float32.",
    )
    downlink: Rules = Field(
        (), description="Transforms of the global adapter that the server sends to the sites, in order."
    )
    negotiable: Negotiable = Field(
        (),
        description="Of rank, batch_size and local_steps, those that a site may lower to its limits. Where any "
        "other setting exceeds its limits, the site refuses.",
    )
    template: Name = Field("", description="Name of the job template; a site may accept some templates only.")

    @property
    def rank(self) -> int:
        """The rank that the plan asks for; 0: the PEFT method has none, or the plan does not set it."""
        rank = self.peft.get("rank")
        return rank if isinstance(rank, int) else 0


class TaskPlan(RoundPlan):
    """A plan as it travels with a round's task, with what a site must know of how adapters are merged.

    The server settles these fields; a job cannot set them.
    """

    rest: Rest = Field("tail", description="Part of the global adapter that a site holds frozen beside what it trains.")
    factors: Factors = Field("AB", description="Factors that a site trains in this round.")
    shares: Factors = Field("AB", description="Factors that leave a site.")
    label_statistics: LabelStatistics = Field(
        (), description="What a site must report about how often its labels occur."
    )
    counts: Counts = Field((), description="What a site must report about how many rows and steps it has.")
    padded_to: int = Field(
        0,
        ge=0,
        le=WIDEST,
        description="Rank at which each site sends its pairs, at scale 1, so that they add up unread; 0: its own.",
    )
    sums: bool = Field(False, description="Whether a site answers with sums over its features, and does not train.")
    votes: int = Field(
        0,
        ge=0,
        le=CANDIDATES,
        description="Number of the job's synthetic rows that a site's own rows vote on; 0: they train instead.",
    )


class Aggregation(Settings):
    """How many adapters become one. A rule with settings is written `{rule = "name", setting = value}`."""

    merge: Rule = Field("exact", description="Merge rule; docs/reference/rules.md lists them and what goes together.")
    weigh: Rules = Field(
        ("uniform",),
        description="Weight factors of a site, multiplied, such as uniform or examples. Normalised to sum to 1.",
    )
    max_weight: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Largest share that one site may have, up to 1. Unset: twice an equal share where a guard judges "
        "whole changes, as the usual one does, because such a guard counts sites; else 1.",
    )
    guard: Rules | None = Field(
        None,
        description="Guards that limit changes far from those of the other sites; []: none; unset: by job. Unset is "
        "clip_norm, and with it geometric_median (mix = nnm, near = 1.5) where the rule adds up what all sites changed "
        "in as many steps. It is none where the server may not look: encrypted uplinks and client_privacy.",
        examples=[["clip_norm"]],
    )
    normalize_steps: bool = Field(
        False, description="FedNova: count a site's change per step, however many it took (arXiv:2007.07481)."
    )
    step: Rule | None = Field(
        None,
        description="Server step on the mean change of the sites, such as plain or adam; unset: by task. Unset is "
        "fedexp for causal_lm with a merge rule that adds changes, and plain otherwise.",
        examples=["plain"],
    )
    max_rank: int = Field(
        0,
        ge=0,
        le=WIDEST,
        description="Largest rank of the global adapter, and so of any site; 0: the largest asked of a site.",
    )
    max_staleness: int = Field(
        0,
        ge=0,
        le=1000,
        description="Rounds that an update may be late and still count; 0: late sites are called off. A late site "
        "trains on undisturbed; one that is called off starts the next round with the others.",
    )
    keep_energy: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Share of a layer's ‖ΔW‖² to keep; 1: every direction that max_rank allows.",
    )
    sigma: Literal["B", "balanced", "A"] = Field(
        "B", description="Factor that holds the singular values: B, balanced or A."
    )
    seed: int = Field(0, ge=0, le=SEED, description="Seed of the directions that fill unused rank.")
    client_privacy: ClientPrivacySettings = Field(
        ClientPrivacySettings(), description="Differential privacy of each site's whole part, by noise at the server."
    )


class RoundSettings(Settings):
    """When a round ends, and which one is the best: the settings of the controller `FedPEFT`."""

    num_rounds: int = Field(
        5, ge=1, le=1_000_000, description="Rounds of the whole federation, those before a resumed one included."
    )
    min_responses: int = Field(
        1, ge=1, le=SITES, description="Usable updates that a round needs; with fewer the job stops and says why."
    )
    deadline_s: float = Field(
        0.0, ge=0, le=A_YEAR, description="Seconds after which a round ends without the rest; 0: wait for every site."
    )
    grace_s: float = Field(
        0.0,
        ge=0,
        le=A_YEAR,
        description="Seconds a round still waits once min_responses are in; 0: wait for every site. A site that is "
        "still training when a round ends is called off; with max_staleness it trains on, and its update counts in the "
        "round in which it arrives, unless the site was still at the first round.",
    )
    key_metric: OptionalId = Field(
        "loss",
        description="Metric that chooses the best round's adapter; empty: no adapter is chosen. It is the median over "
        "the sites that were sent the adapter, which one site cannot move out of the others' range.",
    )
    key_metric_mode: Literal["min", "max"] = Field("min", description="min or max, whichever end is the best.")
    disk_offload: bool = Field(False, description="true: updates wait on the server's disk, not in its memory.")
    sites_per_round: int = Field(
        0, ge=0, le=SITES, description="Sites drawn for each round, by the plan's seed; 0: all that are connected."
    )


class VoteSettings(Settings):
    """Which candidates a vote chooses, and how long it waits: the settings of the controller `SyntheticVotes`."""

    per_label: int = Field(50, ge=1, le=CANDIDATES, description="Most candidates that are chosen of each label.")
    chance: float = Field(
        0.5,
        gt=0,
        le=0.5,
        description="Chance with which noise alone chooses a candidate for which no row voted. 0.5: more votes than "
        "none are enough; lower it where most candidates are of no use.",
    )
    min_responses: int = Field(1, ge=1, le=SITES, description="Sites that must vote; with fewer nothing is chosen.")
    deadline_s: float = Field(
        0.0, ge=0, le=A_YEAR, description="Seconds after which votes count without the rest; 0: wait for every site."
    )
    grace_s: float = Field(
        0.0,
        ge=0,
        le=A_YEAR,
        description="Seconds to wait for the rest once min_responses are in; 0: wait for every site.",
    )


def at_rank(peft: Mapping[str, Any], rank: int) -> dict[str, Any]:
    """The same PEFT settings at another rank. The scale changes with 1/√rank, as in rsLoRA (arXiv:2312.03732), so that
    a step of training changes ΔW as much at every site: without `use_rslora`, `lora_alpha` changes with √rank.
    """
    changed, was, alpha = {**peft, "rank": rank}, peft.get("rank"), peft.get("lora_alpha")
    if not peft.get("use_rslora") and isinstance(alpha, int | float) and isinstance(was, int) and was > 0:
        changed["lora_alpha"] = alpha * math.sqrt(rank / was)
    return changed  # what is no number stays, for the method to refuse


P = TypeVar("P", bound=RoundPlan)


class SiteOverrides(Settings):
    """What a job asks of one site differently from the plan. None: as the plan says."""

    rank: int | None = Field(None, ge=1, le=WIDEST, description="Rank of this site's adapter.", examples=[8])
    lora_alpha: float | None = Field(
        None,
        gt=0,
        le=1e6,
        description="Unset: it follows the rank, so that the scale changes with 1/√rank.",
        examples=[16.0],
    )
    quantization: Quantization | None = Field(
        None, description="Precision of the frozen base model: nf4, fp4, int8, bf16, fp16 or fp32.", examples=["int8"]
    )
    batch_size: int | None = Field(None, ge=1, le=ROWS, description="Rows per batch.", examples=[4])
    local_steps: int | None = Field(None, ge=1, le=STEPS, description="Optimizer steps per round.", examples=[10])
    model: Text | None = Field(None, description="Another alias in the site's fm_site.yaml.", examples=["base"])
    data: Text | None = Field(None, description="Another alias in the site's fm_site.yaml.", examples=["notes"])

    def applied(self, plan: P) -> P:
        """Apply these settings to a plan: the plan that this site carries out."""
        given = self.model_dump(exclude_none=True, exclude={"rank", "lora_alpha"})
        peft = at_rank(plan.peft, self.rank) if self.rank else dict(plan.peft)
        if self.lora_alpha:
            peft["lora_alpha"] = self.lora_alpha
        training: dict[str, Any] = {k: given.pop(k) for k in ("batch_size", "local_steps") if k in given}
        return plan.model_copy(update={**given, "peft": peft, "training": plan.training.model_copy(update=training)})
