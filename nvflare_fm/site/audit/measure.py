"""Measures what an adapter tells of the rows it was trained on: members, canaries, secrets, copies.

A row's loss is taken twice: with the adapter, and as the model was before its first round.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from random import Random
from typing import Any

import torch
from datasets import Dataset
from torch.nn.functional import cross_entropy

from ...adapter import Adapter, Manifest, RoundTask
from ...at_rest import standing
from ...config import TaskPlan
from ...errors import ConfigError, DataError, ModelError
from ...export.folder import WEIGHTS, Saved, read_adapter
from ...files import open_file
from ...job.tasks import promises
from ...privacy.audit import one_run
from ...privacy.audit.copying import longest_run
from ...privacy.audit.exposure import CANDIDATES, Exposure, exposure
from ...privacy.audit.membership import LEAST, Membership, membership
from ...privacy.audit.one_run import Bound
from ..data.loading import Examples, contents_of
from ..offer.site_config import Privacy, SiteConfig
from ..tasks import IGNORED
from ..training import evaluation, logits, memory
from ..worker import Job, Worker
from .canaries import Record, alternatives, encoded, record_of

SECRETS, PREFIXES = 10, 50  # that are looked at: each secret is compared with 999 others, each prefix is written on
_WRITTEN = 64  # tokens that are written after a prefix


@dataclass(frozen=True)
class Copies:
    """What the model writes after prefixes of some rows, compared with how those rows go on.

    Args:
        longest: tokens of the longest run that it shares with a row, of each row.
        overlap: that run as a part of what could be written, 0 to 1, of each row.
        nearest: tokens of the longest run that it shares with any training row looked at, of each row.
    """

    longest: tuple[int, ...] = ()
    overlap: tuple[float, ...] = ()
    nearest: tuple[int, ...] = ()


@dataclass(frozen=True)
class Audit:
    """What was measured, on what.

    Args:
        digest: SHA-256 of the adapter's weights.
        different, held_out: rows of the data set, those that are there twice counted once.
        in_both: rows held out that are among the training rows, too; they are neither.
        scores: of members, of rows held out.
        exposures: of canaries that were trained on, and of canaries that were not.
        copies: of members, of rows held out; None where the task writes no text.
    """

    adapter: str
    digest: str
    manifest: Manifest
    round: int | None  # of the federation that made it; None: not known
    plan: TaskPlan
    different: int
    held_out: int
    in_both: int
    membership: Membership
    scores: tuple[tuple[float, ...], tuple[float, ...]]
    canaries: Bound | None = None
    exposures: tuple[tuple[Exposure, ...], tuple[Exposure, ...]] = ((), ())
    copies: tuple[Copies, Copies] | None = None

    @property
    def contradicts(self) -> bool:
        """Whether the canaries rule out the ε that the adapter's job asked for."""
        claimed = self.plan.privacy.epsilon
        return claimed is not None and self.canaries is not None and self.canaries.epsilon > claimed


def audit(site: SiteConfig, folder: Path, data: str = "", model: str = "", most: int = 500) -> Audit:
    """Measure what the adapter in `folder` tells of a data set of the site.

    Args:
        data, model: aliases; empty: those of the adapter's job.
        most: rows to train on, and rows held out, to measure on.
    Raises:
        ModelError: the adapter is damaged, a half, or another base model's.
        PolicyError: its job asked for more than the site's limits, or an alias is not the site's.
        DataError: there are too few rows, or they do not fit the adapter.
        ConfigError: the adapter does not say how it was trained, or the record of the canaries is malformed.
    """
    saved = read_adapter(folder)
    plan, values = _plan(saved), saved.adapter
    aliases = {name: alias for name, alias in (("data", data), ("model", model)) if alias}
    whole: dict[str, Any] = {"rest": "tail", "counts": (), "label_statistics": ()}  # and nothing is told to a server
    task = RoundTask(plan.model_copy(update=whole | aliases), values, saved.manifest)
    here = Privacy(min_examples=1, min_update_rows=1, min_metric_rows=1)  # what is measured stays here
    with memory.given_back(), memory.explained(task.plan):
        job = Worker("this site", site.model_copy(update={"privacy": here})).opened(task)
        record = record_of(site.data_set(task.plan.data).train)
        found = _Rows.of(job, record, most)
        with job.base.lent():
            before = _losses(job.attachment.attach(job.base, Adapter(), job.plan), job, found)
        with job.base.lent():
            model = job.attachment.attach(job.base, values, job.plan)
            after = _losses(model, job, found)
            does = promises(job.plan.task)
            writes = does.learns_text and not does.paired
            secrets = _exposures(model, job, record) if record and writes else ((), ())
            copies = _both_copies(model, job, found) if writes else None
    members, held_out, planted = (
        tuple(one - other for one, other in zip(*pair, strict=True)) for pair in zip(before, after, strict=True)
    )
    return Audit(
        adapter=folder.resolve().name,
        digest=_digest(standing(folder) / WEIGHTS),
        manifest=saved.manifest,
        round=saved.round,
        plan=job.plan,
        different=found.different,
        held_out=found.different_held_out,
        in_both=found.in_both,
        membership=membership(members, held_out),
        scores=(members, held_out),
        canaries=one_run.bound(planted, found.coins, job.plan.privacy.delta) if record else None,
        exposures=secrets,
        copies=copies,
    )


def _plan(saved: Saved) -> TaskPlan:
    if saved.plan is None:
        raise ConfigError(
            "the adapter does not say how it was trained: its provenance.json has no plan; audit one that a job has "
            "saved",
            code="adapter_without_plan",
        )
    if not saved.adapter.lora and any(".lora_A." in name for name in saved.adapter.dense):
        raise ModelError(
            "this adapter holds the factors that all sites share; without a site's own ones it answers nothing",
            code="half_an_adapter",
        )
    if (saved.manifest.task, saved.manifest.labels) != (saved.plan.task, saved.plan.labels):
        raise ModelError(
            "the adapter's provenance.json names one task or list of labels, and its plan another; take the folder as "
            "the job has saved it",
            code="adapter_unreadable",
        )
    return saved.plan


@dataclass(frozen=True)
class _Rows:
    """What is measured: places of the examples of each row in `train` and `validation`."""

    members: list[list[int]]
    held_out: list[list[int]]
    planted: list[Examples]
    coins: tuple[bool, ...]
    different: int
    different_held_out: int
    in_both: int

    @classmethod
    def of(cls, job: Job, record: Record | None, most: int) -> "_Rows":
        data, canaries = job.data, record.canaries if record else ()
        if record and record.task != job.plan.task:
            raise DataError(
                "the canaries of this data set are for another task than the adapter's; plant others for its jobs",
                code="canaries_do_not_fit",
            )
        planted = encoded((canary.row for canary in canaries), job.base, job.plan)
        told = _told(planted)
        train, held_out = data.different
        coins = tuple(canary.included for canary in canaries)
        if any((content in train) != coin for content, coin in zip(told, coins, strict=True)):
            raise DataError(
                "the training rows do not hold the canaries that their record says they do; point the alias at the "
                "files that nvflare-fm site canaries wrote, as it wrote them",
                code="canaries_missing",
            )
        in_both = train.keys() & held_out.keys()
        members = [places for content, places in train.items() if content not in {*told, *in_both}]
        others = [places for content, places in held_out.items() if content not in in_both]
        if min(len(members), len(others)) < LEAST:
            raise DataError(
                f"an audit needs {LEAST} different rows to train on and {LEAST} that were held out, and the data set "
                "has fewer; name a validation file of rows like those in train, which no job was trained on",
                f"{len(members)} rows to train on, {len(others)} held out, {len(in_both)} in both",
                code="too_few_rows",
            )
        some, some_others = (Random(0).sample(rows, min(most, len(rows))) for rows in (members, others))
        return cls(some, some_others, planted, coins, len(members), len(others), len(in_both))


def _told(examples: Sequence[Examples]) -> list[str]:
    """What tells made-up rows apart, and from those of a data set."""
    if not examples:
        return []
    numbers = [number for number, row in enumerate(examples) for _ in row]
    found = contents_of(Dataset.from_list([example for row in examples for example in row]), numbers)
    return list(dict(zip(numbers, found, strict=True)).values())


Losses = tuple[list[float], list[float], list[float]]  # of members, of rows held out, of canaries


def _losses(model: Any, job: Job, found: _Rows) -> Losses:
    data, base, plan = job.data, job.base, job.plan
    return (
        evaluation.losses(model, base, data.train, found.members, plan),
        evaluation.losses(model, base, data.validation, found.held_out, plan),
        _of_examples(model, job, found.planted),
    )


def _of_examples(model: Any, job: Job, rows: Sequence[Examples]) -> list[float]:
    if not rows:
        return []
    examples = Dataset.from_list([example for row in rows for example in row])
    ends = list(accumulate(map(len, rows)))
    groups = [list(range(end - len(row), end)) for end, row in zip(ends, rows, strict=True)]
    return evaluation.losses(model, job.base, examples, groups, job.plan)


def _exposures(model: Any, job: Job, record: Record) -> tuple[tuple[Exposure, ...], tuple[Exposure, ...]]:
    """Of the first canaries that were trained on, and of the first that were not."""
    of: dict[bool, list[Exposure]] = {True: [], False: []}
    for included, found in of.items():
        for canary in [canary for canary in record.canaries if canary.included == included][:SECRETS]:
            others = alternatives(canary.row, CANDIDATES - 1, job.plan, record.seed)
            found.append(exposure_of(model, job, canary.row, others))
    return tuple(of[True]), tuple(of[False])


def exposure_of(model: Any, job: Job, row: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> Exposure:
    """Rank a row by the loss of its whole answer among others that could stand in its place.

    Args:
        model: with an adapter attached, to write text.
    """
    secret, *alternatives = _answers(model, job, encoded([row, *others], job.base, job.plan))
    return exposure(secret, alternatives)


@torch.inference_mode()
def _answers(model: Any, job: Job, rows: Sequence[Examples]) -> list[float]:
    """The nats of the whole answer of each made-up row, several rows at a time."""
    base, found = job.base, []
    for start in range(0, len(rows), job.plan.evaluation.batch_size):
        some = [row[0] for row in rows[start : start + job.plan.evaluation.batch_size]]
        made = base.task.batch(some, base.tokenizer.pad_token_id)
        batch = {name: column.to(base.model.device) for name, column in made.items()}
        texts = batch["places"] // batch["input_ids"].shape[1]
        with base.autocast():
            nats = logits.values(model, base, batch, lambda said, true: cross_entropy(said, true, reduction="none"))
        found += nats.new_zeros(len(some)).index_add(0, texts, nats).tolist()
    return found


def _both_copies(model: Any, job: Job, found: _Rows) -> tuple[Copies, Copies]:
    """Of members, and of rows held out."""
    train = job.data.train["input_ids"]
    corpus = [train[place] for group in found.members for place in group]
    model.eval()
    return (
        _copies(model, job, job.data.train, found.members[:PREFIXES], corpus),
        _copies(model, job, job.data.validation, found.held_out[:PREFIXES], corpus),
    )


@torch.inference_mode()
def _copies(model: Any, job: Job, rows: Dataset, places: Sequence[Sequence[int]], corpus: list[list[int]]) -> Copies:
    """Write on after a prefix of each row, and compare with how the row goes on."""
    longest, parts, nearest = [], [], []
    for row in (rows[group[0]] for group in places):
        start = _prefix(row["labels"])
        goes_on = row["input_ids"][start : start + _WRITTEN]
        written = _written(model, job, row["input_ids"][:start], len(goes_on))
        longest.append(longest_run(written, [goes_on]))
        parts.append(longest[-1] / len(goes_on))
        nearest.append(longest_run(written, corpus))
    return Copies(tuple(longest), tuple(parts), tuple(nearest))


def _prefix(labels: Sequence[int]) -> int:
    """How many tokens of a row are given: those before its answer; of a text without a prompt, half of it."""
    start = next(place for place, label in enumerate(labels) if label != IGNORED)
    return start if start > 1 else max(1, len(labels) // 2)


def _written(model: Any, job: Job, prefix: list[int], count: int) -> list[int]:
    """What the model writes after some tokens: at each place the likeliest one."""
    ids = torch.tensor([prefix], device=job.base.model.device)
    with job.base.autocast():
        told = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            do_sample=False,
            num_beams=1,
            use_cache=True,
            pad_token_id=job.base.tokenizer.pad_token_id,
        )
    return told[0, len(prefix) :].tolist()


def _digest(file: Path) -> str:
    with open_file(file) as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
