"""Fuzz target "egress": whatever a trainer or another component makes of a message, under a floor nothing leaves but
an update that is protected and paid for, and a reason without rows in it.
"""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.shareable import Shareable
from nvflare.app_common.utils.fl_model_utils import FLModelUtils

from nvflare_fm.config import TaskPlan
from nvflare_fm.flare import wire
from nvflare_fm.flare.egress import Egress
from nvflare_fm.privacy.events import Event
from tests.flare import test_votes as votes
from tests.flare.messages import MANIFEST, adapter
from tests.flare.test_egress import SECRET, context, plan, site, stated, update
from tests.fuzz.mutations import junk

COSTLY = [Event(0.05, 1.0, 10**6)]  # beyond any budget
MESSAGES = [
    update(stated()),
    update(stated(events=COSTLY)),
    update(),
    FLModelUtils.to_shareable(wire.write_metrics({"loss": 0.5})),
    FLModelUtils.to_shareable(wire.write_submission(adapter(1), MANIFEST, plan())),
    FLModelUtils.to_shareable(wire.write_refusal(SECRET)),
    votes.leaving(votes.ONES, votes.PAID),
    votes.leaving(votes.ONES),
]
ODD = st.sampled_from([SECRET, {SECRET: SECRET}, [SECRET], torch.ones(2), torch.ones(3, 3), b"\xff", object(), 10**400])
NAMES = sorted(adapter(1).tensors())


@pytest.fixture(scope="module")
def floored(tmp_path_factory: pytest.TempPathFactory) -> Egress:
    return site(tmp_path_factory.mktemp("floored"), {"max_epsilon": 2.0})


def places(value: Any, way: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The ways to all that a message holds."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [way, *(place for key, part in inner for place in places(part, (*way, key)))]


def changed(message: Shareable, changes: list[tuple[int, str, Any]]) -> Shareable:
    """The message with values exchanged, added and taken out at some places."""
    made = copy.deepcopy(message)
    for number, how, value in copy.deepcopy(changes):  # one value put into itself would have no end
        if not (found := [way for way in places(made) if way]):
            break
        *way, last = found[number % len(found)]
        inside: Any = made
        for key in way:
            inside = inside[key]
        if how == "drop" and isinstance(inside, dict):
            del inside[last]
        elif how == "add" and isinstance(inside[last], dict):
            inside[last][SECRET] = value
        else:
            inside[last] = value
    return made


CHANGES = st.lists(
    st.tuples(st.integers(0, 10**6), st.sampled_from(["drop", "add", "put"]), junk | ODD), min_size=1, max_size=3
)


@given(message=st.sampled_from(MESSAGES), changes=CHANGES, asked=st.sampled_from([None, plan(), votes.PLAN]))
def test_whatever_is_done_to_a_message_nothing_but_a_paid_update_leaves(
    floored: Egress, message: Shareable, changes: Any, asked: TaskPlan | None
) -> None:
    lines = len(floored.budget.verify().entries)
    left = floored.process(changed(message, changes), context(asked, NAMES))
    assert SECRET not in str(left)
    if left.get_return_code() != ReturnCode.OK:
        assert set(left.keys()) <= {"__headers__"}
        return
    model = FLModelUtils.from_shareable(left)
    if wire.refused(model) is not None:
        assert not model.params
        return
    if wire.says_nothing(model):
        assert not model.params
        assert not model.metrics
        return
    assert asked
    assert {name: its.shape for name, its in model.params.items()} == {"votes": votes.ONES.shape} or not asked.votes
    assert model.params.keys() <= {*NAMES, "votes"}
    assert len(floored.budget.verify().entries) == lines + 1
    report = wire.read_update(model, "here").report
    assert (report.examples, report.tokens, report.bad_rows, report.label_skew) == (None,) * 4
    assert (report.seconds, report.peak_memory_mib, report.before, report.after) == (0.0, 0.0, {}, {})
    assert report.epsilon is not None
    floored.budget.file.unlink()  # the next one has a budget, too
    floored.budget.head.unlink()


def test_an_update_that_is_left_alone_leaves(floored: Egress) -> None:
    """Otherwise the law above would say nothing."""
    left = floored.process(copy.deepcopy(MESSAGES[0]), context(plan(), NAMES))
    assert wire.refused(FLModelUtils.from_shareable(left)) is None
