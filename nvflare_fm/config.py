"""Every setting: frozen, typed, documented beside the field. A key nobody reads is an error.

After pydantic's own way of saying what is wrong, with the nearest known key added.
"""

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from .errors import ConfigError
from .registry import nearest

Quantization = Literal["nf4", "fp4", "int8", "bf16", "fp16", "fp32"]
_one = BeforeValidator(lambda v: (v,) if isinstance(v, str) else v)
Rest = Literal["none", "tail", "all"]
Factors = Literal["AB", "A", "B"]
Names = Annotated[tuple[str, ...], _one]
LabelStatistics = Annotated[tuple[Literal["skew"], ...], _one]
Rule = str | Mapping[str, Any]  # by name, or {"rule": name, setting: value}
Rules = Annotated[tuple[Rule, ...], BeforeValidator(lambda v: (v,) if isinstance(v, str | Mapping) else v)]
Negotiable = Annotated[tuple[Literal["rank", "batch_size", "local_steps"], ...], _one]


class Settings(BaseModel):
    """A frozen group of settings that refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @classmethod
    def read(cls, values: Mapping[str, Any], where: str) -> Self:
        """Validates `values`.

        Raises:
            ConfigError: names `where`, the key, what is wrong with it and the nearest known key.
        """
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            raise ConfigError(f"{where}: " + "; ".join(cls._explain(e) for e in error.errors())) from None

    @classmethod
    def _explain(cls, error: Any) -> str:
        path = [str(part) for part in error["loc"]]
        if error["type"] == "missing":  # its input is the whole group, which is not for telling
            return f"{'.'.join(path)}: {error['msg']}"
        if error["type"] != "extra_forbidden":
            return f"{'.'.join(path)}: {error['msg']}, got {error['input']!r}"
        group: Any = cls
        for part in path[:-1]:
            group = _inside(group, part)
        known = list(group.model_fields)
        return f"unknown setting {'.'.join(path)!r}; {nearest(path[-1], known)}known: {sorted(known)}"


def _inside(group: Any, part: str) -> Any:
    """The type of `part` of a group of settings, or of the values of a mapping from aliases to such groups."""
    if isinstance(group, type) and issubclass(group, BaseModel):
        return group.model_fields[part].annotation
    return get_args(group)[-1]


class TrainingSettings(Settings):
    """How a site trains in one round. Names are those of `transformers.TrainingArguments` where it has them."""

    local_steps: int = Field(20, ge=0, description="optimizer steps a round; 0: count local_epochs instead")
    local_epochs: float = Field(1.0, gt=0, description="passes over the site's data a round, where local_steps is 0")
    batch_size: int = Field(8, ge=1, description="examples per step and process")
    gradient_accumulation_steps: int = Field(1, ge=1)
    gradient_checkpointing: bool = Field(False, description="less memory for about a third more time")
    learning_rate: float = Field(1e-3, gt=0)
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="over all rounds of the federation, not over each"
    )
    warmup_ratio: float = Field(0.0, ge=0, le=1, description="share of all steps of the federation")
    optim: Literal["adamw_torch", "sgd", "paged_adamw_8bit"] = "adamw_torch"
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    head_lr_ratio: float | None = Field(
        None,
        ge=0,
        description="a head moves this many times learning_rate, in the root mean square and by one second moment a "
        "tensor (NovoGrad, arXiv:1905.11286); 0: like all else; unset: 8 for classifiers with LoRA and Adam",
    )
    proximal_mu: float = Field(
        0.0,
        ge=0,
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
        description="FedLC (arXiv:2209.00189): τ; logits are lowered by τ·n^(−1/4) in training",
    )
    logit_adjustment: float = Field(
        0.0,
        ge=0,
        description="logit adjustment (arXiv:2007.07314): τ; a site adds τ·log of its class frequencies in training",
    )


class EvaluationSettings(Settings):
    """When a site measures the adapter on its own validation data."""

    before: bool = Field(True, description="the adapter received: what chooses the best round")
    after: bool = Field(True, description="the adapter after local training")
    batch_size: int = Field(16, ge=1)
    max_examples: int = Field(0, ge=0, description="0: all of them")


class RoundPlan(Settings):
    """All that the server asks of a site in a round. Travels with every task: one source of truth.

    `model` and `data` are aliases. What they stand for is the site's to say, never the job's.
    """

    task: str = Field("causal_lm", description="causal_lm, sequence_classification, token_classification")
    model: str = Field("base", description="alias in the site's models")
    data: str = Field("notes", description="alias in the site's data")
    fingerprint: str = Field("", description="of the base model all sites must hold; empty: the sites must agree")
    quantization: Quantization = "nf4"
    double_quant: bool = Field(True, description="quantize the quantization constants too (QLoRA, arXiv:2305.14314)")
    compute_dtype: Literal["auto", "bf16", "fp16", "fp32"] = Field(
        "auto", description="auto: bf16 where the GPU, or a CPU with AMX, is fast in it; fp32 on other CPUs"
    )
    peft: Mapping[str, Any] = Field(
        default_factory=lambda: {"method": "lora"}, description="a PEFT method and its settings"
    )
    labels: Names = Field((), description="classes, in order, for the classification tasks")
    max_length: int = Field(512, ge=8, description="tokens; longer texts are cut")
    rest: Rest = Field(
        "tail",
        description="what of the global adapter rides along frozen; from the merge rule, as the next two",
    )
    factors: Factors = Field("AB", description="those a site trains in this round")
    shares: Factors = Field("AB", description="those that leave a site")
    label_statistics: LabelStatistics = Field(
        (), description="what a site is asked to tell of how often its labels occur; follows from the weights"
    )
    training: TrainingSettings = TrainingSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    seed: int = Field(0, ge=0)
    negotiable: Negotiable = Field(
        (), description="of rank, batch_size and local_steps, what a site may lower to its limits; the rest it refuses"
    )
    template: str = Field("", description="the job template this plan came from; sites may welcome some and not others")


DERIVED = ("rest", "factors", "shares", "label_statistics")  # of a plan: they follow from how adapters are merged


class Aggregation(Settings):
    """How many adapters become one. A rule with settings is written `{rule = "name", setting = value}`."""

    merge: str = Field("exact", description="a merge rule")
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
    max_rank: int = Field(0, ge=0, description="of the global adapter; 0: the plan's rank")
    max_staleness: int = Field(
        0,
        ge=0,
        description="an answer counts up to so many rounds late, and its site trains on undisturbed; 0: a round's end "
        "calls off who is still at it",
    )
    keep_energy: float = Field(
        1.0, gt=0, le=1, description="a layer keeps no more directions than hold this share of ‖ΔW‖²"
    )
    sigma: Literal["B", "balanced", "A"] = Field("B", description="the factor that holds the singular values")
    seed: int = Field(0, ge=0)


def at_rank(peft: Mapping[str, Any], rank: int) -> dict[str, Any]:
    """The same PEFT settings at another rank. The scale changes with 1/√rank, as in rsLoRA (arXiv:2312.03732), so that
    a step of training changes ΔW as much at every site: without `use_rslora`, `lora_alpha` changes with √rank.
    """
    changed = {**peft, "rank": rank}
    if "rank" in peft and "lora_alpha" in peft and not peft.get("use_rslora"):
        changed["lora_alpha"] = peft["lora_alpha"] * math.sqrt(rank / peft["rank"])
    return changed


class SiteOverrides(Settings):
    """What a job asks of one site differently from the plan. None: as the plan says."""

    rank: int | None = Field(None, ge=1)
    lora_alpha: float | None = Field(
        None, gt=0, description="else it follows the rank, so that the scale changes with 1/√rank"
    )
    quantization: Quantization | None = None
    batch_size: int | None = Field(None, ge=1)
    local_steps: int | None = Field(None, ge=1)
    model: str | None = None
    data: str | None = None

    def applied(self, plan: RoundPlan) -> RoundPlan:
        """The plan as this site is to carry it out."""
        given = self.model_dump(exclude_none=True, exclude={"rank", "lora_alpha"})
        peft = at_rank(plan.peft, self.rank) if self.rank else dict(plan.peft)
        if self.lora_alpha:
            peft["lora_alpha"] = self.lora_alpha
        training: dict[str, Any] = {k: given.pop(k) for k in ("batch_size", "local_steps") if k in given}
        return plan.model_copy(update={**given, "peft": peft, "training": plan.training.model_copy(update=training)})
