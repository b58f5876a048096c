"""A site reads its file, decides on a task and puts it on its model once; its trainer carries out what was decided."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from nvflare.apis.fl_context import FLContext
from nvflare.app_common.abstract.fl_model import FLModel
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.utils.fl_model_utils import FLModelUtils
from nvflare.fuel.sec.audit import AuditService

from nvflare_fm.adapter import Adapter, RoundTask
from nvflare_fm.config import PersonalizeSettings, RoundPlan, SiteOverrides
from nvflare_fm.errors import FmError, PolicyError
from nvflare_fm.export.folder import read_adapter
from nvflare_fm.flare import executor, gate, trainer, wire
from nvflare_fm.flare.gate import Gate
from nvflare_fm.job.at_home import PERSONAL
from nvflare_fm.site import worker
from nvflare_fm.site.model import attach
from nvflare_fm.site.offer import confine, policy, secret, site_config
from nvflare_fm.site.offer.site_config import FILE_NAME
from nvflare_fm.site.offer.site_file import render
from nvflare_fm.site.peft_methods import lora
from tests.site import tiny

TRAIN, VALIDATE = AppConstants.TASK_TRAIN, AppConstants.TASK_VALIDATION
PLAN = tiny.plan(
    "causal_lm",
    peft={"method": "lora", "rank": 2},
    max_length=16,
    training={"local_steps": 1, "batch_size": 2},
    evaluation={"max_examples": 2},
    negotiable=["batch_size", "rank"],
)
OVERRIDES = SiteOverrides(rank=4, batch_size=4, data="letters")


@pytest.fixture(scope="module")
def site_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kit")
    rows = str(tiny.jsonl(folder / "rows.jsonl", tiny.rows("causal_lm")))
    said = {
        "models": {"base": {"path": str(tiny.save(folder / "model"))}},
        "data": {"letters": {"train": rows, "validation": rows}},
        "privacy": tiny.OPEN,
        "welcome": {"submitters": "*"},
        "limits": {"max_batch_size": 2, "max_rank": 3, "threads": 1},
    }
    (folder / FILE_NAME).write_text(render(said))
    secret.make(folder / FILE_NAME)
    return folder / FILE_NAME


@pytest.fixture(autouse=True)
def _audit(tmp_path: Path) -> Any:
    AuditService.initialize(str(tmp_path / "audit.log"))
    yield
    AuditService.close()


@pytest.fixture
def times(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often a site does what costs time or decides, each by the real function."""
    counted: Counter[str] = Counter()

    def count(name: str, *places: tuple[Any, str]) -> None:
        for module, attribute in places:
            real = getattr(module, attribute)

            def counting(*args: Any, real: Callable[..., Any] = real, **kwargs: Any) -> Any:
                counted[name] += 1
                return real(*args, **kwargs)

            monkeypatch.setattr(module, attribute, counting)

    count("site file", (site_config, "read_yaml"))
    count("gate decides", (gate, "decide"))
    count("trainer checks", (worker, "fit"))
    count("attached", (attach, "wrap"))
    count("rest added", (lora.LoraAttachment, "_add_rest"))
    return counted


@pytest.fixture
def handler(site_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> trainer.TaskHandler:
    """The trainer's own end, outside NVFlare's session, and not confined: it shares this process."""
    monkeypatch.setattr(trainer.flare, "get_site_name", lambda: "site-1")
    monkeypatch.setattr(trainer, "should_stop", lambda: False)
    monkeypatch.setattr(trainer, "_report", lambda *_: None)
    monkeypatch.setattr(confine, "confine", lambda *_: None)
    return trainer.TaskHandler(site_file, tmp_path / "job", tmp_path / "app")


def passed(at: Gate, name: str, task: RoundTask) -> FLModel:
    """A task after the site's gate has let it pass."""
    message = FLModelUtils.to_shareable(wire.write_task(task))
    assert at.decide(name, message, FLContext()) is None
    return FLModelUtils.from_shareable(message)


@pytest.mark.parametrize("rest", ["tail", "none", "all"])
def test_a_site_reads_its_file_once_a_process_and_decides_checks_and_attaches_once_a_round(
    rest: str, site_file: Path, handler: trainer.TaskHandler, times: Counter[str]
) -> None:
    at, plan = Gate(site_file, OVERRIDES, 1), PLAN.model_copy(update={"rest": rest})
    executor._limit_threads(at)
    adapter, manifest = Adapter(), None
    for number in range(2):
        update = wire.read_update(
            handler.answer(TRAIN, passed(at, TRAIN, RoundTask(plan, adapter, manifest, number, 2))), "site-1"
        )
        assert update.report.lowered == ("rank to 3", "batch_size to 2")
        assert all([update.report.before, update.report.after])
        adapter, manifest = update.adapter, update.manifest
        assert times == {
            "site file": 2,  # the gate's process and the trainer's
            "gate decides": number + 1,
            "trainer checks": number + 1,
            "attached": number + 1,
            **({"rest added": number} if rest == "all" and number else {}),
        }
    handler.answer(VALIDATE, passed(at, VALIDATE, RoundTask(plan, adapter, manifest, 2, 2)))
    assert (times["attached"], times["site file"]) == (3, 2)


def test_what_a_site_lowered_is_lowered_once_whoever_looks_again(site_file: Path, handler: trainer.TaskHandler) -> None:
    message = passed(Gate(site_file, OVERRIDES, 1), TRAIN, RoundTask(PLAN))
    decided = wire.read_decided(message).plan
    assert (decided.training.batch_size, decided.training.gradient_accumulation_steps) == (2, 2)
    assert (decided.rank, decided.data) == (3, "letters")
    checked = policy.fit(decided, site_config.load_site(site_file)).plan
    assert checked == decided
    assert wire.read_task(message).plan == PLAN, "what the server asked is there as it came"
    assert not wire.refused(handler.answer(TRAIN, message))
    submitted = wire.read_saved(*_submitted(handler), "site-1")
    assert submitted.plan == PLAN, "other sites measure it by what the server asked, not by this site's aliases"


def _submitted(handler: trainer.TaskHandler) -> tuple[Any, Any]:
    model = handler.answer(AppConstants.TASK_SUBMIT_MODEL, FLModel(params={}, meta={}))
    return model.params, model.meta


def decided(content: Any) -> FLModel:
    model = wire.write_task(RoundTask(PLAN))
    model.meta[wire.KEY]["decided"] = content
    return model


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (None, "wrong_type"),
        ({}, "no_plan"),
        ({"plan": {"rank": 3}, "lowered": []}, "wrong_setting"),
        ({"plan": {}, "lowered": ["rank to 3"] * 17}, "wrong_type"),
        ({"plan": {}, "lowered": "rank to 3"}, "wrong_type"),
        ({"plan": {}}, "incomplete_message"),
    ],
)
def test_a_decision_that_is_none_is_refused(content: Any, code: str) -> None:
    with pytest.raises(FmError) as refused:
        wire.read_decided(decided(content))
    assert refused.value.code == code


def test_the_trainer_carries_out_nothing_that_no_gate_has_decided(handler: trainer.TaskHandler) -> None:
    with pytest.raises(FmError) as refused:
        wire.read_decided(wire.write_task(RoundTask(PLAN)))
    assert refused.value.code == "incomplete_message"
    assert "[incomplete_message]" in (wire.refused(handler.answer(TRAIN, wire.write_task(RoundTask(PLAN)))) or "")


def test_what_a_server_says_of_a_decision_is_replaced_by_the_gates(site_file: Path) -> None:
    model = decided({"plan": PLAN.model_copy(update={"max_length": 9}).model_dump(mode="json"), "lowered": ["x"]})
    message = FLModelUtils.to_shareable(model)
    assert Gate(site_file, OVERRIDES, 1).decide(TRAIN, message, FLContext()) is None
    found = wire.read_decided(FLModelUtils.from_shareable(message))
    assert (found.plan.max_length, found.lowered) == (PLAN.max_length, ("rank to 3", "batch_size to 2"))


def test_a_site_file_that_is_mended_is_read_again(site_file: Path, tmp_path: Path, times: Counter[str]) -> None:
    file = tmp_path / FILE_NAME
    at, message = Gate(file, OVERRIDES, 1), FLModelUtils.to_shareable(wire.write_task(RoundTask(PLAN)))
    executor._limit_threads(at)
    assert at.decide(TRAIN, message, FLContext()) is not None
    file.write_text(site_file.read_text())
    for _ in range(2):
        assert at.decide(TRAIN, message, FLContext()) is None
    assert times["site file"] == 3


def test_after_the_last_round_a_site_trains_for_itself_and_answers_with_nothing(
    site_file: Path, handler: trainer.TaskHandler, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    at, plan = Gate(site_file, OVERRIDES, 1), PLAN.model_copy(update={"personalize": RoundPlan().personalize})
    update = wire.read_update(handler.answer(TRAIN, passed(at, TRAIN, RoundTask(plan))), "site-1")
    asked = plan.model_copy(update={"personalize": PersonalizeSettings(steps=3)})
    home = RoundTask(asked, update.adapter, update.manifest, 1, 1)
    with caplog.at_level("INFO"):
        answer = handler.answer(TRAIN, passed(at, TRAIN, home))
    assert (answer.params, answer.metrics, answer.meta[wire.KEY]) == (None, {}, {"version": wire.VERSION})
    assert wire.says_nothing(answer)
    assert [line for line in caplog.messages if line.startswith("personalize: loss ")]
    assert read_adapter(tmp_path / "job" / PERSONAL).adapter
    refusing = FLModelUtils.to_shareable(wire.write_task(replace(home, plan=plan)))
    reply = at.decide(TRAIN, refusing, FLContext())
    assert reply is not None
    assert "[nothing_to_personalize]" in (wire.refused(FLModelUtils.from_shareable(reply)) or "")


@pytest.mark.parametrize("error", [PolicyError("no", code="few_rows"), ValueError("secret")])
def test_whatever_goes_wrong_at_home_is_one_line_in_the_sites_log(
    error: Exception, site_file: Path, handler: trainer.TaskHandler, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(task: RoundTask) -> None:
        raise error

    handler._loaded().personalize = fail  # type: ignore[method-assign]
    asked = PLAN.model_copy(update={"personalize": PersonalizeSettings(steps=3)})
    message = passed(Gate(site_file, OVERRIDES, 1), TRAIN, RoundTask(asked, round=1, total_rounds=1))
    caplog.clear()
    assert wire.says_nothing(handler.answer(TRAIN, message))
    (line,) = caplog.messages
    assert line.startswith("personalize: ")
    assert line.endswith("[few_rows]" if isinstance(error, FmError) else "[internal]")
    assert "\n" not in line
