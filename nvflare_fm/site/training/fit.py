"""One round of local training with transformers' Trainer.

Schedules run over the whole federation, data are seen in passes that continue from round to round, and FedProx
(arXiv:1812.06127) pulls towards the global adapter where the plan asks for it. TRL's SFTTrainer is not used: it drops
fully masked rows without a word and makes the adapter bf16.
"""

import hashlib
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
from datasets import Dataset
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, get_scheduler

from ...adapter import RoundTask
from ...config import RoundPlan, TrainingSettings
from ...errors import TrainingError
from ..model.attach import heads
from ..model.base_model import BaseModel
from . import memory
from .class_shift import ClassShift, class_shift
from .distributed import any_process, backend, gather, processes
from .layerwise import LayerwiseStep
from .proximal import Proximal

_FP16_SCALE = 2.0**10  # of the loss, for gradients in fp16: torch's 2¹⁶ overflows and costs each round its first steps
Log = Callable[[str, float, int], None]


@dataclass(frozen=True)
class Trained:
    """What a round of training did."""

    loss: float
    tokens: int
    steps: int
    seconds: float
    peak_memory_mib: float


def steps_per_round(plan: RoundPlan, examples: int, world: int = 1) -> int:
    """Optimizer steps a round: as many as the plan says, or as its epochs need."""
    settings = plan.training
    per_step = settings.batch_size * settings.gradient_accumulation_steps * world
    return settings.local_steps or max(1, math.ceil(settings.local_epochs * examples / per_step))


def rows_of_round(task: RoundTask, examples: int, site: str, secret: bytes = b"", world: int = 1) -> list[int]:
    """The numbers of the rows that a round trains on, in their order.

    With a secret nobody else can tell or choose which row is in which step: any other plan has the rows in an order of
    its own, so that two plans cannot be laid out to differ by one row. Without one, the plan's seed is all.
    """
    plan = task.plan
    settings = plan.training
    per_step = settings.batch_size * settings.gradient_accumulation_steps * world
    count = steps_per_round(plan, examples, world) * per_step
    seed = f"{plan.model_dump_json(exclude={'factors'})}/{site}" if secret else f"{plan.seed}/{site}"
    return order(examples, task.round * count, count, seed, secret)


def order(examples: int, start: int, count: int, seed: str, secret: bytes = b"") -> list[int]:
    """`count` row numbers from place `start` of an endless sequence of passes, each pass in its own seeded order.

    A round takes up where the round before stopped, so short rounds still see all of a site's rows equally often.
    """
    chosen: list[int] = []
    while len(chosen) < count:
        this_pass, place = divmod(start + len(chosen), examples)
        chosen += _shuffled(examples, f"{seed}/{this_pass}", secret)[place : place + count - len(chosen)]
    return chosen


def _shuffled(examples: int, seed: str, secret: bytes) -> list[int]:
    if secret:  # a torch generator takes 32 bits of a seed, which can all be tried out
        pass_key = _digest(seed, secret)
        return sorted(range(examples), key=lambda row: hashlib.blake2b(b"%d" % row, key=pass_key).digest())
    order: list[int] = torch.randperm(examples, generator=torch.Generator().manual_seed(_number(seed))).tolist()
    return order


def _digest(text: str, secret: bytes = b"") -> bytes:
    return hashlib.blake2b(text.encode(), key=secret).digest() if secret else hashlib.sha256(text.encode()).digest()


def _number(text: str, secret: bytes = b"") -> int:
    return int.from_bytes(_digest(text, secret)[:4], "big")


def steps_between_logs(chosen: list[int], contents: Sequence[str], steps: int, least: int) -> int:
    """Steps whose mean loss may leave the site: a tenth of the round, or as many as hold `least` different rows each
    time; 0: not even the whole round does.

    Args:
        chosen: the rows of the round, in their order.
        contents: what tells rows apart.
    """

    def enough(each: int) -> bool:
        size = each * (len(chosen) // steps)
        starts = range(0, steps // each * size, size)
        return all(len(different(chosen[start : start + size], contents)) >= least for start in starts)

    each = max(1, steps // 10)
    while each < steps and not enough(each):
        each = min(2 * each, steps)
    return each if enough(each) else 0


def different(chosen: Sequence[int], contents: Sequence[str]) -> set[str]:
    """The site's own rows among those chosen, each as often as it differs from the others.

    Args:
        chosen: numbers of rows; those behind the site's own are synthetic, and count as none.
        contents: what tells the site's own rows apart.
    """
    return {contents[row] for row in chosen if row < len(contents)}


def train(
    model: Any,
    base: BaseModel,
    rows: Dataset,
    task: RoundTask,
    chosen: list[int],
    seed: int,
    should_stop: Callable[[], bool],
    log: Log | None = None,
    logged: int = 0,
    scale: float = 1.0,
    trainer_class: "Callable[..., LocalTrainer] | None" = None,
    own: int | None = None,
) -> Trained:
    """Trains what of `model` is trainable, in place, for one round.

    Args:
        chosen: the numbers of the rows, in their order.
        seed: of dropout.
        logged: steps between two losses that go to `log`; 0: none does.
        scale: of the trained LoRA pairs.
        trainer_class: what makes the trainer; None: `LocalTrainer`.
        own: how many of the rows are the site's own: synthetic ones stand behind them, and count in no statistics;
            None: all.

    Raises:
        TrainingError: the loss is not a number any more, or it was told to stop.
    """
    plan = task.plan
    steps = steps_per_round(plan, len(rows), processes()[1])
    trainer = (trainer_class or LocalTrainer)(
        chosen,
        task,
        base,
        class_shift(base, rows if own is None else rows.select(range(own)), plan),
        model=model,
        args=_arguments(plan, base, steps, seed, logged if log else 0),
        data_collator=partial(base.task.batch, pad_id=base.tokenizer.pad_token_id),
        train_dataset=rows,
        callbacks=[Watch(should_stop, log, task.round * steps)],
    )
    trainer.remove_callback(PrinterCallback)
    if plan.training.proximal_mu:
        trainer.add_callback(Proximal(plan.training.proximal_mu, scale))
    memory.watch_peak()
    started = time.perf_counter()
    losses = gather(trainer.train().training_loss)
    seconds = time.perf_counter() - started
    loss = sum(losses) / len(losses)
    trainer.check(loss)
    return Trained(loss, trainer.tokens, steps, seconds, memory.peak_mib())


def dropout_seed(task: RoundTask, site: str, secret: bytes = b"") -> int:
    """Derive the seed of dropout from the plan's seed, the round, the site and its secret."""
    return _number(f"{task.plan.seed}/{task.round}/{site}", secret)


def _arguments(plan: RoundPlan, base: BaseModel, steps: int, seed: int, logged: int) -> TrainingArguments:
    settings, on_cpu, private = plan.training, base.model.device.type == "cpu", plan.privacy.asked
    arguments = TrainingArguments(
        output_dir=tempfile.gettempdir(),  # nothing is written there
        max_steps=steps,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=1 if private else settings.gradient_accumulation_steps,
        gradient_checkpointing=settings.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if settings.gradient_checkpointing else None,
        learning_rate=settings.learning_rate,
        optim=settings.optim,
        weight_decay=settings.weight_decay,
        max_grad_norm=0.0 if private else settings.max_grad_norm,  # each record's gradient is clipped instead
        seed=seed,
        bf16=base.compute_dtype == torch.bfloat16,
        fp16=base.compute_dtype == torch.float16,
        use_cpu=on_cpu,
        ddp_backend=backend() if processes()[1] > 1 else None,
        ddp_find_unused_parameters=False,
        dataloader_pin_memory=not on_cpu,
        remove_unused_columns=False,
        logging_strategy="steps" if logged else "no",
        logging_steps=max(1, logged),
        logging_nan_inf_filter=False,  # it would hide a loss that is not a number behind the mean of the others
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        log_level="error",
        log_level_replica="error",
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # several visible GPUs are for several processes, not DataParallel
    return arguments


class LocalTrainer(Trainer):  # type: ignore[misc]
    """transformers' Trainer with our order of rows, and a schedule that knows the rounds before and after."""

    def __init__(
        self, order: list[int], task: RoundTask, base: BaseModel, shift: ClassShift | None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.order, self.task, self.base, self.shift = order, task, base, shift
        self.loss_is_scaled_for_ga = True
        if base.compute_dtype == torch.float16:
            self.accelerator.scaler = torch.amp.GradScaler(self.args.device.type, init_scale=_FP16_SCALE)

    @property
    def tokens(self) -> int:
        """How many tokens all processes together have trained on, padding not counted."""
        return sum(len(self.train_dataset[row]["input_ids"]) for row in self.order)

    def check(self, loss: float) -> None:
        """Look at a round that is over.

        Raises:
            TrainingError: its mean loss is not a number.
        """
        _check_finite(loss)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Any], Any]:
        batches = list(islice(epoch_iterator, num_batches))
        items = torch.tensor(sum(self.base.task.items(batch) for batch in batches), device=device)
        return batches, self.accelerator.gather(items).sum() if self.args.world_size > 1 else items

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The mean of the task's losses in a step, however it is cut into batches and spread over processes.

        Models' own losses are no such means: classifiers ignore how many batches make a step.
        """
        nats = self.base.task.loss(model, self.base, inputs, self.task.plan, self.shift)
        return nats / num_items_in_batch * self.args.world_size  # DDP takes the mean of the processes' gradients

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return self.order

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Optimizer:
        optimizer: Optimizer = super().create_optimizer(*args, **kwargs)
        if ratio := self.task.plan.training.head_lr_ratio:
            optimizer.register_step_pre_hook(LayerwiseStep(heads(self.model, self.base), ratio))
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> LRScheduler:
        settings, task = self.task.plan.training, self.task
        optimizer = optimizer or self.optimizer
        self.lr_scheduler = schedule(optimizer, settings, num_training_steps, task.round, task.total_rounds)
        return self.lr_scheduler

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        if loss.device.type == "cpu" or self.state.global_step % 10 == 0:  # looking makes a GPU wait
            _check_finite(float(loss))
        return loss


def schedule(optimizer: Any, settings: TrainingSettings, steps: int, rounds_before: int, rounds: int) -> LambdaLR:
    """The learning rate's course over `rounds` rounds of `steps` steps each, from where this round begins."""
    name = settings.lr_scheduler_type
    whole = get_scheduler(
        "constant_with_warmup" if name == "constant" else name,
        optimizer=optimizer,
        num_warmup_steps=math.ceil(settings.warmup_ratio * steps * rounds),
        num_training_steps=steps * rounds,
    )
    factor = whole.lr_lambdas[0]
    return LambdaLR(optimizer, lambda step: factor(step + rounds_before * steps))


class Watch(TrainerCallback):  # type: ignore[misc]
    """Stops within one batch when told to, and hands losses on."""

    def __init__(self, should_stop: Callable[[], bool], log: Log | None, steps_before: int) -> None:
        self.should_stop, self.log, self.steps_before = should_stop, log, steps_before

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        if any_process(self.should_stop()):
            raise TrainingError("stopped while training, as told", code="stopped")

    on_substep_end = on_step_end = on_train_begin

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        for ours, theirs in (("train_loss", "loss"), ("learning_rate", "learning_rate")):
            if self.log and theirs in logs:
                self.log(ours, logs[theirs], self.steps_before + state.global_step)


def _check_finite(loss: float) -> None:
    if not math.isfinite(loss):
        raise diverged()


def diverged() -> TrainingError:
    """Make the error of training that left the range of numbers."""
    return TrainingError(
        "the training loss is not a number any more; lower learning_rate or max_grad_norm, add warmup_ratio, "
        "or compute in bf16 or fp32 where it is fp16",
        code="diverged",
    )
