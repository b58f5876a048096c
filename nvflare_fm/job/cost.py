"""What a job costs a site: memory, seconds, bytes a round, before anything runs. Plain arithmetic on numbers.

Bytes are exact. Memory is an estimate, held against real training in docs/benchmarks.md; its activations follow
Korthikanti et al. (arXiv:2205.05198), for a base model that is frozen.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil

import torch

from .. import transforms
from ..adapter import LORA_A, LORA_B, Description
from ..config import RoundPlan, Rule, TaskPlan
from ..transforms import Chain
from .tasks import promises

FLOAT32 = 4  # bytes of a number in an adapter, at the site and in a message
_BITS = {"nf4": 4, "fp4": 4, "int8": 8, "bf16": 16, "fp16": 16, "fp32": 32}
_BLOCK, _SECOND_BLOCK = 64, 256  # bitsandbytes keeps a constant per block, and with double quantization one per 256
_PER_WIDTH = {4: 8, 2: 12.5}  # copies of a block's width kept, by the bytes of a number: norms keep some in float32
_PER_INNER, _PER_SCORE, _RECOMPUTED = 2, 2.6, 1.75  # copies, and blocks' worth that a recomputed one takes
_PER_LOGIT, _PER_PICKED_LOGIT = 3, 7  # copies a loss makes, and one that picks what is learned from all of them
_MEASURED_WIDTH, _MEASURED_INNER, _MEASURED_LOGIT = 12, 2, 2.5  # copies held at once where none is kept
LOGITS_AT_ONCE = 2**26  # of a language model whose head can answer for some positions at a time
MEASURED_AT_ONCE = 2**13  # positions of texts that are measured
_NOISED = 7  # numbers of four bytes beside a gradient: sums, and noise in float64
_OPTIMIZER = {"adamw_torch": 8, "sgd": 0, "paged_adamw_8bit": 2}  # bytes of state for a trained number


@dataclass(frozen=True)
class AdapterShape:
    """What of a model is trained."""

    layers: Mapping[str, tuple[int, int]]  # layer with factors → (fan_out, fan_in)
    dense: tuple[int, ...] = ()  # numbers of each tensor without factors: heads, magnitudes, prompts
    whole: tuple[str, ...] = ()  # modules of the base model that are trained whole
    embeddings: tuple[str, ...] = ()  # modules it trains, whole or with factors, that embed words or answer with words
    below: bool = True  # whether anything is trained below what the task's class puts on top

    def numbers(self, rank: int) -> int:
        return sum(self.dense) + rank * sum(fan_out + fan_in for fan_out, fan_in in self.layers.values())

    def trained(self, rank: int, factors: str) -> int:
        """How many numbers are trained at once, where of each pair only `factors` are."""
        sides = [("A" in factors) * fan_in + ("B" in factors) * fan_out for fan_out, fan_in in self.layers.values()]
        return sum(self.dense) + rank * sum(sides)

    def size(self, rank: int, chain: Chain | None = None, shares: str = "AB", summed: bool = False) -> int:
        """Bytes of its tensors in a message.

        Args:
            chain: the transforms they go through; None: none.
            shares: the factors that travel.
            summed: of the sum that the server makes of such messages without reading them.
        """
        found: Mapping[str, Description] = self._described(rank, shares)
        chain = chain or Chain()
        last = chain.encryption if summed else None
        found = last.summed(chain.inner.described(found)) if last else chain.described(found)
        return sum(each.bytes for each in found.values())

    def _described(self, rank: int, shares: str) -> dict[str, Description]:
        shapes: dict[str, tuple[int, ...]] = {f"dense{place}": (numbers,) for place, numbers in enumerate(self.dense)}
        for name, (fan_out, fan_in) in self.layers.items():
            shapes |= {name + LORA_A: (rank, fan_in)} if "A" in shares else {}
            shapes |= {name + LORA_B: (fan_out, rank)} if "B" in shares else {}
        return {name: Description(shape, torch.float32) for name, shape in shapes.items()}


@dataclass(frozen=True)
class BaseShape:
    """What must be known of a base model to tell the memory it takes."""

    quantized: int  # numbers in layers that are quantized, where the plan quantizes
    rows: int  # outputs of those layers
    kept: int  # numbers in all else: embeddings, norms, heads
    depth: int  # blocks
    hidden: int  # width of a block
    inner: int  # outputs of its widest layers together
    heads: int  # of attention whose scores are kept, as dropout on them forces it where there is no fused kernel
    answers: int  # logits for each position, or for each text
    positions: int | None = None  # that it has a row for; None: it looks none up
    context: int = 0  # positions it was trained for; 0: not known
    stacked: int = 0  # numbers of several layers in one tensor, such as experts: those are never quantized
    head_is_apart: bool = False  # logits can be made of some positions at a time

    def size(self, plan: RoundPlan) -> int:
        """Bytes of the frozen weights."""
        width = number_width(plan)
        if plan.quantization in ("bf16", "fp16", "fp32"):
            return _BITS[plan.quantization] // 8 * (self.quantized + self.kept)
        if plan.quantization == "int8":
            return self.quantized + FLOAT32 * self.rows + width * self.kept
        constants = 1 / _BLOCK + FLOAT32 / _BLOCK / _SECOND_BLOCK if plan.double_quant else FLOAT32 / _BLOCK
        return ceil(self.quantized * (0.5 + constants)) + width * self.kept


def positions_at_once(words: int) -> int:
    """How many positions a language model's head answers for at a time."""
    return max(1, LOGITS_AT_ONCE // max(1, words))


def texts_at_once(batch_size: int, length: int) -> int:
    """How many texts of a batch are measured at a time: a large GPU is busy with less than it could hold."""
    return min(batch_size, max(1, MEASURED_AT_ONCE // length))


def remarks(base: BaseShape, plan: RoundPlan) -> list[str]:
    """What of a base model a plan does not treat as one may think.

    Args:
        plan: as a site is to carry it out.
    Returns:
        A sentence each: what is not quantized, texts longer than those the model was trained for, and logits that are
        held whole.
    """
    found = []
    if plan.quantization in ("nf4", "fp4", "int8") and base.quantized + base.kept:
        share = base.kept / (base.quantized + base.kept)
        found.append(f"{share:.0%} of the base model's numbers are not quantized: embeddings, norms and heads")
        if base.stacked:
            gib = number_width(plan) * base.stacked / 2**30
            found[-1] += f", and its experts, which are not adapted either ({gib:.2g} GiB)"
    if base.positions is None and 0 < base.context < plan.max_length:
        found.append(
            f"the base model was trained for texts of {base.context} tokens, max_length {plan.max_length} is more"
        )
    if promises(plan.task).learns_text and not base.head_is_apart:
        found.append("the base model's head answers for all positions at once, so a step holds all their logits")
    return found


def number_width(plan: RoundPlan) -> int:
    """Bytes of a number the model computes in. Under quantization `auto` is taken for bf16, as on any current GPU."""
    kind = plan.compute_dtype if plan.compute_dtype != "auto" else plan.quantization
    return _BITS[kind] // 8 if kind in ("fp16", "bf16", "fp32") else 2


def trained_bytes(shape: AdapterShape, plan: TaskPlan, rank: int, widest: int) -> int:
    """Memory of what is trained: its values, gradients and optimizer state, what FedProx and differential privacy keep,
    and the directions of the global adapter that ride along frozen.
    """
    state = FLOAT32 * 2 + _OPTIMIZER[plan.training.optim] + (FLOAT32 if plan.training.proximal_mu else 0)
    beside = {"none": 0, "tail": max(0, widest - rank), "all": widest}[plan.rest]
    if plan.privacy.asked:  # a gradient for each row of two batches of short texts, their sum, and noise in float64
        state += FLOAT32 * (2 * plan.training.batch_size * promises(plan.task).texts_per_row + _NOISED)
    return shape.numbers(rank) * state + FLOAT32 * (shape.numbers(beside) - sum(shape.dense))


def activation_bytes(base: BaseShape, adapter: AdapterShape, plan: RoundPlan) -> int:
    """What a step keeps for the way back, if all its texts are as long as `max_length`, half a block's worth that the
    way back itself takes, and the logits. With checkpointing, the blocks' inputs, and the logits or else one block.
    """
    texts, width = plan.training.batch_size * promises(plan.task).texts_per_row, number_width(plan)
    positions = texts * plan.max_length
    if not adapter.below:  # no way back leads through the blocks
        passing = width * (_MEASURED_WIDTH * base.hidden + _MEASURED_INNER * base.inner)
        return round(positions * passing + FLOAT32 * _PER_PICKED_LOGIT * _logits(base, plan, texts))
    per_width = _PER_WIDTH[width] * base.hidden
    block = width * (per_width + _PER_INNER * base.inner + _PER_SCORE * base.heads * plan.max_length)
    if plan.peft.get("lora_dropout"):
        inputs = sum(fan_in for _, fan_in in adapter.layers.values()) / max(1, base.depth)
        block += (width + 1) * inputs  # what is left of them, and which were dropped
    copies = _PER_LOGIT if base.head_is_apart else _PER_PICKED_LOGIT
    logits = FLOAT32 * copies * _logits(base, plan, texts)
    if plan.training.gradient_checkpointing:
        inputs = width * base.depth * base.hidden
        return round(positions * inputs + max(_RECOMPUTED * block * positions, logits))
    return round((base.depth + 0.5) * block * positions + logits)


def measuring_bytes(base: BaseShape, plan: RoundPlan) -> int:
    """What it takes to measure a batch, if all its texts are as long as `max_length`."""
    of_row = promises(plan.task).texts_per_row
    texts = of_row * texts_at_once(plan.evaluation.batch_size, of_row * plan.max_length)
    block = number_width(plan) * (_MEASURED_WIDTH * base.hidden + _MEASURED_INNER * base.inner)
    logits = FLOAT32 * _MEASURED_LOGIT * _logits(base, plan, texts)
    return round(max(texts * plan.max_length * block, logits))


def _logits(base: BaseShape, plan: RoundPlan, texts: int) -> int:
    """How many are held at once."""
    positions = texts * plan.max_length if promises(plan.task).per_token else texts
    at_once = positions_at_once(base.answers) if base.head_is_apart else positions
    return base.answers * min(positions, at_once)


@dataclass(frozen=True)
class Cost:
    """Of one site. None: not known."""

    site: str
    rank: int
    quantization: str
    rows_per_step: int
    steps: int | None  # a round
    seconds: float | None  # of training, a round
    bytes_down_first: int | None  # in the first round
    bytes_down: int | None  # in each round after it
    bytes_up: int | None  # a round
    base_bytes: int | None  # memory of the frozen weights
    trained_bytes: int | None  # of the adapter, and of its gradients and optimizer state where it is trained
    activation_bytes: int | None  # at most, of a step or of measuring
    rank_that_fits: int | None  # the largest, up to that of the global adapter, in the memory the site has; 0: none

    @property
    def memory_bytes(self) -> int | None:
        parts = (self.base_bytes, self.trained_bytes, self.activation_bytes)
        return sum(part for part in parts if part is not None) if None not in parts else None


def cost(
    site: str,
    plan: TaskPlan,
    processes: int,
    widest: int,
    starts_at: int,
    adapter: AdapterShape | None,
    base: BaseShape | None,
    seconds_per_step: float | None,
    memory_bytes: float | None,
    trains: bool,
) -> Cost:
    """Estimate what a plan costs one site.

    Args:
        plan: as this site is to carry it out.
        processes: trainer processes; memory is that of one.
        widest: rank of the global adapter.
        starts_at: bytes of the adapter the job starts from; 0: none.
        memory_bytes: that the site has; None: not known.
        trains: otherwise the adapter comes once and metrics go back.
    """
    training, rank = plan.training, plan.rank
    steps = (training.local_steps or None) if trains else 0
    return Cost(
        site=site,
        rank=rank,
        quantization=plan.quantization,
        rows_per_step=training.batch_size * training.gradient_accumulation_steps * processes,
        steps=steps,
        seconds=seconds_per_step * steps if seconds_per_step is not None and steps else None,
        bytes_down_first=starts_at,
        bytes_down=(_received(adapter, widest, plan) if adapter else None) if trains else starts_at,
        bytes_up=(_sent(adapter, plan.padded_to or rank, plan, plan.uplink) if adapter else None) if trains else 0,
        base_bytes=base.size(plan) if base else None,
        trained_bytes=_held_bytes(adapter, plan, rank, widest, trains) if adapter else None,
        activation_bytes=_most_bytes(base, adapter, plan, trains) if base and adapter else None,
        rank_that_fits=(
            rank_that_fits(memory_bytes, base, adapter, plan, widest)
            if memory_bytes is not None and base and adapter and adapter.layers and trains
            else None
        ),
    )


def rank_that_fits(memory_bytes: float, base: BaseShape, adapter: AdapterShape, plan: TaskPlan, widest: int) -> int:
    """The largest rank, up to that of the global adapter, at which a site trains in its memory; 0: not even at 1."""
    left = memory_bytes - base.size(plan) - _most_bytes(base, adapter, plan)
    return bisect_right(range(1, widest + 1), left, key=lambda rank: trained_bytes(adapter, plan, rank, widest))


def _held_bytes(adapter: AdapterShape, plan: TaskPlan, rank: int, widest: int, trains: bool) -> int:
    return trained_bytes(adapter, plan, rank, widest) if trains else adapter.size(widest)


def _most_bytes(base: BaseShape, adapter: AdapterShape, plan: RoundPlan, trains: bool = True) -> int:
    measures = not trains or plan.evaluation.before or plan.evaluation.after
    return max(activation_bytes(base, adapter, plan) if trains else 0, measuring_bytes(base, plan) if measures else 0)


def _received(adapter: AdapterShape, widest: int, plan: TaskPlan) -> int:
    """Bytes of the global adapter on its way: through its transforms, or as the sum of what was encrypted."""
    uplink = transforms.read(plan.uplink, "plan")
    if uplink.encrypts:
        return adapter.size(widest, uplink, plan.shares, summed=True)
    return _sent(adapter, widest, plan, plan.downlink)


def _sent(adapter: AdapterShape, rank: int, plan: TaskPlan, entries: Sequence[Rule]) -> int:
    """Bytes of what travels, of the factors that do, after its transforms."""
    return adapter.size(rank, transforms.read(entries, "plan"), plan.shares)
