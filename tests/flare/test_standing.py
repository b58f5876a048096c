"""A task stands for who still works on it, as long as the answer would count."""

from types import SimpleNamespace
from typing import Any

import pytest
from nvflare.apis.shareable import ReservedHeaderKey

from nvflare_fm.adapter import Adapter, RoundTask
from nvflare_fm.flare.standing import SentTask, StandingTasks, call_offs

from .messages import MANIFEST, PLAN, adapter


def sent(number: int, working: str, answered: str = "", never_came: str = "", has_adapter: bool = True) -> SentTask:
    """A task of round `number`; sites are single letters."""
    fetched = [
        SimpleNamespace(client=SimpleNamespace(name=site), id=f"{number}{site}", result_received_time=site in answered)
        for site in working + answered
    ]
    task: Any = SimpleNamespace(
        completion_status=None, targets=[*working, *answered, *never_came], client_tasks=fetched
    )
    return SentTask(RoundTask(PLAN, adapter(number) if has_adapter else Adapter(), MANIFEST, number, 9), task)


def test_two_rounds_stand_side_by_side_until_the_older_ones_answer_would_come_too_late() -> None:
    standing, first, second = StandingTasks(max_staleness=2, total_rounds=9), sent(1, "a", "b"), sent(2, "c", "d")
    standing.add(first)
    assert standing.end_round(1) == []
    standing.add(second)
    assert standing.working() == {"a", "c"}
    assert standing.end_round(2) == []
    assert standing.end_round(3) == [first.task]
    assert standing.working() == {"c"}


def test_a_task_that_all_have_answered_is_over_and_who_never_fetched_it_is_free() -> None:
    standing, done, open_ = StandingTasks(max_staleness=5, total_rounds=9), sent(1, "", "ab"), sent(1, "a", "", "z")
    for each in (done, open_):
        standing.add(each)
    assert standing.working() == {"a", "z"}
    assert standing.end_round(1) == [done.task]
    assert standing.working() == {"a"}


@pytest.mark.parametrize(("number", "has_adapter"), [(0, False), (8, True)])
def test_an_answer_to_a_round_without_an_adapter_or_after_the_last_counts_nowhere(
    number: int, has_adapter: bool
) -> None:
    standing, late = StandingTasks(max_staleness=5, total_rounds=9), sent(number, "a", has_adapter=has_adapter)
    standing.add(late)
    assert standing.end_round(number) == [late.task]
    assert standing.working() == set()


def test_who_is_called_off_is_told_the_id_of_its_own_task_alone() -> None:
    messages = call_offs(sent(3, "ba", "c", "z").task)
    assert {site: m.get_header(ReservedHeaderKey.TASK_ID) for site, m in messages.items()} == {"a": "3a", "b": "3b"}
    over = sent(3, "a").task
    over.completion_status = "timeout"
    assert call_offs(over) == {}
