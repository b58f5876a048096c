"""Under a floor nothing leaves a site but updates that are protected and paid for, and reasons without rows in them."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from nvflare.apis.dxo import DXO, DataKind, MetaKey
from nvflare.apis.fl_constant import FilterKey, FLContextKey, ReservedTopic, ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.fl_exception import UnsafeJobError
from nvflare.apis.shareable import Shareable, make_reply
from nvflare.app_common.abstract.fl_model import FLModel, ParamsType
from nvflare.app_common.utils.fl_model_utils import FLModelUtils
from nvflare.private.privacy_manager import Scope

from nvflare_fm.adapter import Adapter, AdapterUpdate, Report
from nvflare_fm.config import SiteOverrides, TaskPlan
from nvflare_fm.errors import WireError
from nvflare_fm.flare import egress, wire
from nvflare_fm.flare.egress import ASKED, Egress, EgressFilter, fingerprint, in_force, stop_messages
from nvflare_fm.flare.gate import Gate
from nvflare_fm.privacy.budget import NAME, Budget
from nvflare_fm.privacy.disclosed import told
from nvflare_fm.privacy.egress import KEPT, TOLD, Asked, public_reason
from nvflare_fm.privacy.events import Event
from nvflare_fm.site.offer.site_config import FILE_NAME, load_site
from nvflare_fm.site.offer.site_file import render
from tests.flare.messages import MANIFEST, adapter, same

SECRET = "Xanthelasma-9"  # in whatever tells something of the rows
EVENT = Event(1.0, 0.01, 20)
OFFER = {"models": {"base": {"path": "m"}}, "data": {"notes": {"train": "n"}}, "welcome": {"submitters": "*"}}
ROWS = Report(
    examples=44, tokens=4321, steps=20, loss=0.123, seconds=9.87, peak_memory_mib=77.7, rank=3, quantization="nf4",
    before={"loss": 0.456}, after={"accuracy": 0.789}, bad_rows=5, label_skew=0.321, lowered=("rank to 3", SECRET),
)  # fmt: skip
FLOOR = {"max_epsilon": 8.0}


def plan(**more: Any) -> TaskPlan:
    return TaskPlan.read({"privacy": {"epsilon": 8.0}, "peft": {"method": "lora", "rank": 3}} | more, "plan")


def stated(**more: Any) -> dict[str, Any]:
    """A trainer's record of its protection, as it travels to the site's egress."""
    events = more.pop("events", [EVENT])
    said = {"mechanism": "dp_sgd", "data": "notes", "unit": "row", "delta": 1e-5} | more
    return said | {"events": [asdict(event) for event in events]}


def update(protection: Any = None, report: Report = ROWS, of: Adapter | None = None) -> Shareable:
    model = wire.write_update(AdapterUpdate("here", of or adapter(1), MANIFEST, report))
    if protection is not None:
        model.meta[wire.KEY]["protection"] = protection
    return FLModelUtils.to_shareable(model)


def site(folder: Path, privacy: dict[str, Any] | None) -> Egress:
    file = folder / FILE_NAME
    file.write_text(render(OFFER | ({"privacy": privacy} if privacy else {})))
    return Egress(file, lambda: load_site(file))


def context(asked: TaskPlan | None = None, names: Any = (), round: int = 4, job: str = "job-1") -> FLContext:
    made = FLContext()
    made.set_prop(FLContextKey.CURRENT_RUN, job)
    made.set_prop(FLContextKey.JOB_META, {"submitter_name": "lead@x.example", "submitter_org": "company"})
    if asked:
        made.set_prop(ASKED, Asked(asked, round, 10, frozenset(names)), private=True, sticky=False)
    return made


def content(left: Shareable) -> dict[str, Any]:
    return dict(FLModelUtils.from_shareable(left).meta[wire.KEY])


def code(left: Shareable) -> str:
    """Of the refusal that left in an answer's place, which holds nothing else."""
    said = content(left)
    assert said.keys() == {"version", "refused"}
    assert not FLModelUtils.from_shareable(left).params
    assert SECRET not in str(left)
    return str(said["refused"]).rpartition("[")[2].removesuffix("]")


# --- with a floor


def test_a_protected_update_leaves_paid_for_and_tells_nothing_of_the_rows(tmp_path: Path):
    made = site(tmp_path, FLOOR)
    left = made.process(update(stated()), context(plan()))
    got = wire.read_update(FLModelUtils.from_shareable(left), "here")
    assert same(got.adapter, adapter(1))
    assert got.manifest == MANIFEST
    told_of = Report(steps=20, rank=3, quantization="nf4", lowered=("rank to 3",), epsilon=8.0)
    assert str(got.report) == str(told_of)
    assert content(left)["protection"] == {"mechanism": "dp_sgd", "unit": "row", "delta": 1e-5, "epsilon": 8.0}
    for told_of_rows in ("44", "4321", "0.123", "9.87", "77.7", "0.456", "0.789", "0.321", "0.01", SECRET, "notes"):
        assert told_of_rows not in str({k: v for k, v in content(left).items() if k != "manifest"})
    (line,) = made.budget.verify().entries
    assert (line.job, line.submitter, line.org, line.round) == ("job-1", "lead@x.example", "company", 4)
    assert (line.data, line.unit, line.events, line.bytes) == ("notes", "row", (EVENT,), adapter(1).bytes())
    assert line.digest == fingerprint(FLModelUtils.from_shareable(left))[0]


@pytest.mark.parametrize(
    ("privacy", "protection", "expected"),
    [
        (FLOOR, None, "unprotected"),
        ({"required_protection": "clip"}, None, "unprotected"),
        ({"required_protection": "noise"}, None, "unprotected"),
        ({"required_protection": "encryption"}, stated(), "unprotected"),
        (FLOOR | {"unit": "patient_id"}, stated(), "weak_unit"),
        (FLOOR | {"delta": 1e-6}, stated(), "weak_delta"),
        (FLOOR, stated(data="visits"), "other_protection"),
        ({"max_epsilon": 0.1}, stated(), "budget_spent"),
        (FLOOR, stated(events=[Event(0.3, 1.0, 9)]), "budget_spent"),
        (FLOOR, stated(events=[]), "reason_withheld"),
        (FLOOR, stated(mechanism="none"), "reason_withheld"),
        (FLOOR, stated() | {"events": [{"noise_multiplier": 0.0, "sample_rate": 0.1}]}, "reason_withheld"),
        (FLOOR, {"mechanism": "dp_sgd", "unit": "row", "delta": 1e-5, "epsilon": 1.0}, "reason_withheld"),
        (FLOOR, "dp_sgd", "reason_withheld"),
    ],
)
def test_an_update_that_is_not_protected_as_the_site_demands_stays(
    tmp_path: Path, privacy: Any, protection: Any, expected: str
):
    made = site(tmp_path, privacy)
    assert code(made.process(update(protection), context(plan()))) == expected
    assert not made.budget.verify().entries


def test_an_update_that_nobody_asked_for_or_of_other_tensors_stays(tmp_path: Path):
    made, names = site(tmp_path, FLOOR), adapter(1).tensors().keys()
    assert code(made.process(update(stated()), context())) == "unasked_message"
    assert code(made.process(update(stated()), context(plan(), [*names][1:]))) == "unasked_message"
    assert code(made.process(update(stated(), of=adapter(1, rank=4)), context(plan()))) == "unasked_message"
    extra = replace(adapter(1), dense={"head": torch.ones(2), "rows": torch.ones(9)})
    assert code(made.process(update(stated(), of=extra), context(plan(), names))) == "unasked_message"
    assert not made.budget.verify().entries
    assert "refused" not in content(made.process(update(stated()), context(plan(), names)))


def test_an_update_larger_than_the_site_allows_stays(tmp_path: Path):
    file = tmp_path / FILE_NAME
    file.write_text(render(OFFER | {"privacy": FLOOR, "limits": {"max_adapter_mib": 1e-4}}))
    made = Egress(file, lambda: load_site(file))
    assert code(made.process(update(stated()), context(plan()))) == "above_limit"
    assert not made.budget.verify().entries


def test_a_job_is_told_what_it_has_cost_and_other_jobs_count_too(tmp_path: Path):
    made = site(tmp_path, {"max_epsilon": 1.0})
    noise = plan(privacy={"noise_multiplier": 1.0})
    jobs = [("a", 0), ("a", 1), ("b", 0), ("c", 9)]
    costs = [content(made.process(update(stated()), context(noise, round=r, job=job)))["protection"] for job, r in jobs]
    assert [said["epsilon"] for said in costs] == [1.0, 1.0, 1.0, 0.5]  # of ten rounds, and of one
    answers = [made.process(update(stated()), context(plan(), job="c")) for _ in range(60)]
    assert code(answers[-1]) == "budget_spent"
    assert Budget(tmp_path / NAME).spent("notes", "row", 1e-5) <= 1.0


def test_measurements_and_submissions_stay(tmp_path: Path):
    made, of = site(tmp_path, FLOOR), context(plan())
    measured = FLModelUtils.to_shareable(wire.write_metrics({"loss": 0.5}))
    assert code(made.process(measured, of)) == "metrics_withheld"
    submitted = FLModelUtils.to_shareable(wire.write_submission(adapter(1), MANIFEST, plan()))
    assert code(made.process(submitted, of)) == "submission_withheld"


def test_an_answer_that_holds_nothing_leaves_and_is_nothing(tmp_path: Path):
    made, of = site(tmp_path, FLOOR), context(plan())
    answer = FLModelUtils.to_shareable(wire.write_nothing())
    answer.set_header("beside", SECRET)
    left = made.process(answer, of)
    assert SECRET not in str(left)
    assert wire.says_nothing(FLModelUtils.from_shareable(left))


def test_a_reason_that_follows_from_the_job_leaves_and_any_other_stays(tmp_path: Path):
    made = site(tmp_path, FLOOR)
    for reason in ("plain", f"row {SECRET} cannot be read [bad_row]", f"{SECRET} [few_rows]", f"{SECRET} [{SECRET}]"):
        left = made.process(FLModelUtils.to_shareable(wire.write_refusal(reason)), context(plan()))
        assert content(left) == {"version": 1, "refused": KEPT}
    for known in TOLD:
        reason = f"peft.rank is more than the 8 this site allows [{known}]"
        left = made.process(FLModelUtils.to_shareable(wire.write_refusal(reason)), context(plan()))
        assert content(left) == {"version": 1, "refused": reason}


@pytest.mark.parametrize("how", ["return code", "header", "peer", "cookie", "own code"])
def test_of_an_error_its_code_leaves_and_nothing_beside_it(tmp_path: Path, how: str):
    reply = make_reply(ReturnCode.EXECUTION_EXCEPTION, headers={"why": SECRET})
    reply["why"] = SECRET
    if how == "own code":
        reply.set_return_code(SECRET)
    left = site(tmp_path, FLOOR).process(reply, context(plan()))
    assert left.get_return_code() == ReturnCode.EXECUTION_EXCEPTION
    assert SECRET not in str(left)
    assert left.keys() == make_reply(ReturnCode.EXECUTION_EXCEPTION).keys()


def test_what_other_components_make_stays(tmp_path: Path):
    made, bare = site(tmp_path, FLOOR), Shareable()
    bare["rows"] = SECRET
    weights = DXO(DataKind.WEIGHTS, {SECRET: torch.ones(2)}, {"rows": SECRET}).to_shareable()
    metrics = DXO(DataKind.ANALYTIC, {"value": SECRET}).to_shareable()
    for foreign in (bare, weights, metrics, FLModelUtils.to_shareable(FLModel(metrics={SECRET: 1.0}))):
        left = made.process(foreign, context(plan()))
        assert left.get_return_code() == ReturnCode.TASK_RESULT_FILTER_ERROR
        assert SECRET not in str(left)


def test_what_is_put_beside_an_update_stays(tmp_path: Path):
    answer = update(stated())
    answer["beside"] = SECRET
    answer.set_header("beside", SECRET)
    answer["DXO"]["meta"]["beside"] = SECRET
    answer["DXO"]["meta"][wire.KEY] |= {"beside": SECRET, "lowered": SECRET}
    answer["DXO"]["meta"][wire.KEY]["manifest"] |= {"beside": SECRET}
    answer["DXO"]["meta"][wire.KEY]["report"] |= {"beside": SECRET, "epsilon": 0.001}
    left = site(tmp_path, FLOOR).process(answer, context(plan()))
    assert "report" in content(left)
    assert SECRET not in str(left)
    assert content(left)["report"]["epsilon"] is None


def test_where_the_site_file_or_the_budget_is_damaged_nothing_leaves(tmp_path: Path):
    made = site(tmp_path, FLOOR)
    made.budget.file.write_text("{}\n")
    assert code(made.process(update(stated()), context(plan()))) == "budget_damaged"
    (tmp_path / FILE_NAME).write_text("privacy: {max_epsilon: much}")
    for answer in (update(), update(stated()), FLModelUtils.to_shareable(wire.write_metrics({"loss": 1.0}))):
        assert code(made.process(answer, context(plan()))) == "site_file_wrong"
    (tmp_path / FILE_NAME).unlink()
    assert code(made.process(update(), context(plan()))) == "site_file_unreadable"


@pytest.mark.parametrize("error", [RuntimeError, UnsafeJobError, RecursionError])  # NVFlare ends a job it calls unsafe
def test_an_error_in_the_filter_costs_one_message_and_says_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
):
    def broken(*args: Any) -> None:
        raise error(SECRET)

    made = site(tmp_path, FLOOR)
    monkeypatch.setattr(egress.wire, "read_outgoing", broken)
    assert code(made.process(update(stated()), context(plan()))) == "egress_failed"
    monkeypatch.undo()
    assert "refused" not in content(made.process(update(stated()), context(plan())))


SHAPES = st.recursive(
    st.sampled_from([None, True, 0, -1, 2.5, float("nan"), SECRET, b"x", torch.ones(2)]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*"ab", wire.KEY]), inner, max_size=3),
    max_leaves=6,
)
KEYS = ["version", "refused", "report", "scales", "manifest", "encoded", "protection", "plan", "round", "x"]
CONTENT = st.dictionaries(st.sampled_from(KEYS), SHAPES | st.sampled_from([1, {}, stated()]), max_size=5)


@pytest.fixture(scope="module")
def floored(tmp_path_factory: pytest.TempPathFactory) -> Egress:
    return site(tmp_path_factory.mktemp("floored"), FLOOR)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    said=CONTENT,
    params=st.none() | st.dictionaries(st.text(max_size=4) | st.just("a.lora_A.weight"), SHAPES, max_size=2),
    metrics=st.none() | st.dictionaries(st.text(max_size=4), st.floats(), max_size=2),
)
@example(said={"version": SECRET}, params=None, metrics=None)
def test_whatever_is_no_protected_update_of_ours_stays(floored: Egress, said: Any, params: Any, metrics: Any):
    answer = FLModelUtils.to_shareable(FLModel(params_type=ParamsType.FULL, params={}, metrics={}, meta={}))
    answer["DXO"] |= {"data": params, "meta": {wire.KEY: {"version": 1} | said, MetaKey.INITIAL_METRICS: metrics}}
    left = floored.process(answer, context(plan()))
    assert SECRET not in str(left)
    assert "lora_A" not in str(left)
    assert left.get_return_code() != ReturnCode.OK or content(left).keys() in ({"version", "refused"}, {"version"})
    if "refused" not in content(left) and left.get_return_code() == ReturnCode.OK:
        assert not params
        assert not metrics, "only an answer that holds nothing leaves as it is"


@given(text=st.text(max_size=30), ends=st.sampled_from([*TOLD, "few_rows", "", SECRET]))
def test_only_known_codes_let_a_reason_out(text: str, ends: str):
    reason = f"{text} [{ends}]"
    assert public_reason(reason) == (reason if ends in TOLD else KEPT)


# --- what is told of ε


@given(epsilon=st.floats(1e-6, 1e6), asked=st.none() | st.floats(1e-3, 100))
def test_what_is_told_of_epsilon_bounds_it_and_takes_few_values(epsilon: float, asked: float | None):
    said = told(epsilon, asked)
    assert said >= epsilon
    assert said == asked or (f"{said:.0e}"[0] in "125" and said <= max(2.6 * epsilon, 0.001))
    assert asked is None or epsilon > asked or said == asked  # it tells nothing of the site


def test_a_server_is_told_the_public_part_alone_and_believes_nothing_else():
    for more, fails in (({}, False), ({"data": "notes"}, True), ({"events": []}, True), ({"epsilon": -1.0}, True)):
        model = FLModelUtils.from_shareable(update(report=replace(ROWS, epsilon=0.001)))
        model.meta[wire.KEY]["protection"] = {
            "mechanism": "dp_sgd",
            "unit": "row",
            "delta": 1e-5,
            "epsilon": 2.0,
        } | more
        if fails:
            with pytest.raises(WireError) as error:
                wire.read_update(model, "here")
            assert error.value.code == "protection_not_public"
        else:
            assert wire.read_update(model, "here").report.epsilon == 2.0
    unprotected = FLModelUtils.from_shareable(update(report=replace(ROWS, epsilon=0.001)))
    assert wire.read_update(unprotected, "here").report.epsilon is None


# --- without a floor


def test_without_a_floor_everything_passes_as_it_is(tmp_path: Path):
    made, bare = site(tmp_path, None), Shareable()
    bare["rows"] = 1
    for answer in (
        update(),
        bare,
        make_reply(ReturnCode.EXECUTION_EXCEPTION, headers={"why": "so"}),
        FLModelUtils.to_shareable(wire.write_metrics({"loss": 0.5})),
        FLModelUtils.to_shareable(wire.write_submission(adapter(1), MANIFEST, plan())),
        FLModelUtils.to_shareable(wire.write_refusal("row 7 [bad_row]")),
        DXO(DataKind.WEIGHTS, {"a": torch.ones(2)}).to_shareable(),
    ):
        before = str(answer)
        assert made.process(answer, context(plan())) is answer
        assert str(answer) == before
    assert not made.budget.file.exists()


def test_without_a_floor_a_protected_update_is_paid_for_and_its_record_stays(tmp_path: Path):
    made, answer = site(tmp_path, {"counts": ["examples"]}), update(stated())
    params = answer["DXO"]["data"]
    left = made.process(answer, context(plan()))
    assert left["DXO"]["data"] is params  # no tensor is touched
    got = wire.read_update(FLModelUtils.from_shareable(left), "here")
    assert got.report == replace(ROWS, epsilon=8.0)
    assert content(left)["protection"].keys() == {"mechanism", "unit", "delta", "epsilon"}
    assert len(made.budget.verify().entries) == 1


def test_a_tensor_that_is_still_elsewhere_is_not_fetched_for_the_account(tmp_path: Path):
    made, answer = site(tmp_path, None), update(stated())
    answer["DXO"]["data"] = dict.fromkeys(answer["DXO"]["data"], object())
    made.process(answer, context(plan()))
    (line,) = made.budget.verify().entries
    assert (line.digest, line.bytes) == ("", 0)


def test_without_a_floor_a_record_that_is_malformed_or_cannot_be_paid_for_keeps_the_update(tmp_path: Path):
    made = site(tmp_path, None)
    assert "refused" in content(made.process(update(stated(events=[])), context(plan())))
    made.budget.file.write_text("{}\n")
    assert code(made.process(update(stated()), context(plan()))) == "budget_damaged"


# --- the gate, and other ways out


def scoped(*filters: Any) -> FLContext:
    scope, made = Scope(), context()
    for each in filters:
        scope.add_task_result_filter(each, FilterKey.OUT)
    made.set_prop(FLContextKey.SCOPE_OBJECT, scope, private=True)
    return made


class Other(EgressFilter):
    """A filter of the site's own."""


def test_the_filter_is_in_force_where_the_scope_of_the_job_ends_with_it():
    assert in_force(scoped(EgressFilter()))
    assert in_force(scoped(Other(), EgressFilter()))
    for way_around in (context(), scoped(), scoped(Other()), scoped(EgressFilter(), Other())):
        assert not in_force(way_around)


@pytest.mark.parametrize("privacy", [FLOOR, None])
def test_the_gate_works_under_a_floor_only_where_the_filter_is_in_force(tmp_path: Path, privacy: Any):
    site(tmp_path, privacy)
    gate = Gate(tmp_path / FILE_NAME, SiteOverrides(), 1)

    def asked(name: str, where: FLContext, what: TaskPlan | None = None) -> str:
        said = {"version": 1, "scales": {}} | ({"plan": what.model_dump(mode="json")} if what else {})
        model = FLModel(params={}, meta={wire.KEY: said} if what else {}, current_round=2, total_rounds=9)
        reply = gate.decide(name, FLModelUtils.to_shareable(model), where)
        return "" if reply is None else code(reply)

    forced = scoped(EgressFilter())
    assert asked("train", forced, plan()) == ""
    assert forced.get_prop(ASKED).round == 2
    assert forced.get_prop(ASKED).plan.evaluation.before is (privacy is None)
    assert asked("train", context(), plan()) == ("no_egress" if privacy else "")
    assert asked("submit_model", forced) == ("submission_withheld" if privacy else "")
    assert asked("validate", forced, plan()) == ("metrics_withheld" if privacy else "")
    assert asked("train", forced, plan(privacy={})) == ("unprotected" if privacy else "")


class Runner:
    """What NVFlare sends messages with."""

    def __init__(self) -> None:
        self.sent: list[str] = []

    def send_aux_request(
        self, targets: Any, topic: str, request: Shareable, *more: Any, **named: Any
    ) -> dict[str, Any]:
        self.sent.append(topic)
        return {"server": request}

    def multicast_aux_requests(self, topic: str, *more: Any, **named: Any) -> dict[str, Any]:
        self.sent.append(topic)
        return {}


def test_of_other_messages_nvflares_own_leave_and_without_content():
    runner, full = Runner(), Shareable()
    full["value"] = SECRET
    stop_messages(runner)
    for topic in ("fed.event", "ObjectStreamer.Request", "anything", ReservedTopic.AUX_COMMAND):
        assert runner.send_aux_request(targets=[], topic=topic, request=Shareable(), timeout=0, fl_ctx=None) == {}
        assert runner.multicast_aux_requests(topic, [], 0.0, None) == {}
    for topic in (ReservedTopic.TASK_CHECK, ReservedTopic.JOB_HEART_BEAT, ReservedTopic.SYNC_RUNNER):
        assert runner.send_aux_request([], topic, Shareable(), 0.0, None)
        assert runner.send_aux_request([], topic, full, 0.0, None) == {}
    assert runner.sent == [ReservedTopic.TASK_CHECK, ReservedTopic.JOB_HEART_BEAT, ReservedTopic.SYNC_RUNNER]
