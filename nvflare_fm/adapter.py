"""The values every stage hands on: a pair of LoRA factors, an adapter, a site's update.

Tensor names are PEFT's own saved names, so what travels is what `PeftModel.from_pretrained` reads.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from math import prod
from typing import Annotated, Any, Literal, get_args

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from .config import TaskPlan
from .errors import WireError
from .privacy.protection import Protection
from .record.site_report import Report as Report
from .untrusted import Digest, Word

BaseClass = Literal["", "nvflare_fm.site.mean_pooling.MeanPooledForSequenceClassification"]


def own_class(library: object, name: object) -> BaseClass:
    """The class of ours that a module and a name mean; empty for any other, which is never looked for."""
    return next((ours for ours in get_args(BaseClass) if ours == f"{library}.{name}"), "")


@dataclass(frozen=True)
class LoraPair:
    """The change LoRA makes to one linear layer: ΔW = scale · B @ A (LoRA, arXiv:2106.09685).

    `scale` is α/r, or α/√r with rsLoRA (arXiv:2312.03732).
    """

    A: Float[Tensor, "rank fan_in"]
    B: Float[Tensor, "fan_out rank"]
    scale: float = 1.0

    @property
    def rank(self) -> int:
        """The number of rows of A and columns of B."""
        return self.A.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(fan_out, fan_in) of the layer."""
        return self.B.shape[0], self.A.shape[1]

    @property
    def bytes(self) -> int:
        """The size of both factors."""
        return self.A.nbytes + self.B.nbytes

    def delta(self) -> Float[Tensor, "fan_out fan_in"]:
        """Compute the dense ΔW, for tests and export. The server never does."""
        return self.scale * (self.B @ self.A)

    def to(self, dtype: torch.dtype) -> "LoraPair":
        """Convert both factors to `dtype`."""
        return LoraPair(self.A.to(dtype), self.B.to(dtype), self.scale)

    def rescaled(self, scale: float) -> "LoraPair":
        """Write the same ΔW at another scale: B takes up the difference."""
        return LoraPair(self.A, self.B * (self.scale / scale), scale)


@dataclass(frozen=True)
class Description:
    """What is known of a tensor without reading it."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> "Description":
        """The description of a tensor that is at hand."""
        return cls(tuple(tensor.shape), tensor.dtype)

    @property
    def bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Described:
    """What came with the tensors of an adapter: nothing of it needs one of them to be read."""

    tensors: Mapping[str, Description]  # by PEFT name
    scales: Mapping[str, float]  # by layer
    sent: Mapping[str, Description] = field(default_factory=dict)  # what travelled, where it was encoded


@dataclass(frozen=True)
class Waiting(Description):
    """A tensor that has not been fetched yet."""

    fetch: Callable[[], Tensor]

    @classmethod
    def of(cls, tensor: "Tensor | Waiting") -> "Waiting":
        """What waits already, and a tensor that is there."""
        return tensor if isinstance(tensor, Waiting) else cls(tuple(tensor.shape), tensor.dtype, lambda: tensor)

    def to(self, dtype: torch.dtype) -> "Waiting":
        return Waiting(self.shape, dtype, lambda: self.fetch().to(dtype))


class WaitingPair(LoraPair):
    """A pair whose factors are fetched when they are first read, and live as long as the pair; all else is known."""

    def __init__(self, A: Tensor | Waiting, B: Tensor | Waiting, scale: float = 1.0) -> None:  # as LoraPair: `replace`
        self._a, self._b = Waiting.of(A), Waiting.of(B)
        object.__setattr__(self, "scale", scale)

    @cached_property
    def A(self) -> Tensor:
        return self._a.fetch()

    @cached_property
    def B(self) -> Tensor:
        return self._b.fetch()

    @property
    def rank(self) -> int:
        return self._a.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        return self._b.shape[0], self._a.shape[1]

    @property
    def bytes(self) -> int:
        return self._a.bytes + self._b.bytes

    def to(self, dtype: torch.dtype) -> LoraPair:
        return WaitingPair(self._a.to(dtype), self._b.to(dtype), self.scale)


@dataclass(frozen=True)
class Adapter:
    """All that PEFT trains: `{layer: LoraPair}`, and `{name: tensor}` for everything without factors
    (classifier head, IA³ vectors, prompt embeddings, DoRA magnitudes).

    Either mapping may load its values on access, so that a server holds one layer of a site at a time.
    """

    lora: Mapping[str, LoraPair] = field(default_factory=dict)
    dense: Mapping[str, Tensor] = field(default_factory=dict)
    described: Described | None = field(default=None, compare=False, repr=False)

    def __bool__(self) -> bool:
        return bool(self.lora or self.dense)

    @property
    def sealed(self) -> bool:
        """Whether only a site can read its values."""
        return False

    def tensors(self) -> dict[str, Tensor]:
        """Collect all tensors as `{PEFT name: tensor}`, without the scales."""
        flat = dict(self.dense)
        for layer in self.lora:
            pair = self.lora[layer]
            flat[layer + LORA_A], flat[layer + LORA_B] = pair.A, pair.B
        return flat

    def scales(self) -> dict[str, float]:
        """Collect the scale of each pair, by layer."""
        if self.described is not None:
            return {layer: float(self.described.scales[layer]) for layer in self.lora}
        return {layer: self.lora[layer].scale for layer in self.lora}

    def descriptions(self) -> Mapping[str, Description]:
        """Describe each tensor by its PEFT name, if possible without reading it."""
        if self.described is not None:
            return self.described.tensors
        return {name: Description.of(tensor) for name, tensor in self.tensors().items()}

    def bytes(self) -> int:
        """Add up the sizes of all tensors."""
        return sum(tensor.bytes for tensor in self.descriptions().values())

    def bytes_sent(self) -> int:
        """Add up the sizes of all tensors as they travelled: fewer than `bytes` where transforms compressed them."""
        sent = self.described.sent if self.described else {}
        return sum(tensor.bytes for tensor in (sent or self.descriptions()).values())


LORA_A, LORA_B = ".lora_A.weight", ".lora_B.weight"


def from_tensors(
    tensors: Mapping[str, Tensor],
    scales: Mapping[str, float],
    sender: str,
    described: Mapping[str, Description] | None = None,
) -> Adapter:
    """Make an adapter of its tensors and scales, the inverse of `Adapter.tensors` and `Adapter.scales`.

    Args:
        tensors: PEFT name → tensor; each is fetched when the adapter is read.
        scales: layer → scale.
        sender: for errors.
        described: descriptions of all tensors, if known; then a tensor is fetched for its values only.

    Returns:
        The adapter.
    Raises:
        WireError: a factor without its other half, or without a scale.
    """
    layers = {n.removesuffix(LORA_A) for n in tensors if n.endswith(LORA_A)}
    halves = {n.removesuffix(LORA_B) for n in tensors if n.endswith(LORA_B)}
    alone = layers - halves - set(scales)  # no half of a pair: a rule that shares A alone lets it travel as it is
    for layer in sorted((layers ^ halves) - alone):
        raise WireError(
            f"{sender} sent only one factor of {layer!r}; both lora_A and lora_B must travel", code="half_a_pair"
        )
    layers -= alone
    for layer in sorted(layers - set(scales)):
        raise WireError(f"{sender} sent no scale for {layer!r}; update nvflare_fm at that site", code="no_scale")
    for layer in sorted(set(scales) - layers):
        raise WireError(f"{sender} sent a scale for {layer!r} and no pair", code="scale_without_pair")
    dense = set(tensors) - {layer + half for layer in layers for half in (LORA_A, LORA_B)}

    return Adapter(
        Lazy(layers, partial(_pair, tensors, scales, described)),
        Lazy(dense, tensors.__getitem__),
        None if described is None else Described(described, scales),
    )


def _pair(
    tensors: Mapping[str, Tensor],
    scales: Mapping[str, float],
    described: Mapping[str, Description] | None,
    layer: str,
) -> LoraPair:
    a, b, scale = layer + LORA_A, layer + LORA_B, float(scales[layer])
    if described is None:
        return LoraPair(tensors[a], tensors[b], scale)
    first, second = (
        Waiting(of.shape, of.dtype, partial(tensors.__getitem__, n)) for n in (a, b) for of in [described[n]]
    )
    return WaitingPair(first, second, scale)


class Lazy(Mapping[str, Any]):
    """A mapping in name order whose values are made anew at each access, and not kept."""

    def __init__(self, names: Any, load: Any) -> None:
        self._names, self._load = dict.fromkeys(sorted(names)), load

    def __getitem__(self, name: str) -> Any:
        if name not in self:
            raise KeyError(name)
        return self._load(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Any:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@dataclass(frozen=True)
class Manifest:
    """What an adapter belongs to: base model, task, PEFT method, labels. It travels with every adapter, both ways.

    The rest of PEFT's configuration follows from the plan and the names of the tensors (`export.peft_config`).
    """

    base: Word  # fingerprint of the base model's configuration and weights
    task: Word  # registered name of the task
    peft: Word  # registered name of the PEFT method
    base_class: BaseClass = ""  # of the base model, where it is one of ours; empty: transformers' own
    labels: Annotated[tuple[Annotated[str, Field(strict=True, max_length=1000)], ...], Field(max_length=100_000)] = ()
    tokenizer: Digest = ""  # of the ids that the base model's tokenizer gives; empty: not known
    chat_template: Digest = ""  # of its conversations, where the task has any


@dataclass(frozen=True)
class AdapterUpdate:
    """One site's answer to one round."""

    site: str
    adapter: Adapter
    manifest: Manifest
    report: Report
    start: Adapter | None = None  # the global adapter it was trained from, where that is an earlier round's
    staleness: int = 0  # rounds since that one was sent
    protection: Protection | None = None  # how it is protected; None: it is not


@dataclass(frozen=True)
class RoundTask:
    """What the server sends: the plan, and the global adapter (empty before the first round).

    No `export.folder.Saved`: it always has a plan, and its round is the one to come, not the one that made the adapter.
    """

    plan: TaskPlan
    adapter: Adapter = Adapter()
    manifest: Manifest | None = None
    round: int = 0
    total_rounds: int = 1
    lowered: tuple[str, ...] = ()  # what the site's gate has given less of already than the server asked

    @property
    def over(self) -> bool:
        """Whether all rounds are over, and the adapter is the last."""
        return self.round == self.total_rounds
