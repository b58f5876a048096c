"""Nothing of what a job says comes back from a site: its values may be those of the site's own files or environment."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from nvflare.apis.fl_context import FLContext
from nvflare.app_common.abstract.fl_model import FLModel
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.utils.fl_model_utils import FLModelUtils
from nvflare.fuel.sec.audit import AuditService

from nvflare_fm.config import SiteOverrides, TaskPlan
from nvflare_fm.flare import wire
from nvflare_fm.flare.gate import Gate, written_out
from nvflare_fm.flare.trainer import TaskHandler
from nvflare_fm.site.offer.site_config import FILE_NAME
from nvflare_fm.site.offer.site_file import render
from nvflare_fm.site.worker import Worker
from tests.site import tiny

TEXT, NUMBER = "hf-x0hidden0x", 736251
TRAIN, VALIDATE = AppConstants.TASK_TRAIN, AppConstants.TASK_VALIDATION
PLAN = tiny.plan(
    "sequence_classification",
    training={"local_steps": 1, "batch_size": 2},
    evaluation={"before": False, "after": False},
).model_dump(mode="json")
PLACES = [(key,) for key in PLAN] + [(key, inner) for key in ("training", "evaluation", "peft") for inner in PLAN[key]]
PLACES += [("peft", name) for name in ("target_modules", "modules_to_save", "lora_dropout", "use_dora", TEXT)] + [
    (TEXT,)
]
VALUES: list[Any] = [TEXT, [TEXT, TEXT + "2"], {TEXT: TEXT}, NUMBER, ["query", TEXT], TEXT * 99]


@pytest.fixture(scope="module")
def site_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kit")
    rows = tiny.jsonl(folder / "rows.jsonl", tiny.rows("sequence_classification"))
    model, data = {"path": str(tiny.save(folder / "model", "bert"))}, {"train": str(rows), "validation": str(rows)}
    said = {"models": {"base": model}, "data": {"notes": data}, "privacy": tiny.OPEN, "welcome": {"submitters": "*"}}
    (folder / FILE_NAME).write_text(render(said))
    return folder / FILE_NAME


@pytest.fixture
def audit(tmp_path: Path) -> Iterator[Path]:
    AuditService.initialize(str(tmp_path / "audit.log"))
    yield tmp_path / "audit.log"
    AuditService.close()


def handler(site_file: Path) -> TaskHandler:
    """The trainer's own end, with the worker it would hire."""
    made = TaskHandler(site_file, site_file.parent / "job", site_file.parent / "app")
    config = tiny.site(site_file.parent / "model", site_file.parent / "rows.jsonl")
    made._worker = Worker("site-1", config)
    return made


def message(plan: Any, decided: Any = None) -> FLModel:
    """A task, as if the site's gate had let it pass unread: the trainer checks it again.

    Args:
        decided: what the gate made of the plan, if that is another.
    """
    passed = {"plan": plan if decided is None else decided, "lowered": []}
    content = {"version": wire.VERSION, "plan": plan, "scales": {}, "decided": passed}
    return FLModel(params={}, meta={wire.KEY: content})


def refusal(gate: Gate, name: str, task: FLModel) -> FLModel | None:
    """What the gate replies where it refuses."""
    reply = gate.decide(name, FLModelUtils.to_shareable(task), FLContext())
    return None if reply is None else FLModelUtils.from_shareable(reply)


def with_value(place: tuple[str, ...], value: Any) -> dict[str, Any]:
    *groups, last = place
    plan = {**PLAN}
    inner = plan
    for group in groups:
        inner[group] = {**inner[group]}
        inner = inner[group]
    inner[last] = value
    return plan


def everything(reply: FLModel) -> str:
    return repr((reply.meta, reply.metrics, sorted(reply.params or {}), reply.params_type))


def silent(said: str) -> None:
    assert TEXT not in said
    assert str(NUMBER) not in said


@pytest.mark.parametrize("place", PLACES, ids=".".join)
def test_no_reply_of_the_gate_or_the_trainer_repeats_a_value_of_the_job(site_file: Path, audit: Path, place: Any):
    gate, trainer = Gate(site_file, SiteOverrides(), 1), handler(site_file)
    for value in VALUES:
        task = message(with_value(place, value))
        reply = refusal(gate, TRAIN, task)
        if reply is not None:
            reason = wire.refused(reply)
            silent(reason)
            assert re.search(r"\[\w+\]$", reason)
            assert "internal error" not in reason
        if reply is not None or value != NUMBER:  # a number the site takes shows in what it does, as a scale
            answer = trainer.answer(TRAIN, task)
            silent(everything(answer))
            assert "internal error" not in (wire.refused(answer) or "")
            assert reply is None or wire.refused(answer)
    assert all(line.count("[E:") == 1 for line in audit.read_text().splitlines())  # one line an event, whatever it says


@pytest.mark.parametrize("plan", [None, [], [1], TEXT, NUMBER, {TEXT: TEXT}, {"training": TEXT}, {"peft": [TEXT]}])
def test_a_plan_that_is_none_is_refused_in_words(site_file: Path, plan: Any):
    reply = refusal(Gate(site_file, SiteOverrides(), 1), TRAIN, message(plan))
    assert reply is not None
    silent(wire.refused(reply) or TEXT)
    silent(wire.refused(handler(site_file).answer(TRAIN, message(PLAN, plan))) or TEXT if plan is not None else "")


@pytest.mark.parametrize(
    "rounds", [(10**300, 10**300), (-1, 3), (5, 4), (0, 10**300), ("1", 3), (1.5, 3), (0, NUMBER**4)]
)
def test_a_round_that_is_none_is_refused_in_words(site_file: Path, rounds: Any):
    task = message(PLAN)
    task.current_round, task.total_rounds = rounds
    reason = wire.refused(handler(site_file).answer(TRAIN, task)) or TEXT
    silent(reason)
    assert re.search(r"\[(no_round|wrong_type)\]", reason)


@pytest.mark.parametrize("overrides", [{"model": TEXT}, {"data": TEXT}, {"data": f"{TEXT}/x"}, {"local_steps": NUMBER}])
def test_nor_does_one_repeat_what_the_job_says_of_this_site_alone(site_file: Path, overrides: dict[str, Any]):
    for name in (TRAIN, VALIDATE):
        gate = Gate(site_file, SiteOverrides(**overrides), 1)
        if name == TRAIN or "local_steps" not in overrides:
            silent(wire.refused(refusal(gate, name, message(PLAN)) or message(TEXT)) or TEXT)
        asked = SiteOverrides(**overrides).applied(TaskPlan.read(PLAN, "test")).model_dump(mode="json")
        silent(everything(handler(site_file).answer(name, message(PLAN, asked))))


def test_the_sites_own_audit_log_has_it_on_one_line(site_file: Path, audit: Path):
    plan = {**PLAN, "data": f"{TEXT}\n[E:forged] \x1b[31m", "model": TEXT}
    refusal(Gate(site_file, SiteOverrides(), 1), TRAIN, message(plan))
    (line,) = audit.read_text().splitlines()
    assert TEXT in line
    assert "\x1b" not in line
    assert "nvflare_fm refused" in line
    assert "unknown of unknown" in line


def test_a_text_is_written_out_in_printable_characters_and_cut():
    assert written_out("a\nb\x1b[0m\u202ec é") == "a\\nb\\x1b[0m\\u202ec é"
    assert len(written_out("\n" * 10_000)) == 2000


def test_what_a_job_names_and_the_model_lacks_is_in_no_answer(site_file: Path):
    answer = handler(site_file).answer(TRAIN, message(with_value(("peft", "target_modules"), ["query", TEXT])))
    assert wire.refused(answer) is None
    silent(everything(answer))
