"""Synthetic rows at a site: its own guard stands before each, none is counted or measured on, and votes cost ε."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nvflare_fm.adapter import RoundTask
from nvflare_fm.config import Aggregation, RoundPlan, TaskPlan
from nvflare_fm.errors import ConfigError, PolicyError, WireError
from nvflare_fm.job.at_home import at_home
from nvflare_fm.job.settle import settle
from nvflare_fm.job.synthetic import naming, read_brought, voting
from nvflare_fm.privacy.egress import VOTES
from nvflare_fm.site import synthetic, worker
from nvflare_fm.site.offer.policy import Submitter, decide
from nvflare_fm.site.tasks import registry as tasks
from nvflare_fm.site.worker import Worker
from nvflare_fm.synthesis.candidates import Candidate, CandidateSet, Provenance, write
from tests.codes import refused
from tests.site import tiny

TASK = "sequence_classification"
OPEN = {"votes": True, "accepts": True, "max_share": 0.9}
PRIVATE = {"epsilon": 50.0}
NEW = [f"somebody we made up feels {how} on day {i}" for i in range(9) for how in ("fine", "bad")]


def made(texts: list[str] = NEW, labels: Any = tiny.LABELS) -> CandidateSet:
    rows = [Candidate(text=text, label=labels[i % len(labels)]) for i, text in enumerate(texts)]
    return CandidateSet(tuple(rows), Provenance(generator="made-up"))


ROWS = made()


def planned(rows: CandidateSet = ROWS, task: str = TASK, **more: Any) -> TaskPlan:
    return TaskPlan.read(naming(tiny.plan(task).model_dump() | more, rows), "test")


def asked_to_vote(rows: CandidateSet = ROWS, **more: Any) -> TaskPlan:
    plan = tiny.plan(TASK, privacy=PRIVATE).model_dump(include={*RoundPlan.model_fields})
    return voting(RoundPlan.read(naming(plan | more, rows), "test"), rows)


def site(folder: Path, model: Path, rows: CandidateSet = ROWS, lines: Any = None, **more: Any) -> Worker:
    """A site with rows of its own to measure on, to whose job these synthetic rows were brought."""
    lines = lines or tiny.rows(TASK)
    files = {"train": str(tiny.jsonl(folder / "train.jsonl", lines)), "validation": ""}
    files["validation"] = str(tiny.jsonl(folder / "validation.jsonl", tiny.rows(TASK, 12, shift=25)))
    config = tiny.site(model, Path(files["train"]), data={"notes": files}, **({"synthetic": OPEN} | more))
    return Worker("site-1", config, brought=lambda digest: rows)


# --- training


def test_synthetic_rows_are_trained_on_and_neither_counted_nor_measured_on(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    seen = Mock(wraps=worker.training.train)
    monkeypatch.setattr(worker.training, "train", seen)
    shift = Mock(wraps=worker.training.class_shift)
    monkeypatch.setattr(worker.training, "class_shift", shift)
    asked = planned(training={"local_steps": 8, "batch_size": 8, "logit_calibration": 0.5}, label_statistics=["skew"])
    open_site = {"privacy": {"label_statistics": ["skew"]}}
    (with_them := tmp_path / "with").mkdir()
    (without := tmp_path / "without").mkdir()
    found = site(with_them, bert, **open_site).train(RoundTask(asked))
    usual = site(without, bert, **open_site).train(
        RoundTask(asked.model_copy(update={"synthetic": tiny.plan().synthetic}))
    )
    rows, chosen = seen.call_args_list[0].args[2], seen.call_args_list[0].args[4]
    assert len(rows) == 24 + 16  # 0.4 of 40
    assert {row for row in chosen if row >= 24}, "none was trained on"
    assert [len(call.args[1]) for call in shift.call_args_list] == [24, 24]
    assert (found.report.examples, found.report.label_skew) == (usual.report.examples, usual.report.label_skew)
    assert found.report.before == usual.report.before
    assert found.report.lowered == ()


def test_a_site_that_accepts_none_trains_as_if_there_were_none_and_says_so(bert: Path, tmp_path: Path):
    closed = {"synthetic": {"votes": True}}
    shy, usual = site(tmp_path, bert, **closed), site(tmp_path, bert, **closed)
    mine = shy.train(RoundTask(planned()))
    theirs = usual.train(RoundTask(tiny.plan(TASK)))
    assert all(torch.equal(mine.adapter.tensors()[n], t) for n, t in theirs.adapter.tensors().items())
    assert mine.report.lowered == ("synthetic rows to none: this site accepts none",)
    with refused("synthetic_off", PolicyError):
        shy.train(RoundTask(planned(synthetic={"required": True})))


def test_a_site_may_allow_less_and_says_so(bert: Path, tmp_path: Path):
    found = site(tmp_path, bert, synthetic={"accepts": True, "max_share": 0.2})
    assert found.train(RoundTask(planned())).report.lowered == ("synthetic.share to 0.2",)
    (added,) = found._added.values()
    assert len(added) == 6
    few = site(tmp_path, bert, synthetic=OPEN | {"max_rows": 3})
    few.train(RoundTask(planned()))
    assert [len(added) for added in few._added.values()] == [3]


@given(
    copied=st.lists(st.integers(0, 23), min_size=1, max_size=6, unique=True),
    case=st.sampled_from([str, str.upper, lambda text: text.replace(" ", ",  ")]),
    share=st.sampled_from([0.1, 0.4, 0.9]),
)
def test_no_copy_of_a_private_row_is_added_whatever_the_job_says(
    shared: tuple[Worker, Any], copied: list[int], case: Callable[[str], str], share: float
):
    found, data = shared
    own = [row["text"] for row in tiny.rows(TASK)]
    offered = made([case(own[row]) for row in copied] + NEW[:4])
    asked = planned(offered, synthetic={"share": share})
    source = found.config.model("base")
    reads = worker._reads(worker.base_model.locate(source))
    added = synthetic.added(offered, own, data, asked, tasks[TASK], *reads, 1000, "north", lambda: False)
    assert len(added) <= min(4, share / (1 - share) * 24)
    tokens = [reads[0](text)["input_ids"] for text in NEW[:4]]
    assert all(row["input_ids"] in tokens for row in added)


@pytest.fixture(scope="module")
def shared(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Worker, Any]:
    found = site(tmp_path_factory.mktemp("site"), bert)
    return found, found.rows(planned())


@pytest.mark.parametrize("asked", [planned(), asked_to_vote()], ids=["train", "vote"])
def test_the_sites_time_is_a_limit_here_too(bert: Path, tmp_path: Path, asked: TaskPlan):
    with refused("too_slow", PolicyError):
        site(tmp_path, bert, limits={"max_seconds_per_round": 1e-9}).train(RoundTask(asked))


def test_where_all_are_copies_none_is_added_and_the_round_goes_on(bert: Path, tmp_path: Path):
    offered = made([row["text"] for row in tiny.rows(TASK)][:4])
    found = Worker("site-1", site(tmp_path, bert).config, brought=lambda digest: offered)
    found.train(RoundTask(planned(offered)))
    assert [len(added) for added in found._added.values()] == [0]


def test_sites_that_need_few_rows_of_a_class_begin_at_different_ones(shared: tuple[Worker, Any]):
    found, data = shared
    reads = worker._reads(worker.base_model.locate(found.config.model("base")))
    asked, offered = planned(ROWS, synthetic={"share": 0.1}), ROWS
    added = [
        tuple(map(repr, synthetic.added(offered, [], data, asked, tasks[TASK], *reads, 1000, f"s{i}", lambda: False)))
        for i in range(6)
    ]
    assert len({*added}) > 1


def test_classes_that_a_site_lacks_come_first(bert: Path, tmp_path: Path):
    lines = [row for row in tiny.rows(TASK, 40) if row["label"] != "ill"]
    found = site(tmp_path, bert, lines=lines)
    found.train(RoundTask(planned(synthetic={"share": 0.1})))
    (added,) = found._added.values()
    assert added["labels"][:] == [tiny.LABELS.index("ill")] * len(added)
    assert len(added) == int(len(lines) / 9)


def test_the_guard_reads_every_shape_of_a_row():
    causal = tasks["causal_lm"]
    turns = [{"role": "user", "content": "who?"}, {"role": "assistant", "content": [{"type": "text", "text": "he"}]}]
    assert synthetic.said({"messages": turns, "id": "x"}, causal) == "who?\nhe"
    assert synthetic.said({"prompt": "how?", "completion": "so"}, causal) == "how?\nso"
    assert synthetic.said({"conversations": [{"from": "human", "value": "when?"}]}, causal) == "when?"
    assert synthetic.said({"text": "fever", "label": "ill"}, tasks[TASK]) == "fever"


def test_rows_to_write_are_added_too(llama: Path, tmp_path: Path):
    rows = CandidateSet(tuple(Candidate(prompt=f"what is {t}? ", text=t) for t in NEW), Provenance())
    file = str(tiny.jsonl(tmp_path / "rows.jsonl", tiny.rows("causal_lm")))
    config = tiny.site(llama, Path(file), synthetic=OPEN)
    found = Worker("site-1", config, brought=lambda digest: rows)
    assert found.train(RoundTask(planned(rows, "causal_lm"))).report.examples == 22
    assert [len(added) for added in found._added.values()] == [14]


def test_what_a_site_trains_for_itself_and_what_is_private_has_none():
    assert not at_home(planned()).synthetic.asked
    with refused("private_synthetic", ConfigError):
        settle(planned(privacy={"epsilon": 8.0}), Aggregation())
    with refused("synthetic_task", ConfigError):
        settle(planned(task="token_classification"), Aggregation())


def test_a_private_round_with_synthetic_rows_is_refused_by_the_site_too(bert: Path, tmp_path: Path):
    with refused("private_synthetic", ConfigError):
        site(tmp_path, bert).train(RoundTask(planned(privacy=PRIVATE)))


def test_other_rows_than_the_plan_names_are_refused(bert: Path, tmp_path: Path):
    with refused("no_synthetic_rows", ConfigError):
        read_brought(tmp_path, ROWS.digest)
    (tmp_path / "synthetic.jsonl").write_bytes(write(ROWS))
    assert read_brought(tmp_path, ROWS.digest) == ROWS
    with refused("other_synthetic_rows", ConfigError):
        read_brought(tmp_path, made(NEW[:3]).digest)
    with refused("synthetic_labels", ConfigError):
        site(tmp_path, bert, made(labels=("calm", "dead"))).train(RoundTask(planned()))


# --- votes


def test_a_vote_is_the_count_under_the_noise_that_is_paid_for(bert: Path, tmp_path: Path):
    spent: list[Any] = []
    found = site(tmp_path, bert)
    found.may_spend = spent.append
    update = found.train(RoundTask(asked_to_vote()))
    assert [*update.adapter.tensors()] == [VOTES]
    noisy = update.adapter.dense[VOTES]
    (event,) = update.protection.events  # type: ignore[union-attr]
    assert noisy.shape == (len(ROWS.rows),)
    assert abs(float(noisy.sum()) - 24) < 6 * event.noise_multiplier * len(ROWS.rows) ** 0.5
    assert (event.sample_rate, event.steps) == (1.0, 1)
    assert spent == [update.protection]
    assert found.state.events.read() == (event,)
    assert (update.report.examples, update.report.before, update.report.loss != update.report.loss) == (None, {}, True)
    with refused("voted", PolicyError):
        found.train(RoundTask(asked_to_vote()))


def test_a_vote_that_the_budget_does_not_pay_for_is_not_counted(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(synthetic, "count", Mock(side_effect=AssertionError))
    found = site(tmp_path, bert)
    found.may_spend = Mock(side_effect=PolicyError("no", code="budget_spent"))
    with refused("budget_spent", PolicyError):
        found.train(RoundTask(asked_to_vote()))


def test_one_row_more_moves_the_count_by_no_more_than_one_vote(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Also where no validation file is named, and which rows are held out follows from how many there are."""
    counts: list[Any] = []
    monkeypatch.setattr(worker, "noised", lambda votes, sigma: counts.append(votes) or votes.float())
    for number in range(3):
        file = str(tiny.jsonl(tmp_path / f"{number}.jsonl", tiny.rows(TASK, 30 + number)))
        config = tiny.site(bert, Path(file), synthetic=OPEN)
        Worker("site-1", config, brought=lambda digest: ROWS).train(RoundTask(asked_to_vote()))
    assert [float(count.sum()) for count in counts] == [30, 31, 32]
    assert [float((more - few).norm()) for few, more in pairwise(counts)] == [1, 1]


def test_rows_vote_for_candidates_of_their_own_label_and_none_twice(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    counts: list[Any] = []
    monkeypatch.setattr(worker, "noised", lambda votes, sigma: counts.append(votes) or votes.float())
    lines = tiny.rows(TASK, 24) + [row for row in tiny.rows(TASK, 24, shift=1) if row["label"] == "ill"]
    site(tmp_path, bert, lines=lines).train(RoundTask(asked_to_vote()))
    for label in tiny.LABELS:
        its = [place for place, of in enumerate(ROWS.labels) if of == label]
        assert float(counts[0][its].sum()) == len([row for row in lines if row["label"] == label])


def test_a_patient_has_one_vote_however_many_rows(bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    counted = Mock(wraps=synthetic.count)
    monkeypatch.setattr(worker.synthetic, "count", counted)
    counts: list[float] = []
    monkeypatch.setattr(worker, "noised", lambda votes, sigma: counts.append(float(votes.sum())) or votes.float())
    lines = [row | {"patient": i % 5} for i, row in enumerate(tiny.rows(TASK))]
    found = site(tmp_path, bert, lines=lines)
    found.train(RoundTask(asked_to_vote(privacy=PRIVATE | {"unit": "patient"})))
    assert counts == [pytest.approx(5)]


def test_a_vote_on_other_rows_than_the_server_counts_is_refused(bert: Path, tmp_path: Path):
    with refused("other_synthetic_rows", WireError):
        site(tmp_path, bert, made(NEW[:3])).train(RoundTask(asked_to_vote()))


@pytest.mark.parametrize(
    ("said", "more", "expected"),
    [
        ({}, {}, ["votes_off"]),
        ({"synthetic": {"accepts": True}}, {}, ["votes_off"]),
        ({"synthetic": {"votes": True, "max_rows": 17}}, {}, ["above_limit"]),
        ({"synthetic": {"votes": True}}, {}, []),
        ({"synthetic": {"votes": True}, "privacy": {"max_epsilon": 1.0}}, {}, ["epsilon_above_budget"]),
        ({"synthetic": {"votes": True}, "privacy": {"unit": "patient_id"}}, {}, ["weak_unit"]),
        ({"synthetic": {"votes": True}, "privacy": {"delta": 1e-6}}, {}, ["weak_delta"]),
        ({"synthetic": {"votes": True}}, {"privacy": {}}, ["unprotected"]),
        ({"synthetic": {"votes": True}, "limits": {"max_rank": 1, "max_steps_per_round": 1}}, {}, []),
    ],
)
def test_a_site_votes_where_it_says_so_and_under_noise_alone(said: Any, more: Any, expected: list[str]):
    config = tiny.site(Path("m"), Path("n"), **said, welcome={"submitters": "*"})
    config = config.model_copy(update={"privacy": config.privacy.model_copy(update=said.get("privacy", {}))})
    asked = asked_to_vote(privacy=PRIVATE).model_copy(
        update={"privacy": tiny.plan(privacy=more["privacy"]).privacy} if more else {}
    )
    assert [reason.code for reason in decide(asked, config, Submitter("a", "b")).refused] == expected


def test_a_plan_that_no_site_would_vote_on_is_refused():
    for code, more in {
        "votes_unprotected": {"privacy": {}},
        "votes_encoded": {"uplink": ["int8"]},
        "synthetic_task": {"task": "multi_label"},
        "synthetic_labels": {"labels": ["calm", "well"]},
    }.items():
        with refused(code, ConfigError):
            asked_to_vote(**more)
    with refused("no_candidates", ConfigError):
        asked_to_vote(made([]))
