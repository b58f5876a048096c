"""Rows that a model wrote, at a site: its own rows vote on them, and some are trained on beside its own.

Whoever wrote them and however many votes they have: no row that is nearly a copy of one of the site's own, that is
there twice, or that has what looks like personal data is trained on. No job and no site file switches that off.
"""

import logging
import zlib
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from math import nextafter
from typing import Any, TypeVar

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..config import RoundPlan, TaskPlan
from ..errors import TrainingError
from ..job.private import check_delta
from ..privacy.events import Event
from ..privacy.protection import Protection
from ..synthesis import keep
from ..synthesis.add import add
from ..synthesis.candidates import CandidateSet
from ..synthesis.embed import Encoder, embed
from ..synthesis.vote import votes
from .data.loading import SiteData, Written, unit_of
from .model.base_model import BaseModel
from .tasks import BadRow, Task
from .tasks.labels import find
from .training.dp import noise_multiplier

log = logging.getLogger(__name__)
T = TypeVar("T")
_AT_ONCE = 1024  # texts that are embedded before the site looks whether it is to stop
_LABELS, _BESIDE, _NOT_SAID = {"label", "labels"}, ("system", "input", "history"), {"role", "from", "type"}


def said(row: Written, task: Task) -> str:
    """All texts of a row that its task reads, whatever the shape it keeps them in."""
    columns = dict.fromkeys(name for group in task.columns for name in group if name not in _LABELS)
    return "\n".join(_texts([row.get(name) for name in (*columns, *_BESIDE)]))


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from _texts([inner for name, inner in value.items() if name not in _NOT_SAID])
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _texts(inner)


def units(own: Sequence[Written], plan: RoundPlan) -> list[Hashable]:
    """Of each row, what tells which record it belongs to."""
    return [number if (unit := unit_of(row, plan)) is None else unit for number, row in enumerate(own)]


def protection(plan: TaskPlan, own: Sequence[Written]) -> Protection:
    """Settle how votes are protected: one release of a sum in which every record has one vote.

    Args:
        own: the rows that vote.
    Raises:
        ConfigError: δ is too large for so few records, or no noise is enough.
    """
    check_delta(plan, len({*units(own, plan)}))
    settings = plan.privacy
    sigma = settings.noise_multiplier
    if sigma is None:
        assert settings.epsilon is not None
        sigma = noise_multiplier(settings.epsilon, settings.delta, 1.0, 1)
    return Protection("votes", plan.data, settings.unit, settings.delta, (Event(sigma, 1.0, 1),))


def count(
    rows: CandidateSet,
    own: Sequence[Written],
    base: BaseModel,
    plan: RoundPlan,
    should_stop: Callable[[], bool],
) -> Tensor:
    """Count the votes of the site's rows, before any noise: a record's rows share one vote.

    Args:
        rows: the candidates.
        own: the site's rows, as they are read.
    Raises:
        TrainingError: it was told to stop.
    """
    encoder, with_label = Encoder(base.model, base.tokenizer), base.task.promises.classes
    return votes(
        _points([said(row, base.task) for row in own], encoder, should_stop),
        [plan.labels[find(row["label"], plan.labels)[0]] if with_label else None for row in own],
        units(own, plan),
        _points(rows.texts, encoder, should_stop),
        rows.labels if with_label else [None] * len(rows.rows),
    )


def _points(texts: Sequence[str], encoder: Encoder, should_stop: Callable[[], bool]) -> Tensor:
    parts = []
    for start in _unless(should_stop, range(0, len(texts), _AT_ONCE)):
        parts.append(embed(texts[start : start + _AT_ONCE], encoder))
    return torch.cat(parts)


def _unless(should_stop: Callable[[], bool], several: Iterable[T]) -> Iterator[T]:
    """Each of several, as long as the site is not to stop."""
    for each in several:
        if should_stop():
            raise TrainingError("stopped at synthetic rows, as told", code="stopped")
        yield each


def added(
    rows: CandidateSet,
    own: Sequence[str],
    found: SiteData,
    plan: RoundPlan,
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    vocabulary: int | None,
    most: int,
    site: str,
    should_stop: Callable[[], bool],
) -> Dataset:
    """Choose the synthetic rows that are trained on beside the site's own, as the plan's share and `most` allow.

    Args:
        own: texts of all the site's rows, those that it is measured on among them.
        found: the site's rows, tokenized.
        vocabulary: how many tokens the base model has rows for.
        site: sites that need few rows of a class begin at different ones of them.
    Raises:
        TrainingError: it was told to stop.
    """
    left_out = {
        **keep.near_copies(rows.texts, _unless(should_stop, own)),
        **keep.personal_data(rows.texts),
        **keep.duplicates(rows.texts),
    }
    usable: dict[int, dict[str, Any]] = {}
    for place, candidate in enumerate(rows.rows):
        if place not in left_out:
            try:
                (usable[place],) = task.encode(candidate.row, tokenizer, plan).examples
                if vocabulary is not None and max(usable[place]["input_ids"]) >= vocabulary:
                    raise BadRow("it has a token that the base model has no row for", code="token_without_row")
            except BadRow as reason:
                usable.pop(place, None)
                left_out[place] = str(reason)
    places, examples = list(usable), len(found.train)
    labels, turn = [rows.rows[place].label for place in places], zlib.crc32(site.encode())
    chosen = add(_counts(found, plan, task), labels, _share(plan, examples, most), turn)
    reasons = "; ".join(f"{times} × {reason}" for reason, times in Counter(left_out.values()).most_common())
    told = f"; left out: {reasons}" if reasons else ""
    log.warning(
        "%d of %d synthetic rows are added to %d of the site's own%s", len(chosen), len(rows.rows), examples, told
    )
    if not chosen:
        return found.train.select([])
    return Dataset.from_list([usable[places[i]] for i in chosen], features=found.train.features)


def _counts(found: SiteData, plan: RoundPlan, task: Task) -> dict[str, int]:
    if not task.promises.classes:
        return {"": len(found.train)}
    counts = task.class_counts(found.train, plan).tolist()
    return {label: int(count) for label, count in zip(plan.labels, counts, strict=True)}


def _share(plan: RoundPlan, examples: int, most: int) -> float:
    """The share that the plan allows, or the one at which `most` rows are added, if that is less."""
    return min(plan.synthetic.share, nextafter(most / (examples + most), 1.0))  # rounded up, or one less is added
