"""DP-SGD (arXiv:1607.00133): what a step makes of any one record is bounded, and covered by noise.

A step draws each record with the same probability, independently (Poisson sampling), takes the mean gradient of each
record's rows, clips it, adds all up, adds Gaussian noise once, and divides by the number of records that it expects. A
step that draws no record is noise alone. The order of a plan's rows, and its seed, play no part (see `chance`).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...adapter import RoundTask
from ...job.private import check_delta, rows_per_step, sample_rate
from ...privacy import accountant, chance
from ...privacy.events import Event
from ...privacy.protection import Protection
from .distributed import gather, processes, sum_once
from .fit import LocalTrainer, diverged

if TYPE_CHECKING:
    from .per_sample import PerSample

_ROUNDING = 1 - 1e-5  # of the clipping norm, so that no rounding makes a clipped gradient longer


@dataclass(frozen=True)
class Private:
    """What DP-SGD must know of a site and its job, settled before a round.

    Args:
        records: the numbers of each record's rows.
        rate: the probability with which a step sees a record.
        expected: how many records a step sees in the mean.
        noise_multiplier: σ, in clipping norms.
        clip_norm: ℓ₂ norm to which a record's gradient is clipped.
    """

    records: tuple[tuple[int, ...], ...]
    rate: float
    expected: float
    noise_multiplier: float
    clip_norm: float
    protection: Protection

    def seen(self, rows: int, steps: int) -> int:
        """How many of `rows` different rows `steps` steps are to see: their expectation, rounded down."""
        return int(rows * (1 - (1 - self.rate) ** steps))


def settle(task: RoundTask, units: tuple[int, ...], world: int) -> Private:
    """Derive a round's noise from the plan, from the site's number of records and from the steps of the whole job.

    Args:
        units: for each row, the number of the record it belongs to.
        world: processes that train together.
    Raises:
        ConfigError: δ is too large for so few records, or no noise is enough.
    """
    plan, settings = task.plan, task.plan.privacy
    rows: dict[int, list[int]] = {}
    for row, unit in enumerate(units):
        rows.setdefault(unit, []).append(row)
    check_delta(plan, len(rows))
    rate, steps = sample_rate(plan, len(rows), world), plan.training.local_steps
    noise = settings.noise_multiplier
    if noise is None:
        assert settings.epsilon is not None
        noise = noise_multiplier(settings.epsilon, settings.delta, rate, steps * max(1, task.total_rounds))
    return Private(
        records=tuple(map(tuple, rows.values())),
        rate=rate,
        expected=min(rows_per_step(plan, world), len(rows)),
        noise_multiplier=noise,
        clip_norm=settings.max_grad_norm,
        protection=Protection("dp_sgd", plan.data, settings.unit, settings.delta, (Event(noise, rate, steps),)),
    )


@lru_cache(maxsize=1024)
def noise_multiplier(epsilon: float, delta: float, rate: float, steps: int) -> float:
    """As `accountant.noise_multiplier`, which takes seconds, for the rounds of a job."""
    return accountant.noise_multiplier(epsilon, delta, rate, steps)


def draw(private: Private) -> list[tuple[int, ...]]:
    """The rows of each record that a step sees, of the share of this process. All processes must ask."""
    drawn: list[int] | None = None
    if processes()[0] == 0:
        drawn = chance.happens(len(private.records), private.rate).tolist()
    rank, world = processes()
    drawn = gather(drawn)[0] or []
    return [private.records[number] for number in drawn[rank::world]]


class PrivateTrainer(LocalTrainer):
    """A `LocalTrainer` whose every step is one of DP-SGD.

    Args:
        private: see `settle`.
    """

    def __init__(self, *args: Any, private: Private, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.private, self.mine = private, 0  # tokens that this process has trained on
        self.last_loss = 0.0
        self.per_sample: PerSample | None = None
        if self.accelerator.scaler is not None:  # gradients are scaled in `PerSample`, or noise would be scaled back
            self.accelerator.scaler = torch.amp.GradScaler(self.args.device.type, enabled=False)

    @property
    def tokens(self) -> int:
        return sum(gather(self.mine))

    def check(self, loss: float) -> None:
        """Look at what was trained, which may be known: the loss may not."""
        if not all(bool(p.isfinite().all()) for p in self.model.parameters() if p.requires_grad):
            raise diverged()

    def get_train_dataloader(self) -> Any:
        return _Steps(self.private, self.args.max_steps)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Any], Any]:
        return [next(epoch_iterator)], None

    def floating_point_ops(self, inputs: Any) -> int:
        return 0

    def train(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().train(*args, **kwargs)
        finally:
            if self.per_sample is not None:
                self.per_sample.close()

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Take the noised mean of the clipped gradients as the gradient of all that is trained.

        Args:
            inputs: the rows of each record that this process sees in the step.
        """
        model.train()
        if self.per_sample is None:  # here the model is on its device, with its adapter and in its precision
            from .per_sample import PerSample  # and Opacus, which takes a second to load

            tried = [self.train_dataset[row] for row in range(min(2, len(self.train_dataset)))]
            self.per_sample = PerSample(self.model, self.base, self.task.plan, tried)
        per_sample, trained = self.per_sample, self.per_sample.trained
        losses: list[float] = []

        def take(numbers: list[int]) -> list[Tensor]:
            rows = [self.train_dataset[number] for number in numbers]
            gradients = per_sample(rows)
            self.mine += sum(len(row["input_ids"]) for row in rows)
            losses.append(per_sample.last_loss)
            return gradients

        start = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in trained]
        summed = clipped_sum(take, inputs, self._at_once(inputs), self.private.clip_norm, start)
        mean = sum_once(torch.cat([each.flatten() for each in summed]), partial(noised_mean, private=self.private))
        for parameter, gradient in zip(trained, mean.split([p.numel() for p in trained]), strict=True):
            parameter.grad = gradient.view_as(parameter).clone()
        self.last_loss = sum(losses) / len(losses) if losses else self.last_loss  # a step without a row has none
        return torch.tensor(self.last_loss, device=self.args.device)

    def _at_once(self, records: list[tuple[int, ...]]) -> int:
        """How many rows are taken at a time: a batch, and up to twice as many where their texts are so short that they
        take no more memory. Half of all steps draw more than a batch.
        """
        plan = self.task.plan
        longest = max((len(self.train_dataset[row]["input_ids"]) for rows in records for row in rows), default=1)
        positions = plan.training.batch_size * plan.max_length * self.base.task.promises.texts_per_row
        return max(plan.training.batch_size, min(2 * plan.training.batch_size, positions // longest))


class _Steps:
    """The records of each step, drawn when it begins, in the place of a DataLoader."""

    def __init__(self, private: Private, steps: int) -> None:
        self.private, self.steps = private, steps

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[tuple[int, ...]]]:
        return (draw(self.private) for _ in range(self.steps))


def clipped_sum(
    take: Callable[[list[int]], list[Tensor]],
    records: Sequence[Sequence[int]],
    batch_size: int,
    clip_norm: float,
    start: list[Tensor],
) -> list[Tensor]:
    """Add up the records' gradients, each the mean of its rows' and clipped, a batch of rows at a time.

    Args:
        take: gives, for the numbers of some rows, each row's gradient: for each parameter, (rows, *its shape).
        records: the numbers of each record's rows.
        batch_size: rows at a time, at most; it changes the memory that is needed, and nothing else.
        start: what is added to: for each parameter, zeros of its shape.
    Returns:
        For each parameter, the sum: no record has moved it by more than `clip_norm`, over all parameters together.
    """
    rows = [(record, row) for record, its_rows in enumerate(records) for row in its_rows]
    at_once = math.ceil(len(rows) / max(1, math.ceil(len(rows) / batch_size)))  # batches alike, no last one of a few
    summed, begun = start, None  # begun: the gradient of a record whose other rows come in the next batch
    for first in range(0, len(rows), max(1, at_once)):
        batch = rows[first : first + at_once]
        places = [record for record, _ in batch]
        found = _by_record(take([row for _, row in batch]), places, [1 / len(records[place]) for place in places])
        if begun is not None:
            found = [torch.cat([each[:1] + more, each[1:]]) for each, more in zip(found, begun, strict=True)]
        goes_on = first + at_once < len(rows) and rows[first + at_once][0] == places[-1]
        whole = len(found[0]) - goes_on
        begun = [each[whole:] for each in found] if goes_on else None
        more = clipped([each[:whole] for each in found], clip_norm)
        summed = [into + each for into, each in zip(summed, more, strict=True)]
    return summed


def _by_record(gradients: list[Tensor], places: list[int], shares: list[float]) -> list[Tensor]:
    """Σ of each record's rows, each row times its share: for each parameter, (records, *its shape).

    Args:
        gradients: for each parameter, (rows, *its shape).
        places: of each row, its record's; rows of one stand together.
    """
    if set(shares) == {1.0}:
        return gradients
    number = {place: i for i, place in enumerate(dict.fromkeys(places))}
    into = torch.tensor([number[place] for place in places])
    found = []
    for gradient in gradients:
        share = torch.tensor(shares, device=gradient.device).view(-1, *[1] * (gradient.ndim - 1))
        records = gradient.new_zeros(len(number), *gradient.shape[1:])
        found.append(records.index_add_(0, into.to(gradient.device), gradient * share))
    return found


def clipped(gradients: list[Tensor], norm: float) -> list[Tensor]:
    """Σ over records of their gradients, each scaled down to `norm` over all parameters together.

    A record whose gradient is not finite counts as none: it may not stop the round either, for that would tell of it.
    """
    squares = torch.stack([gradient.flatten(1).square().sum(1) for gradient in gradients]).sum(0)
    finite = squares.isfinite()
    if not bool(finite.all()):
        gradients = [g.where(finite.view(-1, *[1] * (g.ndim - 1)), torch.zeros_like(g)) for g in gradients]
        squares = squares.where(finite, torch.zeros_like(squares))
    factors = (norm * _ROUNDING / squares.sqrt().clamp(min=1e-30)).clamp(max=1.0)
    return [torch.tensordot(factors, gradient, dims=1) for gradient in gradients]


def noised_mean(summed: Tensor, private: Private) -> Tensor:
    """(sum + noise) / expected number of records, rounded to float32 when the noise is in."""
    noise = chance.normal(summed.numel()).to(summed.device)
    return ((summed.double() + private.noise_multiplier * private.clip_norm * noise) / private.expected).float()
