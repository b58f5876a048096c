"""What is measured of a round's updates in one pass: lengths, and the Gram matrix of all that the sites changed."""

from dataclasses import replace
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nvflare_fm.adapter import Adapter, AdapterUpdate
from nvflare_fm.aggregation.asked import Read
from nvflare_fm.aggregation.cohort import Cohort
from nvflare_fm.aggregation.guard import judge
from nvflare_fm.algebra.lora import head
from nvflare_fm.config import Rest
from tests.strategies import SINGLE, close, cohorts, make_pair, ranks

RESTS: list[Rest] = ["none", "tail", "all"]


def start(updates: list[AdapterUpdate], rank: int) -> Adapter:
    first = updates[0].adapter
    pairs = {n: make_pair(*first.lora[n].shape, rank, seed=7).to(SINGLE) for n in first.lora}
    return Adapter(pairs, {n: torch.full_like(t, 0.25) for n, t in first.dense.items()})


def changes(updates: list[AdapterUpdate], state: Adapter, rest: Rest) -> tuple[Tensor, Tensor]:
    """What each site changed of the dense products, and of the tensors without factors, a row a site."""
    products, dense = [], []
    for update in updates:
        lora, others = update.adapter.lora, update.adapter.dense
        began = (
            {n: head(state.lora[n], 0 if rest == "all" else p.rank).delta() for n, p in lora.items()} if state else {}
        )
        products.append(torch.cat([(p.delta().double() - began.get(n, 0)).flatten() for n, p in sorted(lora.items())]))
        dense.append(torch.cat([(t.double() - (state.dense[n] if state else 0)).flatten() for n, t in others.items()]))
    return torch.stack(products), torch.stack(dense)


@pytest.mark.parametrize("rest", RESTS)
@given(updates=cohorts(), rank=ranks, first=st.booleans())
def test_the_gram_matrix_is_that_of_the_dense_changes_and_tensors_symmetric_and_positive(updates, rank, first, rest):
    state = Adapter() if first else start(updates, rank)
    cohort = Cohort(updates, state, rest)
    rows = changes(updates, state, rest)
    held = changes([replace(updates[0], adapter=state)], Adapter(), rest) if state else ()
    parts = (*changes(updates, Adapter(), rest), *held)
    size = 1.0 + len(updates) * sum(float(part.square().sum()) for part in parts)
    for found, row in zip((cohort.products, cohort.dense), rows, strict=True):
        close(found, row @ row.T, 1e-5, size)
    close(cohort.gram, sum(row @ row.T for row in rows), 1e-5, size)
    close(cohort.gram, cohort.gram.T, 1e-12, size)
    assert float(torch.linalg.eigvalsh(cohort.gram).min()) >= -1e-12 * size


@given(updates=cohorts(), rank=ranks, far=st.floats(1.0, 1e6))
def test_a_poisoned_head_alone_is_seen(updates, rank, far):
    """One site's products are sound and its head is not: a guard that looks at all that changed sees it."""
    state, (sound, *others) = start(updates, rank), updates
    tensors = {n: t + far for n, t in sound.adapter.dense.items()}
    one, other = (
        Cohort(updates, state, "tail"),
        Cohort([replace(sound, adapter=replace(sound.adapter, dense=tensors)), *others], state, "tail"),
    )
    assert torch.equal(one.products, other.products)
    moved = sum(float((t - state.dense[n]).square().sum()) for n, t in tensors.items())
    assert float(other.dense[0, 0]) == pytest.approx(moved, rel=1e-5)
    assert float(other.gram[0, 0] - one.gram[0, 0]) == pytest.approx(moved - float(one.dense[0, 0]), rel=1e-4, abs=1e-5)


@given(updates=cohorts(), rank=ranks, lefts=st.lists(st.sampled_from([0.0, 0.25, 1.0]), min_size=4, max_size=4))
def test_what_counts_of_the_sites_is_a_part_of_what_was_measured_of_all(updates, rank, lefts):
    everyone = Cohort(updates, start(updates, rank), "tail", get_args(Read))
    whole, moved, norms = everyone.gram, everyone.moved, everyone.norms
    count = {u.site: left for u, left in zip(updates, lefts, strict=False)}
    cohort = everyone.counting(count)
    stay = [place for place, update in enumerate(updates) if count[update.site]]
    assert [u.site for u in cohort.updates] == [updates[place].site for place in stay]
    left = torch.tensor([lefts[place] for place in stay], dtype=torch.float64)
    close(cohort.gram, whole[stay][:, stay] * left * left[:, None], 1e-12, 1.0 + float(whole.abs().sum()))
    assert cohort.moved == [moved[place] for place in stay]
    assert torch.equal(cohort.norms, norms[stay])


@given(updates=cohorts(), rank=ranks)
def test_one_pass_measures_what_one_pass_for_each_would(updates, rank):
    state = start(updates, rank)
    together = Cohort(updates, state, "tail", get_args(Read))
    assert together.moved == Cohort(updates, state, "tail").moved
    for name in ("norms", "products", "dense"):
        assert torch.equal(getattr(together, name), getattr(Cohort(updates, state, "tail"), name)), name
    assert set(together.measured) == {*get_args(Read)}


def test_without_sites_there_is_nothing_to_measure():
    assert judge(["clip_norm"], Cohort([])) == {}
    assert Cohort([]).gram.shape == (0, 0)
