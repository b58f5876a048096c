"""The vote at the server and at a site's egress: what is no vote counts as none, and none leaves that is not paid."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.app_common.abstract.fl_model import FLModel
from nvflare.app_common.utils.fl_model_utils import FLModelUtils

from nvflare_fm.adapter import Adapter, AdapterUpdate, Manifest, Report, RoundTask
from nvflare_fm.config import RoundPlan
from nvflare_fm.errors import ConfigError
from nvflare_fm.flare import wire
from nvflare_fm.flare.ledger import Ledger
from nvflare_fm.flare.votes import SyntheticVotes, chosen_of
from nvflare_fm.job.synthetic import naming, voting
from nvflare_fm.privacy.egress import VOTES
from nvflare_fm.privacy.events import Event
from nvflare_fm.record.result import explanation, read_result
from nvflare_fm.record.round import in_words
from nvflare_fm.synthesis.candidates import Candidate, CandidateSet, Provenance, read, write
from tests.codes import refused
from tests.flare.test_egress import code, content, context, site, stated

LABELS = ("calm", "ill")
ROWS = CandidateSet(
    tuple(Candidate(text=f"text {i}", label=LABELS[i % 2]) for i in range(8)), Provenance(generator="made-up", seed=3)
)
JOB = naming({"task": "sequence_classification", "labels": list(LABELS), "privacy": {"epsilon": 4.0}}, ROWS)
PLAN = voting(RoundPlan.read(JOB, "test"), ROWS)
MANIFEST = Manifest("base-1", "sequence_classification", "lora")
COST = Event(1.1, 1.0, 1)
ONES = torch.ones(len(ROWS.rows))


def vote(name: str, counts: Any, epsilon: float | None = 4.0, **more: Any) -> FLModel:
    """A site's vote, as the server gets it."""
    tensors = {VOTES: torch.as_tensor(counts, dtype=torch.float32)} | more
    model = wire.write_update(AdapterUpdate(name, Adapter(dense=tensors), MANIFEST, Report()))
    if epsilon:
        told = {"mechanism": "votes", "unit": "row", "delta": 1e-5, "epsilon": epsilon}
        model.meta[wire.KEY]["protection"] = told
    model.meta["client_name"] = name
    return model


@pytest.fixture
def server() -> SyntheticVotes:
    made = SyntheticVotes(plan=JOB, per_label=2, chance=0.4)
    made.fl_ctx, made.task = FLContext(), RoundTask(PLAN)
    made._open, made.ledger = made.task, Ledger(0, 1, ["alder", "birch", "cedar"], 0)
    return made


def take(server: SyntheticVotes, model: FLModel) -> bool:
    return server._came(server.task, model)


def test_the_candidates_with_the_most_votes_are_chosen_with_what_they_cost(server: SyntheticVotes, tmp_path: Path):
    counts = torch.tensor([9.0, 0, 7, 0, 8, 5, -3, 0])
    assert all(take(server, vote(name, counts)) for name in ("alder", "birch", "cedar"))
    chosen = chosen_of(ROWS, server.votes, PLAN, server.settings)
    assert [(row.text, row.votes) for row in chosen.rows] == [("text 0", 27.0), ("text 4", 24.0), ("text 5", 15.0)]
    assert chosen.provenance == Provenance(generator="made-up", seed=3, parent=ROWS.digest, epsilon=4.0)
    assert read(write(chosen), "set") == chosen
    server.ledger.voted(server.votes, len(chosen.rows))
    assert in_words(server.ledger.line) == ["3 of 3 sites voted, 3 candidates are chosen"]
    assert server.ledger.line.sites["alder"].epsilon == 4.0
    server.ledger.write(tmp_path)
    told = [*explanation(read_result(tmp_path))]
    assert told[1:3] == ["alder: counted in 1 of 1 rounds", "  ε of the job at this site: at most 4"]


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        (lambda: vote("alder", torch.ones(7)), "other_layers"),
        (lambda: vote("alder", torch.ones(9)), "other_layers"),
        (lambda: vote("alder", torch.ones(8, 1)), "other_layers"),
        (lambda: vote("alder", ONES, more=torch.ones(8)), "other_layers"),
        (lambda: vote("alder", ONES * float("nan")), "not_finite"),
        (lambda: vote("alder", ONES / 0), "not_finite"),
        (lambda: vote("alder", ONES * 1e12), "values_too_large"),
        (lambda: vote("alder", ONES, epsilon=None), "votes_unprotected"),
        (lambda: wire.write_metrics({"loss": 1.0}), "incomplete_message"),
    ],
)
def test_what_is_no_vote_counts_as_none(server: SyntheticVotes, wrong: Callable[[], FLModel], expected: str):
    model = wrong()
    model.meta["client_name"] = "alder"
    assert not take(server, model)
    assert server.ledger.out["alder"].code == expected
    assert not server.votes


def test_a_late_vote_and_a_refusal_count_as_none(server: SyntheticVotes):
    server._open = None
    server._came(server.task, vote("alder", ONES))
    server._count_late()
    assert not server.votes
    assert server.ledger.late == ["alder"]
    refusal = wire.write_refusal("no [votes_off]")
    refusal.meta["client_name"] = "birch"
    server._open = server.task
    assert not take(server, refusal)
    assert server.ledger.out["birch"].code == "votes_off"


def test_a_job_that_would_have_sites_vote_without_noise_is_refused_while_it_loads():
    with refused("votes_unprotected", ConfigError):
        SyntheticVotes(plan={**JOB, "privacy": {}})
    with refused("wrong_setting", ConfigError):
        SyntheticVotes(plan=JOB, per_lable=3)


# --- at a site's egress


def leaving(counts: Any, protection: Any = None, **more: Any) -> Shareable:
    model = vote("here", counts, epsilon=None, **more)
    if protection is not None:
        model.meta[wire.KEY]["protection"] = protection
    model.meta.pop("client_name")
    return FLModelUtils.to_shareable(model)


PAID = stated(mechanism="votes", events=[COST])


@pytest.mark.parametrize("privacy", [None, {"max_epsilon": 8.0}])
def test_a_vote_leaves_paid_for_whether_the_site_states_a_floor_or_not(tmp_path: Path, privacy: Any):
    made = site(tmp_path, privacy)
    left = made.process(leaving(ONES, PAID), context(PLAN, round=9))  # the last
    found = wire.read_update(FLModelUtils.from_shareable(left), "here", names={VOTES})
    assert torch.equal(found.adapter.dense[VOTES], ONES)
    assert content(left)["protection"] == {"mechanism": "votes", "unit": "row", "delta": 1e-5, "epsilon": 4.0}
    assert [entry.events for entry in made.budget.verify().entries] == [(COST,)]


@pytest.mark.parametrize("privacy", [None, {"max_epsilon": 8.0}])
@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (lambda: leaving(ONES), "unprotected"),
        (lambda: leaving(ONES, stated(events=[COST])), "other_protection"),
        (lambda: leaving(torch.ones(9), PAID), "unasked_message"),
        (lambda: leaving(torch.ones(8, 2), PAID), "unasked_message"),
        (lambda: leaving(ONES, PAID, rows=torch.ones(8)), "unasked_message"),
        (lambda: FLModelUtils.to_shareable(wire.write_metrics({"loss": 0.5})), "metrics_withheld"),
    ],
)
def test_nothing_but_a_vote_that_is_paid_for_leaves_in_answer_to_its_task(
    tmp_path: Path, privacy: Any, message: Callable[[], Shareable], expected: str
):
    made = site(tmp_path, privacy)
    assert code(made.process(message(), context(PLAN))) == expected
    assert not made.budget.verify().entries


def test_a_vote_does_not_leave_as_an_update_and_is_paid_from_the_same_budget(tmp_path: Path):
    made = site(tmp_path, {"max_epsilon": 4.5})
    asked = context(PLAN.model_copy(update={"votes": 0}))
    assert code(made.process(leaving(ONES, PAID), asked)) == "other_protection"
    assert "refused" not in content(made.process(leaving(ONES, PAID), context(PLAN)))
    assert code(made.process(leaving(ONES, PAID), context(PLAN, job="job-2"))) == "budget_spent"


def test_a_refusal_to_vote_says_why_where_the_site_states_no_floor(tmp_path: Path):
    refusal = FLModelUtils.to_shareable(wire.write_refusal("the data cannot be read [bad_rows]"))
    assert code(site(tmp_path, None).process(refusal, context(PLAN))) == "bad_rows"
    assert code(site(tmp_path, {"max_epsilon": 8.0}).process(refusal, context(PLAN))) == "reason_withheld"
