"""What a site does with a round's task: check it, train or measure, and answer. The only entry to this room."""

import logging
import math
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from torch import Tensor

from .. import transforms
from ..adapter import Adapter, AdapterUpdate, Manifest, Report, RoundTask
from ..config import RoundPlan, SiteOverrides, TaskPlan
from ..encryption.keys import Keys
from ..errors import ModelError, PolicyError, TrainingError, WireError
from ..job import private
from ..job.at_home import PERSONAL, at_home, parts
from ..job.peft import check_training
from ..job.synthetic import check_labels, nothing_brought
from ..privacy.egress import VOTES
from ..privacy.protection import Protection
from ..synthesis.candidates import CandidateSet
from ..synthesis.vote import noised
from ..transforms import Chain
from ..transforms.packed import Packed, pack
from . import head_start, synthetic
from .audit import gate
from .audit.gate import Compared
from .data import loading as data
from .data.loading import SiteData
from .job_state import JobState
from .model import base_model
from .model.attach import base_class, trained_modules
from .model.base_model import BaseModel
from .model.fingerprint import read_config
from .model.own_adapter import shared_half
from .model.sealed import padded, unsealed
from .model.shapes import shapes
from .model.states import States
from .offer.policy import accept, check_shapes, check_trained, few_examples, few_metric_rows, few_update_rows, fit
from .offer.site_config import ModelSource, SiteConfig
from .peft_methods import Attachment, attachment_of
from .tasks import Task, label_skew
from .tasks import registry as tasks
from .training import distributed, dp, evaluation, memory
from .training import fit as training
from .training.dp import Private, PrivateTrainer

_MOST_STATES, _STATES_SHARE = 2**30, 1 / 16  # bytes of what a frozen base model made of texts, and of memory_gib


@dataclass(frozen=True)
class Job:
    """All that a task names, found at this site."""

    plan: TaskPlan
    attachment: Attachment  # how the plan's PEFT method is put on the base model
    base: BaseModel
    data: SiteData
    chosen: list[int]  # the rows to train on, in their order; none where nothing is trained, or chance draws them
    private: Private | None  # how the round is protected; None: it is not
    measured: Dataset | None  # the rows to measure on; None: so few that no metric of them may leave
    lowered: tuple[str, ...]  # what the site gave less of than the plan asked
    compared: Compared | None = None  # the rows by which the update is held back, where the site asks for it
    added: Dataset | None = None  # synthetic rows that are trained on beside the site's own

    @property
    def rows(self) -> Dataset:
        """The rows to train on: the site's own, and behind them the synthetic ones."""
        return concatenate_datasets([self.data.train, self.added]) if self.added else self.data.train


@dataclass(frozen=True)
class Personalized:
    """What a site has tried for itself, and which of it it keeps."""

    tried: tuple[dict[str, float], ...]  # metrics on its validation rows: of the global adapter, and after each part
    best: int  # place of the one that is kept
    steps: int  # that it took

    def __str__(self) -> str:
        before, after = self.tried[0]["loss"], self.tried[self.best]["loss"]
        if not self.best:
            return f"loss {before:.4g}; no step made it better, and the global adapter is kept as {PERSONAL}"
        return f"loss {before:.4g} of the global adapter, {after:.4g} after {self.steps} steps, kept as {PERSONAL}"


class Worker:
    """One site. It keeps its base model and tokenized rows from round to round; its answers depend on the task alone.

    It checks each task, whoever sent it, and attaches the adapter to the base model once.

    Args:
        site: the site's name.
        config: what the site offers, and its limits.
        overrides: what the job asks of this site differently, if no gate has applied it already.
        should_stop: whether training is to end early.
        log: gets the loss while the site trains.
        secret: known to the site alone; the order of its rows follows from it. Empty, in simulations: the order follows
            from the plan's seed.
        state: what the site keeps of the job from round to round.
        may_spend: is told what a round under differential privacy will cost, before it begins, and raises a PolicyError
            where that is too much.
        keys: reads the keys with which the site encrypts what it sends; they are asked for when a plan needs them.
        brought: reads the synthetic rows that the job brought, by the digest in its plan.
    """

    def __init__(
        self,
        site: str,
        config: SiteConfig,
        overrides: SiteOverrides | None = None,
        should_stop: Callable[[], bool] = lambda: False,
        log: training.Log | None = None,
        secret: bytes = b"",
        state: JobState | None = None,
        may_spend: Callable[[Protection], None] = lambda _: None,
        keys: Callable[[], Keys | None] = lambda: None,
        brought: Callable[[str], CandidateSet] = nothing_brought,
    ) -> None:
        self.site, self.config, self.overrides = site, config, overrides or SiteOverrides()
        self.should_stop, self.log, self.secret, self.state = should_stop, log, secret, state or JobState()
        self.may_spend, self._read_keys, self.brought = may_spend, keys, brought
        self._data: dict[tuple[Any, ...], SiteData] = {}
        self._added: dict[tuple[Any, ...], Dataset] = {}
        self._states = States(min(_MOST_STATES, _STATES_SHARE * config.limits.memory_gib * 2**30))
        self._last: tuple[Adapter, Manifest] | None = None
        if config.privacy.floor:  # the loss follows from the rows
            self.log = None
        quiet()
        distributed.join()
        if config.limits.threads:
            torch.set_num_threads(config.limits.threads)

    def train(self, task: RoundTask) -> AdapterUpdate:
        """Train for one round, starting from the task's adapter; or vote or sum up, where that is what the plan asks.

        Raises:
            FmError: the site does not allow the task, cannot carry it out, or was told to stop.
        """
        with memory.given_back(), memory.explained(task.plan):
            if task.plan.votes:
                return self._vote(task)
            return self._sums(task) if task.plan.sums else self._train(task)

    def _train(self, task: RoundTask) -> AdapterUpdate:
        job = self._job(task, trains=True)
        plan, attachment, base = job.plan, job.attachment, job.base
        if plan.padded_to and task.adapter and not task.adapter.sealed:
            raise WireError(
                "the server sent an adapter that it can read, where its plan says that only sites can; start the job "
                "afresh, or from an encrypted adapter",
                code="not_encrypted",
            )
        task = self._opened(replace(task, plan=plan))
        protection = self._begun(plan, job.private.protection) if job.private else None
        with base.lent(), self._within_time() as stop:
            reference = gate.reference(job, stop)
            model, before = self._attached(job, task), {}
            rows = job.rows
            attachment.prepare(base, rows, job.chosen or range(len(rows)), stop)
            if plan.evaluation.before:
                before = self._measured("before", task, self._evaluate(model, job, stop))
            if plan.rest == "none":
                attachment.leave_rest(model, plan.factors)
            done = training.train(
                model,
                base,
                rows,
                task,
                job.chosen,
                training.dropout_seed(task, self.site, self.secret),
                stop,
                self.log if "steps" in self._told(plan) else None,
                self._steps_between_logs(job),
                attachment.method.scale,
                partial(PrivateTrainer, private=job.private) if job.private else None,
                len(job.data.train),
            )
            gate.check(model, job, reference, stop)
            after = self._evaluate(model, job, stop) if plan.evaluation.after else {}
            adapter, whole = attachment.extract(model), attachment.extract(model, whole=True)
            if plan.padded_to:
                adapter = whole = padded(whole, plan)
            manifest = _manifest(model, job)
        self._measured("after", task, after)
        if plan.shares != "AB":
            self.state.own.keep(adapter, manifest, task)
            adapter = whole = shared_half(adapter)
        self._last = whole, manifest
        report = self._report(job, done, before, after)
        return AdapterUpdate(self.site, adapter, manifest, report, protection=protection)

    def _begun(self, plan: TaskPlan, protection: Protection) -> Protection:
        """How the round is protected, once all who must know what it costs have agreed.

        Raises:
            PolicyError: it costs more than is left.
        """
        self.may_spend(protection)
        self.state.events.begin(protection, plan.privacy.epsilon)
        return protection

    def _vote(self, task: RoundTask) -> AdapterUpdate:
        """Have the site's rows vote on the candidates that the job brought.

        Raises:
            PolicyError: they have voted in this job already: each has one vote.
        """
        job = self._job(task, trains=True)
        plan, base = job.plan, job.base
        rows = self._synthetic(plan)
        if len(rows.rows) != plan.votes:
            raise WireError(
                f"the server asks for votes on {plan.votes} candidates, and the job brought {len(rows.rows)}; make the "
                "job again",
                code="other_synthetic_rows",
            )
        if self.state.events.read():
            raise PolicyError("this site's rows have voted in this job already; start another job", code="voted")
        own = self._voters(plan, base.task)
        protection = self._begun(plan, synthetic.protection(plan, own))
        with base.lent(), self._within_time() as stop:
            counts = synthetic.count(rows, own, base, plan, stop)
        noisy = noised(counts, protection.events[0].noise_multiplier)
        return self._told_of(job, {VOTES: noisy}, protection)

    def _sums(self, task: RoundTask) -> AdapterUpdate:
        """Sum up what the frozen base model makes of the site's rows, for the start of the head.

        Raises:
            PolicyError: too few rows have a label that has enough of them.
        """
        head_start.check_task(task.plan.task)
        job = self._job(task, trains=True)
        plan, base, privacy = job.plan, job.base, self.config.privacy
        places = head_start.spread(len(job.data.train))
        contents, rows = [job.data.contents[0][place] for place in places], job.data.train.select(places)
        chosen = head_start.enough(rows["labels"], contents, privacy.min_metric_rows)
        if len({contents[place] for place in chosen}) < privacy.min_update_rows:
            raise few_update_rows(privacy)
        with base.lent(), self._within_time() as stop:
            found = head_start.sums(base, rows.select(chosen), plan, stop)
        return self._told_of(job, found.tensors())

    def _told_of(self, job: Job, tensors: dict[str, Tensor], protection: Protection | None = None) -> AdapterUpdate:
        """What is sent in place of an adapter."""
        plan, base = job.plan, job.base
        return AdapterUpdate(
            self.site,
            Adapter(dense=tensors),
            Manifest(base.fingerprint, plan.task, str(plan.peft["method"]), "", plan.labels, **base.tokenization),
            Report(quantization=plan.quantization, max_weight=self.config.limits.max_weight, lowered=job.lowered),
            protection=protection,
        )

    def validate(self, task: RoundTask) -> dict[str, float]:
        """Measure the task's whole adapter on this site's validation rows.

        Returns:
            Metric → value.
        Raises:
            FmError: the site does not allow the task, cannot carry it out, or was told to stop.
        """
        with memory.given_back(), memory.explained(task.plan):
            return self._validate(task)

    def personalize(self, task: RoundTask) -> Personalized:
        """Train on from the task's adapter for this site alone, and keep what its validation rows find best: the
        adapter as it came, or after some of the steps. Of each, the best so far is kept before the next is trained.

        What the site would send, or owes, does not change.

        Raises:
            FmError: the site does not allow the task, cannot carry it out, or was told to stop.
        """
        with memory.given_back(), memory.explained(task.plan):
            return self._personalize(task)

    def _personalize(self, task: RoundTask) -> Personalized:
        job = self._job(task, trains=True, sends=False)
        plan, attachment, base = job.plan, job.attachment, job.base
        if job.measured is None:
            raise few_metric_rows(self.config.privacy)
        task = self._opened(task)
        made_by = replace(task, plan=plan, round=max(0, task.round - 1))
        seed = training.dropout_seed(task, self.site, self.secret)
        with base.lent(), self._within_time() as stop:
            model = attachment.attach(base, task.adapter, plan, own=self.state.own.read())
            check_trained(*trained_modules(model, base.heads), self.config.limits)
            attachment.prepare(base, job.data.train, job.chosen, stop)
            tried = [self._evaluate(model, job, stop)]
            self.state.personal.keep(attachment.extract(model, whole=True), _manifest(model, job), made_by)
            best, done = 0, 0
            for number, steps in enumerate(cut := parts(plan.training.local_steps)):
                part = plan.training.model_copy(update={"local_steps": steps})
                rows = len(job.chosen) // plan.training.local_steps
                training.train(
                    model,
                    base,
                    job.data.train,
                    replace(task, plan=plan.model_copy(update={"training": part}), round=number, total_rounds=len(cut)),
                    job.chosen[done * rows : (done + steps) * rows],
                    seed,
                    stop,
                    scale=attachment.method.scale,
                )
                done += steps
                tried.append(self._evaluate(model, job, stop))
                if tried[-1]["loss"] < tried[best]["loss"]:
                    best = number + 1
                    self.state.personal.keep(attachment.extract(model, whole=True), _manifest(model, job), made_by)
        return Personalized(tuple(tried), best, sum(cut[:best]))

    def _validate(self, task: RoundTask) -> dict[str, float]:
        job = self._job(task, trains=False)
        task = self._opened(task)
        if job.measured is None:
            raise few_metric_rows(self.config.privacy)
        plan = job.plan.model_copy(update={"rest": "tail"})  # the whole adapter, whatever of it is trained
        with job.base.lent(), self._within_time() as stop:
            model = job.attachment.attach(job.base, task.adapter, plan, own=self.state.own.read())
            return self._evaluate(model, job, stop)

    def opened(self, task: RoundTask) -> Job:
        """Find all that a task to measure names, within this site's limits: for audits.

        Raises:
            FmError: the site does not offer it, does not allow it, or its base model is another one.
        """
        return self._job(task, trains=False)

    def rows(self, plan: RoundPlan) -> SiteData:
        """Read the site's rows under the plan's alias as token ids, once. They never leave the site.

        Raises:
            FmError: the site does not offer the data or the model, or they cannot be used.
        """
        source = self.config.model(plan.model)
        return self._tokenized(plan, tasks[plan.task], source, base_model.locate(source))

    def submit(self) -> tuple[Adapter, Manifest]:
        """Hand out the adapter that this site trained last, frozen directions included.

        Raises:
            WireError: it has not trained yet.
        """
        if self._last is None:
            raise WireError(
                f"{self.site} has trained no adapter in this job yet; ask again after a round", code="not_trained_yet"
            )
        return self._last

    def packed(self, update: AdapterUpdate, plan: RoundPlan) -> Packed:
        """Encode an update's adapter by the plan's `uplink`. What rounding loses is added to the next update, but not
        under differential privacy: it would be of an update that may never have left, and was not paid for.

        Raises:
            WireError: a tensor cannot be sent.
            ModelError: what is kept for the next round cannot be read or written.
        """
        chain = self.chain(plan)
        keeps = bool(chain) and not plan.privacy.asked
        packed = pack(update.adapter, chain, self.site, self.state.kept.read() if keeps else None)
        if keeps:
            self.state.kept.keep(packed.kept)
        return packed

    def chain(self, plan: RoundPlan) -> Chain:
        """The transforms of what this site sends, with its keys where they need any.

        Raises:
            ConfigError: an unknown transform, or the site has no keys.
        """
        chain = transforms.read(plan.uplink, "uplink")
        return chain.keyed(self.keys) if chain.encrypts else chain

    @cached_property
    def keys(self) -> Keys | None:
        """The site's keys, read when a plan first needs them.

        Raises:
            ConfigError: they cannot be used.
        """
        return self._read_keys()

    def _opened(self, task: RoundTask) -> RoundTask:
        """The task with its adapter decrypted, where it came encrypted. It is kept as PEFT loads it.

        Raises:
            ConfigError: the site has no keys.
            WireError: it is no sum of updates under them, or belongs to another model.
        """
        if not task.adapter.sealed:
            return task
        adapter = unsealed(task.adapter, self.keys, task.plan)
        if task.manifest and task.round:  # another site's adapter that is to be measured has none
            self.state.global_adapter.keep(adapter, task.manifest, replace(task, round=task.round - 1))  # that made it
        return replace(task, adapter=adapter)

    @contextmanager
    def _within_time(self) -> Iterator[Callable[[], bool]]:
        """Hands out what tells that it is time to stop.

        Raises:
            PolicyError: instead of the error of what was stopped because the site's time was up.
        """
        limit_s, started = self.config.limits.max_seconds_per_round, time.monotonic()

        def late() -> bool:
            return time.monotonic() - started > limit_s

        try:
            yield lambda: late() or self.should_stop()
        except TrainingError:
            if not late():
                raise
            raise PolicyError(
                f"the round took longer than the {limit_s:g} s this site gives (max_seconds_per_round); ask for fewer "
                "local_steps or evaluation.max_examples",
                code="too_slow",
            ) from None

    def _attached(self, job: Job, task: RoundTask) -> Any:
        """The base model with the task's adapter to be trained. Where it is measured first, all of it is there.

        Raises:
            PolicyError: more would be trained than the site allows: the weights may lack what then is new.
        """
        plan = job.plan
        if plan.rest == "none" and plan.evaluation.before:
            plan = plan.model_copy(update={"rest": "tail"})
        start = task.adapter if head_start.is_start(task.adapter) else None
        adapter = Adapter() if start else task.adapter
        model = job.attachment.attach(job.base, adapter, plan, task.round, self.state.own.read())
        if start:
            head_start.fill(model, job.base, start.dense)
        check_trained(*trained_modules(model, job.base.heads), self.config.limits)
        return model

    def _evaluate(self, model: Any, job: Job, stop: Callable[[], bool]) -> dict[str, float]:
        if job.measured is None:
            return {}
        job.attachment.prepare(job.base, job.measured, range(len(job.measured)), stop)
        return evaluation.evaluate(model, job.base, job.measured, job.plan, stop)

    def _measured(self, when: str, task: RoundTask, metrics: dict[str, float]) -> dict[str, float]:
        for name, value in metrics.items():
            if self.log:
                self.log(f"{when}/{name}", value, task.round)
        return metrics

    def _job(self, task: RoundTask, trains: bool, sends: bool = True) -> Job:
        """What a task names. The base model's weights come last: all else that can refuse the job is looked at before.

        Raises:
            FmError: the site does not offer it, does not allow it, or cannot find it.
        """
        world = distributed.processes()[1]
        asked = self.overrides.applied(task.plan)
        decision = accept(fit(asked if sends else at_home(asked), self.config, world, trains, sends))
        plan, privacy = decision.plan, self.config.privacy
        measures = not (plan.votes or plan.sums) and (not trains or plan.evaluation.before or plan.evaluation.after)
        trains = trains and not (plan.votes or plan.sums)
        kind, attachment = tasks[plan.task], attachment_of(plan.peft, self._states)
        check_training(attachment.method, plan.training)
        if trains:
            private.check(plan)
        self.chain(plan)  # before a round is lost
        kind.check_labels(plan)
        source = self.config.model(plan.model)
        folder = base_model.locate(source)
        check_shapes(*shapes(folder, plan), plan, self.config, world, trains)
        found = self._tokenized(plan, kind, source, folder)
        to_train, to_measure = found.contents
        if len(set(to_train)) < privacy.min_examples:
            raise few_examples(privacy)
        told = replace(task, plan=plan)
        protected = dp.settle(told, found.train_units, world) if trains and plan.privacy.asked else None
        added = self._add(found, plan, kind, folder) if trains and plan.synthetic.asked else None
        examples = len(found.train) + len(added or ())
        chosen = self._chosen(told, found, examples, world, protected) if trains else []
        own = [row for row in chosen if row < len(found.train)] or range(len(found.train))
        compared = gate.compared(found, own, privacy.max_membership_auc) if trains and sends else None
        count = found.measured(plan.evaluation.max_examples, privacy.min_metric_rows)
        enough = len(set(to_measure[:count])) >= privacy.min_metric_rows
        withheld = ("metrics to none: too few rows to measure on",) if measures and not enough else ()
        base = base_model.load(source, plan, kind, attachment.method.trained_whole)
        self._check_base(base, task)
        measured = found.validation.select(range(count)) if enough else None
        lowered = *task.lowered, *decision.lowered, *withheld
        return Job(plan, attachment, base, found, chosen, protected, measured, lowered, compared, added)

    def _synthetic(self, plan: RoundPlan) -> CandidateSet:
        """The synthetic rows that the job brought, where the plan can use them.

        Raises:
            ConfigError: it cannot, or the job brought none or others.
        """
        rows = self.brought(plan.synthetic.digest)
        check_labels(plan, rows)
        return rows

    def _add(self, found: SiteData, plan: RoundPlan, kind: Task, folder: Path) -> Dataset:
        """The synthetic rows that are trained on beside the site's own, chosen once for all rounds."""
        key = (plan.data, plan.task, plan.labels, plan.max_length, plan.model, plan.synthetic)
        if key not in self._added:
            own = [synthetic.said(row, kind) for rows in self._written(plan, kind, folder) for row in rows]
            rows, most = self._synthetic(plan), self.config.synthetic.max_rows
            with self._within_time() as stop:
                self._added[key] = synthetic.added(rows, own, found, plan, kind, *_reads(folder), most, self.site, stop)
        return self._added[key]

    def _voters(self, plan: RoundPlan, kind: Task) -> list[data.Written]:
        """All rows of the file to train on: nothing is measured, so none is held out."""
        train, held_out = self._written(plan, kind, base_model.locate(self.config.model(plan.model)))
        return train if self.config.data_set(plan.data).validation else [*train, *held_out]

    def _written(self, plan: RoundPlan, kind: Task, folder: Path) -> tuple[list[data.Written], list[data.Written]]:
        """The site's rows as they are read: those to train on, and those to measure on."""
        return data.as_written(self.config.data_set(plan.data), plan, kind, *_reads(folder))

    def _chosen(
        self, task: RoundTask, found: SiteData, examples: int, world: int, protected: Private | None
    ) -> list[int]:
        """The rows to train on in this round; none where chance draws them in each step.

        Args:
            examples: how many there are, the synthetic ones among them.

        Raises:
            PolicyError: too many steps, or too few different rows.
        """
        limits, privacy = self.config.limits, self.config.privacy
        if training.steps_per_round(task.plan, examples, world) > limits.max_steps_per_round:
            raise PolicyError(
                f"training.local_epochs are more steps of this site's rows than the {limits.max_steps_per_round} it "
                "allows (max_steps_per_round); ask for local_steps",
                code="above_limit",
            )
        chosen = [] if protected else training.rows_of_round(task, examples, self.site, self.secret, world)
        if self._different(found, chosen, task.plan, protected) < privacy.min_update_rows:
            raise few_update_rows(privacy)
        return chosen

    def _different(self, found: SiteData, chosen: list[int], plan: RoundPlan, protected: Private | None) -> int:
        """How many different rows a round sees; where chance draws them, how many it is to see."""
        if protected:
            return protected.seen(len(set(found.contents[0])), plan.training.local_steps)
        return len(training.different(chosen, found.contents[0]))

    def _report(self, job: Job, done: training.Trained, before: dict[str, float], after: dict[str, float]) -> Report:
        """What is told of a round: no count that the site keeps, and no loss of fewer rows than metrics may be of."""
        counts = {
            "examples": len(job.data.train),
            "tokens": done.tokens,
            "steps": done.steps,
            "bad_rows": job.data.bad_rows,
        }
        told, different = self._told(job.plan), self._different(job.data, job.chosen, job.plan, job.private)
        return Report(
            **{name: count for name, count in counts.items() if name in told},
            loss=done.loss if different >= self.config.privacy.min_metric_rows else math.nan,
            seconds=done.seconds,
            peak_memory_mib=done.peak_memory_mib,
            rank=job.plan.rank,
            quantization=job.plan.quantization,
            before=before,
            after=after,
            label_skew=self._label_skew(job) if "skew" in job.plan.label_statistics else None,
            max_weight=self.config.limits.max_weight,
            lowered=job.lowered,
        )

    def _told(self, plan: RoundPlan) -> set[str]:
        """The counts that may leave. Steps are no count of the site's where the plan itself says how many."""
        return {*self.config.privacy.counts, *(["steps"] if plan.training.local_steps else [])}

    def _steps_between_logs(self, job: Job) -> int:
        if job.private:  # nothing but the protected update tells of single steps
            return 0
        steps = training.steps_per_round(job.plan, len(job.rows), distributed.processes()[1])
        least = self.config.privacy.min_metric_rows
        return training.steps_between_logs(job.chosen, job.data.contents[0], steps, least)

    def _label_skew(self, job: Job) -> float:
        return label_skew(job.base.task.class_counts(job.data.train, job.plan))

    def _check_base(self, base: BaseModel, task: RoundTask) -> None:
        if task.manifest and task.manifest.base != base.fingerprint:
            raise ModelError(
                f"{self.site}: the federation trains another base model than the one under that alias here, "
                f"{base.fingerprint}; point it at the same weights",
                f"the federation's: {task.manifest.base!r:.100}",
                code="other_base",
            )
        for what, ours in base.tokenization.items():
            theirs = getattr(task.manifest, what, "")
            if theirs and theirs != ours:
                raise ModelError(
                    f"{self.site}: the base model's {what.replace('_', ' ')} is not the federation's; use "
                    "the same tokenizer files and the same version of transformers",
                    code="tokenizer_differs" if what == "tokenizer" else "chat_template_differs",
                )

    def _tokenized(self, plan: RoundPlan, kind: Task, source: ModelSource, folder: Path) -> SiteData:
        unit = plan.privacy.unit if plan.privacy.asked else ""
        key = (plan.data, plan.task, plan.labels, plan.max_length, source, unit)
        if key not in self._data:
            self._data[key] = data.load(self.config.data_set(plan.data), plan, kind, *_reads(folder))
        return self._data[key]


def _reads(folder: Path) -> tuple[Any, int | None]:
    """A base model's tokenizer, and how many tokens it has rows for."""
    return base_model.load_tokenizer(folder), base_model.vocabulary(read_config(folder))


def _manifest(model: Any, job: Job) -> Manifest:
    plan, base = job.plan, job.base
    method = str(plan.peft["method"])
    return Manifest(base.fingerprint, plan.task, method, base_class(model), plan.labels, **base.tokenization)


def quiet() -> None:
    """Leaves a worker's output to what a person can act on."""
    import datasets
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message="Specified to not load vera_A and vera_B")  # they follow from a number
    warnings.filterwarnings("ignore", message="Full backward hook is firing")  # Opacus' hooks on the lowest layers
    for name in ("bitsandbytes", "accelerate"):
        logging.getLogger(name).setLevel(logging.ERROR)
