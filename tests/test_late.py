"""A change made to an earlier global adapter counts as the same change made to today's."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nvflare_fm.adapter import Adapter, AdapterUpdate, RoundTask
from nvflare_fm.aggregation.cohort import Cohort
from nvflare_fm.aggregation.combine import combine
from nvflare_fm.aggregation.late import rebased, trained_from
from nvflare_fm.aggregation.weigh import weigh
from nvflare_fm.algebra.lora import head
from nvflare_fm.config import Aggregation, TaskPlan
from tests.strategies import MANIFEST, SINGLE, close, cohorts, make_pair, ranks, update

WIDE = 64  # a rank at which nothing is cut off


def globals_of(updates: list[AdapterUpdate], rank: int, seed: int) -> Adapter:
    """A global adapter for the layers and the head of `updates`."""
    first = updates[0].adapter
    pairs = {n: make_pair(*first.lora[n].shape, rank, seed, scale=2.0).to(SINGLE) for n in first.lora}
    return Adapter(pairs, {n: torch.full_like(first.dense[n], float(seed)) for n in first.dense})


def _only(merge: str) -> Aggregation:
    """The merge rule alone: no guard, no longer step."""
    return Aggregation(merge=merge, weigh=["examples"], step="plain", guard=())


def late(one: AdapterUpdate, start: Adapter, rounds: int = 1) -> AdapterUpdate:
    return replace(one, start=start, staleness=rounds)


@given(updates=cohorts(), old=ranks, new=ranks, which=st.integers(0, 15))
@pytest.mark.parametrize("merge", ["exact", "stack"])
def test_the_global_adapter_moves_by_what_each_site_changed_whenever_it_began(merge, updates, old, new, which):
    before, today = globals_of(updates, old, 1), globals_of(updates, new, 2)
    sent = [late(u, before) if which >> i & 1 else u for i, u in enumerate(updates)]
    result = combine(today, MANIFEST, sent, _only(merge), WIDE)
    for layer in today.lora:
        moved, size = today.lora[layer].delta().double(), 1.0
        for one in sent:
            trained, start = one.adapter.lora[layer], (one.start or today).lora[layer]
            from_ = 0 if merge == "stack" else head(start, trained.rank).delta().double()
            moved += result.weights[one.site] * (trained.delta().double() - from_)
            size += float(trained.delta().norm() + start.delta().norm() + today.lora[layer].delta().norm())
        close(result.adapter.lora[layer].delta(), moved, 1e-5, size)
    for name, tensor in today.dense.items():
        changes = [(u.adapter.dense[name] - (u.start or today).dense[name]) * result.weights[u.site] for u in sent]
        close(result.adapter.dense[name], tensor + sum(changes), 1e-5, 100.0)


@given(updates=cohorts(), rank=ranks)
def test_changes_point_where_they_pointed_when_they_were_made(updates, rank):
    """Weights and steps that compare changes see a late site's change, not the adapter it is carried over to."""
    before, today = globals_of(updates, rank, 1), globals_of(updates, rank, 2)
    then = Cohort(updates, before, "tail").products
    now = Cohort([rebased(late(u, before), today, "tail") for u in updates], today, "tail").products
    size = sum(float(u.adapter.lora[n].delta().square().sum()) for u in updates for n in today.lora)
    size += sum(float(a.lora[n].delta().square().sum()) for a in (before, today) for n in today.lora)
    close(now, then, 1e-5, len(updates) * size + 1e-9)


def test_a_late_update_of_other_layers_is_left_out_by_name() -> None:
    def of(width: int) -> Adapter:
        return Adapter({"layer": make_pair(2, width, 1, 0).to(SINGLE)})

    sent = [late(update("alder", of(4)), of(3)), update("birch", of(3))]
    result = combine(of(3), MANIFEST, sent, Aggregation(), 2)
    assert result.refused["alder"].code == "other_layers"
    assert dict(result.weights) == {"birch": 1.0}


def test_who_is_in_time_is_left_as_it_is() -> None:
    one = update("alder", Adapter())
    task = RoundTask(TaskPlan(), round=3)
    assert trained_from(task, one, task) is one
    assert rebased(one, Adapter(), "tail") is one


def test_a_late_update_knows_how_late_it_is_and_what_it_was_trained_from() -> None:
    start = RoundTask(TaskPlan(), Adapter(dense={"head": torch.ones(2)}), round=3)
    found = trained_from(start, update("alder", Adapter()), replace(start, round=5, adapter=Adapter()))
    assert (found.staleness, found.start) == (2, start.adapter)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=5), st.sampled_from([0.0, 0.5, 2.0]))
def test_staler_never_counts_more_and_the_same_age_counts_the_same(ages, a):
    updates = [replace(update(f"site-{i}", Adapter()), staleness=age) for i, age in enumerate(ages)]
    shares = list(weigh([{"rule": "staleness", "a": a}], Cohort(updates)).shares.values())
    for i, one in enumerate(ages):
        for j, other in enumerate(ages):
            assert shares[i] / shares[j] == pytest.approx(((1 + other) / (1 + one)) ** a)
