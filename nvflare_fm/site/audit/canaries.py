"""Canaries: rows that a site makes up and trains on, or not, by the toss of a coin. After training they show leaks.

`plant` writes a data set anew with those canaries among its training rows whose coins show heads, and a record of all
of them. The record stays in the site's kit, and only the user who runs the site may read it.
"""

import json
import os
import secrets
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random, SystemRandom
from typing import Annotated, Any, Literal

from pydantic import Field
from transformers import PreTrainedTokenizerBase

from ...at_rest import replacing
from ...config import Name, RoundPlan, Settings
from ...errors import ConfigError, DataError
from ...files import MIB, open_file, read_object
from ...privacy.audit.one_run import LEAST, MOST
from ..data.loading import Examples, as_written
from ..model import base_model
from ..model.base_model import BaseModel
from ..model.fingerprint import read_config
from ..offer.site_config import SiteConfig
from ..tasks import BadRow, Cut, Task
from ..tasks import registry as tasks

FOLDER, TRAIN, VALIDATION, RECORD = "fm_canaries", "train.jsonl", "validation.jsonl", "canaries.json"
ROW = "row"  # the unit of privacy that is no column
_RECORD_LIMIT = 64 * MIB


class Canary(Settings):
    """A row that was made up, and its coin."""

    row: Mapping[str, Any]
    included: bool


class Record(Settings):
    """The content of `canaries.json`.

    Args:
        seed: of the alternatives with which secrets are compared.
    """

    version: Literal[1] = 1
    task: Name
    seed: int = Field(ge=0, lt=2**64)
    canaries: Annotated[tuple[Canary, ...], Field(min_length=LEAST, max_length=MOST)]


@dataclass(frozen=True)
class Planted:
    """What `plant` wrote."""

    folder: Path
    rows: int  # to train on, without canaries
    held_out: int
    canaries: int


def plant(site: SiteConfig, plan: RoundPlan, count: int, folder: Path) -> Planted:
    """Write a data set of the site with canaries among its training rows, and a record of their coins.

    The rows to measure on are those of the data set as it is, so a job measures on the same rows as before.

    Args:
        plan: names data set, model, task and labels; a row that cannot be used for them is left out.
        count: of canaries, of which about half are trained on.
        folder: to write; must not exist yet, for its coins could not be told any more.
    Raises:
        ConfigError: the folder exists, or the count is out of bounds.
        FmError: the data set or the tokenizer cannot be read.
    """
    if not LEAST <= count <= MOST:
        raise ConfigError(f"--count must be between {LEAST} and {MOST}", code="canary_count")
    if folder.exists():
        raise ConfigError(
            f"{folder} exists already, and adapters may have been trained on its canaries; move it away, or give "
            "--output another folder",
            code="output_exists",
        )
    kind = tasks[plan.task]
    kind.check_labels(plan)
    source = base_model.locate(site.model(plan.model))
    tokenizer, words = base_model.load_tokenizer(source), base_model.vocabulary(read_config(source))
    train, validation = as_written(site.data_set(plan.data), plan, kind, tokenizer, words)
    made = made_up(plan, count, SystemRandom())
    if not all(_is_whole(canary, kind, tokenizer, plan) for canary in made):
        raise ConfigError(
            f"a canary is longer than max_length = {plan.max_length} tokens; give the max_length of the jobs, and if "
            "this is it, this data set can have no canaries",
            code="canary_too_long",
        )
    record = Record(task=plan.task, seed=secrets.randbits(64), canaries=made)
    with replacing(folder) as beside:
        beside.chmod(stat.S_IRWXU)
        _write(beside / TRAIN, _lines([*train, *(canary.row for canary in made if canary.included)]))
        _write(beside / VALIDATION, _lines(validation))
        _write(beside / RECORD, [json.dumps(record.model_dump())])
    return Planted(folder, len(train), len(validation), count)


def _is_whole(canary: Canary, kind: Task, tokenizer: PreTrainedTokenizerBase, plan: RoundPlan) -> bool:
    try:
        return kind.encode(canary.row, tokenizer, plan).cut == Cut()
    except BadRow:
        return False


def made_up(plan: RoundPlan, count: int, random: Random) -> tuple[Canary, ...]:
    """Make canaries, and toss a coin for each. Each is a record of its own, whatever column says whose a row is."""
    kind, unit = tasks[plan.task], plan.privacy.unit
    made = []
    for _ in range(count):
        owner = {} if unit == ROW else {unit: f"canary {random.getrandbits(64):016x}"}
        made.append(Canary(row={**owner, **kind.canary(plan, random)}, included=random.random() < 0.5))
    return tuple(made)


def record_of(train: str) -> Record | None:
    """Read the record beside a file of training rows; None where there is none.

    Raises:
        ConfigError: it is malformed, or others may read it.
    """
    file = Path(train).with_name(RECORD)
    if not file.exists():
        return None
    try:
        with open_file(file) as opened:
            mode = os.fstat(opened.fileno()).st_mode
        found = Record.read(read_object(file, _RECORD_LIMIT), RECORD)
        if mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise ValueError("others may read or write it")
    except (OSError, ValueError, ConfigError) as error:
        raise ConfigError(
            f"the record of the canaries, {RECORD} beside the training rows, cannot be used; it must be as nvflare-fm "
            "site canaries wrote it, and its owner alone may read it",
            f"{file}: {error}",
            code="canary_record",
        ) from None
    return found


def encoded(rows: Iterable[Mapping[str, Any]], base: BaseModel, plan: RoundPlan) -> list[Examples]:
    """What made-up rows become.

    Raises:
        DataError: the plan is for other labels or shorter texts.
    """
    try:
        return [base.task.encode(row, base.tokenizer, plan).examples for row in rows]
    except (MemoryError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as reason:  # as `data.loading`: what is written in Rust panics with no Exception
        raise DataError(
            "the canaries do not fit this adapter's task, labels or max_length; plant others for its jobs",
            str(reason) if isinstance(reason, BadRow) else type(reason).__name__,
            code="canaries_do_not_fit",
        ) from None


def alternatives(row: Mapping[str, Any], count: int, plan: RoundPlan, seed: int) -> list[Mapping[str, Any]]:
    """A canary of `causal_lm` with other secrets, drawn as its own was."""
    kind, random = tasks[plan.task], Random(f"{seed}/{row.get('prompt')}")
    return [{**row, "completion": kind.canary(plan, random)["completion"]} for _ in range(count)]


def _lines(rows: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    return (json.dumps(row, default=str) for row in rows)


def _write(file: Path, lines: Iterable[str]) -> None:
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as opened:
        opened.writelines(f"{line}\n" for line in lines)
