"""What a site does with a round's task: check it, train or measure, and answer. The only entry to this room."""

import logging
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..adapter import Adapter, AdapterUpdate, Manifest, Report, RoundTask
from ..config import RoundPlan, SiteOverrides
from ..errors import ConfigError, ModelError, PolicyError, TrainingError, WireError
from . import base_model, data, distributed, evaluation, peft_methods, training
from .attach import base_class
from .base_model import BaseModel
from .data import SiteData
from .own_adapter import OwnAdapter, shared_half
from .peft_methods import PeftMethod
from .policy import accept, check_examples, check_label_statistics, fit
from .site_config import SiteConfig
from .tasks import label_skew
from .tasks import registry as tasks


@dataclass(frozen=True)
class Job:
    """All that a task names, found at this site."""

    plan: RoundPlan
    method: PeftMethod
    base: BaseModel
    data: SiteData
    lowered: tuple[str, ...]  # what the site gave less of than the plan asked


class Worker:
    """One site. Holds its base model and tokenized data from round to round; its answers depend on the task alone."""

    def __init__(
        self,
        site: str,
        config: SiteConfig,
        overrides: SiteOverrides | None = None,
        should_stop: Callable[[], bool] = lambda: False,
        log: training.Log | None = None,
        own: OwnAdapter | None = None,
    ) -> None:
        self.site, self.config, self.overrides = site, config, overrides or SiteOverrides()
        self.should_stop, self.log, self.own = should_stop, log, own or OwnAdapter()
        self._data: dict[tuple[Any, ...], SiteData] = {}
        self._last: tuple[Adapter, Manifest] | None = None
        quiet()
        distributed.join()
        if config.limits.threads:
            torch.set_num_threads(config.limits.threads)

    def train(self, task: RoundTask) -> AdapterUpdate:
        """One round of local training, starting from the task's adapter.

        Raises:
            FmError: the site may not, cannot or was told not to.
        """
        job = self._job(task)
        plan, method, base, rows = job.plan, job.method, job.base, job.data.train
        task = RoundTask(plan, task.adapter, task.manifest, task.round, task.total_rounds)
        before = self._measured("before", task, self.validate(task)) if plan.evaluation.before else {}
        with training.memory_explained(plan), base.lent():
            model = method.attach(base, task.adapter, plan, task.round, self.own.read())
            done = self._within_time(
                lambda stop: training.train(model, base, rows, task, self.site, stop, self.log, method.scale)
            )
            after = self._evaluate(model, job) if plan.evaluation.after else {}
            adapter, whole = method.extract(model), method.extract(model, whole=True)
            manifest = Manifest(base.fingerprint, plan.task, plan.peft["method"], base_class(model), plan.labels)
        self._measured("after", task, after)
        if plan.shares != "AB":
            self.own.keep(adapter, manifest, task)
            adapter = whole = shared_half(adapter)
        self._last = whole, manifest
        report = Report(
            examples=len(rows),
            tokens=done.tokens,
            steps=done.steps,
            loss=done.loss,
            seconds=done.seconds,
            peak_memory_mib=done.peak_memory_mib,
            rank=plan.peft.get("rank", 0),
            quantization=plan.quantization,
            before=before,
            after=after,
            bad_rows=job.data.bad_rows,
            label_skew=label_skew(base.task.class_counts(rows, plan)) if "skew" in plan.label_statistics else None,
            max_weight=self.config.limits.max_weight,
            lowered=job.lowered,
        )
        return AdapterUpdate(self.site, adapter, manifest, report)

    def validate(self, task: RoundTask) -> dict[str, float]:
        """The metrics of the task's whole adapter on this site's validation rows.

        Raises:
            FmError: the site may not, cannot or was told not to.
        """
        job = self._job(task)
        with training.memory_explained(job.plan), job.base.lent():
            plan = job.plan.model_copy(update={"rest": "tail"})
            model = job.method.attach(job.base, task.adapter, plan, own=self.own.read())
            return self._evaluate(model, job)

    def submit(self) -> tuple[Adapter, Manifest]:
        """The adapter this site trained last, whole: frozen directions included.

        Raises:
            WireError: it has not trained yet.
        """
        if self._last is None:
            raise WireError(f"{self.site} has trained no adapter in this job yet; ask again after a round")
        return self._last

    def _within_time(self, train: Callable[[Callable[[], bool]], training.Trained]) -> training.Trained:
        limit_s, started = self.config.limits.max_seconds_per_round, time.monotonic()

        def late() -> bool:
            return 0 < limit_s < time.monotonic() - started

        try:
            return train(lambda: late() or self.should_stop())
        except TrainingError:
            if not late():
                raise
            raise PolicyError(
                f"training took longer than the {limit_s:g} s a round this site gives; ask for fewer local_steps"
            ) from None

    def _evaluate(self, model: Any, job: Job) -> dict[str, float]:
        return evaluation.evaluate(model, job.base, job.data.validation, job.plan, self.should_stop)

    def _measured(self, when: str, task: RoundTask, metrics: dict[str, float]) -> dict[str, float]:
        for name, value in metrics.items():
            if self.log:
                self.log(f"{when}/{name}", value, task.round)
        return metrics

    def _job(self, task: RoundTask) -> Job:
        decision = accept(fit(self.overrides.applied(task.plan), self.config))
        plan = decision.plan
        kind, method = tasks[plan.task], peft_methods.read(plan.peft)
        peft_methods.check_training(method, plan.training)
        if kind.needs_labels and len(plan.labels) < 2:
            raise ConfigError(f"{plan.task} needs the plan's labels, at least two")
        base = base_model.load(self.config.model(plan.model), plan, kind, method.trained_whole)
        self._check_base(base, task)
        job = Job(plan, method, base, self._tokenized(plan, base), decision.lowered)
        check_examples(len(job.data.train), self.config)
        check_label_statistics(plan.label_statistics, self.config)
        steps = training.steps_per_round(plan, len(job.data.train), distributed.processes()[1])
        if steps > self.config.limits.max_steps_per_round:
            raise PolicyError(
                f"{plan.training.local_epochs:g} epochs are {steps} steps, more than the "
                f"{self.config.limits.max_steps_per_round} this site allows; ask for local_steps"
            )
        return job

    def _check_base(self, base: BaseModel, task: RoundTask) -> None:
        if task.manifest and task.manifest.base != base.fingerprint:
            raise ModelError(
                f"{self.site}: the federation trains base model {task.manifest.base}, the alias "
                f"{task.plan.model!r} is {base.fingerprint} here; point it at the same weights"
            )

    def _tokenized(self, plan: RoundPlan, base: BaseModel) -> SiteData:
        key = (plan.data, plan.task, plan.labels, plan.max_length, base.fingerprint)
        if key not in self._data:
            self._data[key] = data.load(self.config.data_set(plan.data), plan, base.task, base.tokenizer)
        return self._data[key]


def quiet() -> None:
    """Leaves a worker's output to what a person can act on."""
    import datasets
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", category=FutureWarning)
    for name in ("bitsandbytes", "accelerate"):
        logging.getLogger(name).setLevel(logging.ERROR)
