"""One round at the server, whole: admit, weigh, merge, shorten, refill."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nvflare_fm.adapter import Adapter
from nvflare_fm.aggregation import merge
from nvflare_fm.aggregation.combine import combine
from nvflare_fm.algebra.lora import head, tail
from nvflare_fm.config import Aggregation
from nvflare_fm.errors import ConfigError, WireError
from tests.codes import refused
from tests.strategies import MANIFEST, SINGLE, close, cohorts, dense_mean, identical, make_pair, ranks, update

RULES = [name for name in merge.registry if merge.registry[name].shares == "AB"]
EXACT = Aggregation(merge="exact", weigh=["examples"], step="plain", guard=())  # what strange cohorts are merged by


def mean_of_products(updates, weights, layer):
    return dense_mean([u.adapter.lora[layer].to(torch.float64).delta() for u in updates], weights)


@given(updates=cohorts(), rank=ranks)
def test_the_first_round_is_the_best_approximation_of_the_weighted_mean(updates, rank):
    result = combine(Adapter(), None, updates, EXACT, rank)
    for layer, pair in result.adapter.lora.items():
        expected = mean_of_products(updates, result.weights.values(), layer)
        values = torch.linalg.svdvals(expected)
        size = sum(float(u.adapter.lora[layer].delta().norm()) for u in updates)
        best = float(values[rank:].norm())  # Eckart-Young
        assert float((pair.delta().double() - expected).norm()) <= best + 1e-5 * size


@given(updates=cohorts(), rank=ranks)
def test_the_energy_lost_is_that_of_the_dense_computation(updates, rank):
    result = combine(Adapter(), None, updates, EXACT, rank)
    assert result.energy_lost.keys() == result.adapter.lora.keys()
    for layer, lost in result.energy_lost.items():
        energy = torch.linalg.svdvals(mean_of_products(updates, result.weights.values(), layer)).square()
        assert lost == pytest.approx(float(energy[rank:].sum() / energy.sum()) if energy.sum() else 0.0, abs=1e-5)


@given(updates=cohorts(), rank=ranks)
def test_the_global_adapter_has_falling_singular_values_orthonormal_a_and_no_dead_direction(updates, rank):
    result = combine(Adapter(), None, updates, EXACT, rank)
    for layer, pair in result.adapter.lora.items():
        lengths, values = pair.B.norm(dim=0), torch.linalg.svdvals(pair.delta())
        assert pair.rank == rank
        assert (lengths[:-1] >= lengths[1:] * (1 - 1e-5)).all(), layer
        held = min(rank, len(values))
        close(lengths[:held], values[:held], 1e-4, 1e-6 + float(values.norm()))
        wide = pair.A[: pair.shape[1]]
        close(wide @ wide.T, torch.eye(len(wide)), 1e-5, 1.0)
        close(pair.A.norm(dim=1), torch.ones(rank), 1e-5)


def test_a_later_round_adds_what_the_sites_changed_to_the_whole_global_adapter():
    start = Adapter({"q": make_pair(9, 8, 4, seed=0).to(SINGLE)})
    updates = [update(f"s{r}", Adapter({"q": make_pair(9, 8, r, seed=r, scale=r).to(SINGLE)}), r) for r in (1, 3, 5)]
    result = combine(start, MANIFEST, updates, EXACT, max_rank=8)
    wholes = [u.adapter.lora["q"].delta() + tail(start.lora["q"], u.adapter.lora["q"].rank).delta() for u in updates]
    close(result.adapter.lora["q"].delta(), dense_mean(wholes, [1 / 9, 3 / 9, 5 / 9]), 1e-5)


def test_rounds_without_learning_change_nothing():
    state = combine(
        Adapter(), None, [update("a", Adapter({"q": make_pair(9, 8, 6, seed=0).to(SINGLE)}))], EXACT, 6
    ).adapter
    first = state.lora["q"].delta()
    for _ in range(5):
        updates = [update(f"s{r}", Adapter({"q": head(state.lora["q"], r)}), r) for r in (1, 2, 4, 6)]
        state = combine(state, MANIFEST, updates, EXACT, 6).adapter
    close(state.lora["q"].delta(), first, 1e-5)


@pytest.mark.parametrize("name", RULES)
@settings(max_examples=10)
@given(data=st.data())
def test_any_arrival_order_gives_the_same_adapter_bit_for_bit(name, data):
    updates = data.draw(cohorts(mixed_ranks=merge.registry[name].mixed_ranks))
    state = updates[0].adapter if merge.registry[name].mixed_ranks else Adapter()
    updates = [replace(u, report=replace(u.report, steps=3)) for u in updates]
    orders = [updates, updates[::-1], data.draw(st.permutations(updates))]
    results = [combine(state, MANIFEST, order, Aggregation(merge=name, weigh=["examples"]), 4) for order in orders]
    assert all(identical(r.adapter, results[0].adapter) for r in results)
    assert all(dict(r.weights) == dict(results[0].weights) for r in results)


@pytest.mark.parametrize("name", RULES)
def test_a_rule_that_does_not_promise_mixed_ranks_refuses_them_by_name_and_the_others_do_not(name):
    updates = [
        update(s, Adapter({"q": make_pair(4, 3, r, seed=r).to(SINGLE)})) for s, r in (("a", 2), ("b", 2), ("c", 3))
    ]
    result = combine(Adapter(), None, updates, Aggregation(merge=name), 3)
    assert list(result.refused) == ([] if merge.registry[name].mixed_ranks else ["c"])
    assert sum(result.weights.values()) == pytest.approx(1)
    assert set(result.weights) | set(result.refused) == {"a", "b", "c"}


@pytest.mark.parametrize("name", RULES)
def test_only_a_canonical_rule_has_its_result_shortened(name):
    updates = [update("a", Adapter({"q": make_pair(4, 3, 2, seed=0).to(SINGLE)}))]
    pair = combine(Adapter(), None, updates, Aggregation(merge=name), max_rank=3).adapter.lora["q"]
    assert pair.rank == (3 if merge.registry[name].canonical and merge.registry[name].rest != "all" else 2)


def test_weights_follow_the_examples_and_a_refused_site_has_none():
    stranger = update("b", Adapter({"q": make_pair(4, 3, 2, seed=1).to(SINGLE)}), 99, replace(MANIFEST, base="base-2"))
    own = [update(s, Adapter({"q": make_pair(4, 3, 2, seed=0).to(SINGLE)}), n) for s, n in (("c", 10), ("a", 30))]
    result = combine(Adapter(), MANIFEST, [*own, stranger], EXACT, 2)
    assert dict(result.weights) == {"a": 0.75, "c": 0.25}
    assert list(result.refused) == ["b"]


def test_unless_the_job_says_otherwise_every_site_counts_the_same():
    updates = [update(s, Adapter({"q": make_pair(4, 3, 2, seed=0).to(SINGLE)}), n) for s, n in (("a", 10), ("b", 30))]
    assert dict(combine(Adapter(), None, updates, Aggregation(), 2).weights) == {"a": 0.5, "b": 0.5}


def test_dense_tensors_are_averaged_with_the_same_weights():
    sites = [("a", 30, 1.0), ("b", 10, 5.0)]
    updates = [update(s, Adapter({}, {"head": torch.full((2, 2), v)}), n) for s, n, v in sites]
    head_ = combine(Adapter(), None, updates, EXACT, 4).adapter.dense["head"]
    assert torch.equal(head_, torch.full((2, 2), 2.0))


def test_bf16_updates_are_summed_in_float32():
    big, small = torch.full((1, 1), 256.0), torch.full((1, 1), 1.0)
    updates = [update(s, Adapter({}, {"head": v.bfloat16()})) for s, v in (("a", big), ("b", small))]
    updates += [update("c", Adapter({}, {"head": torch.zeros(1, 1).bfloat16()}))]
    head_ = combine(Adapter(), None, updates, EXACT, 4).adapter.dense["head"]
    assert head_.dtype == torch.float32
    close(head_, torch.full((1, 1), 257 / 3), 1e-6)
    pairs = [Adapter({"q": make_pair(4, 3, 1, seed=s).to(torch.bfloat16)}) for s in (0, 1, 2)]
    result = combine(Adapter(), None, [update(str(i), p) for i, p in enumerate(pairs)], EXACT, 4)
    assert result.adapter.lora["q"].A.dtype == torch.float32
    wide = [p.lora["q"].to(torch.float64).delta() for p in pairs]
    close(result.adapter.lora["q"].delta(), dense_mean(wide, [1 / 3] * 3), 1e-5)


def test_the_same_seed_refills_with_the_same_directions_and_another_with_others():
    updates = [update("a", Adapter({"q": make_pair(9, 8, 2, seed=0).to(SINGLE)}))]
    one, same, other = (combine(Adapter(), None, updates, Aggregation(seed=s), 5).adapter for s in (1, 1, 2))
    assert identical(one, same)
    assert not torch.equal(one.lora["q"].A[2:], other.lora["q"].A[2:])
    assert torch.equal(one.lora["q"].A[:2], other.lora["q"].A[:2])


def test_sigma_reaches_the_result():
    updates = [update("a", Adapter({"q": make_pair(9, 8, 2, seed=0).to(SINGLE)}))]
    in_a = combine(Adapter(), None, updates, Aggregation(sigma="A"), 2).adapter.lora["q"]
    close(in_a.B.T @ in_a.B, torch.eye(2), 1e-5)


def test_the_federations_manifest_stays_and_the_first_round_takes_the_sites():
    updates = [update("a", Adapter({"q": make_pair(4, 3, 2, seed=0).to(SINGLE)}))]
    kept = replace(MANIFEST)
    assert kept is not MANIFEST
    assert combine(Adapter(), kept, updates, EXACT, 2).manifest is kept
    assert combine(Adapter(), None, updates, EXACT, 2).manifest is MANIFEST


def test_a_round_in_which_nobody_fits_says_why_for_every_site():
    stranger = update("b", Adapter({"q": make_pair(4, 3, 2, seed=1).to(SINGLE)}), 9, replace(MANIFEST, base="base-2"))
    with pytest.raises(WireError) as caught:
        combine(Adapter(), MANIFEST, [stranger], EXACT, 2)
    assert all(named in caught.value.message for named in ("b: rejected", "base-2", "[other_base]"))
    with refused("nothing_to_merge", WireError):
        combine(Adapter(), MANIFEST, [], EXACT, 2)


def test_a_rule_that_gives_what_is_no_number_gives_no_adapter(monkeypatch):
    def breaks(start, pairs, weights):
        return replace(pairs[0], B=pairs[0].B * float("nan"))

    monkeypatch.setitem(merge.registry._entries, "factor_mean", replace(merge.registry["factor_mean"], merge=breaks))
    sites = [update("a", Adapter({"q": make_pair(4, 3, 2, seed=0).to(SINGLE)}))]
    with pytest.raises(WireError) as raised:
        combine(Adapter(), None, sites, Aggregation(merge="factor_mean"), 4)
    assert raised.value.code == "merge_not_finite"


def test_an_unknown_merge_rule_is_refused_with_the_nearest_known_one():
    with refused("unknown_name", ConfigError, '"exact"'):
        combine(Adapter(), None, [], Aggregation(merge="exakt"), 2)


def test_steps_are_normalised_as_fednova_does_and_a_site_of_many_steps_does_not_pull_harder():
    """d = τ̄ · Σ wₖ dₖ/τₖ, with τ̄ = Σ wₖτₖ, on products and on dense tensors alike."""
    start = Adapter({"q": make_pair(9, 8, 4, seed=0).to(SINGLE)}, {"head": torch.ones(3)})
    sites = [("a", 30, 4), ("b", 10, 12)]
    updates = []
    for i, (site, examples, steps) in enumerate(sites):
        pair = start.lora["q"]
        moved = replace(pair, B=pair.B + 0.1 * steps * make_pair(9, 8, 4, seed=i + 1).to(SINGLE).B)
        sent = update(site, Adapter({"q": moved}, {"head": torch.ones(3) * (1 + steps)}), examples)
        updates.append(replace(sent, report=replace(sent.report, steps=steps)))
    result = combine(start, MANIFEST, updates, EXACT.model_copy(update={"normalize_steps": True}), 8).adapter
    weights, taken = [0.75, 0.25], [4, 12]
    usual = sum(w * t for w, t in zip(weights, taken, strict=True))
    changes = [u.adapter.lora["q"].delta() - start.lora["q"].delta() for u in updates]
    expected = sum(usual * w / t * c for w, t, c in zip(weights, taken, changes, strict=True))
    close(result.lora["q"].delta(), start.lora["q"].delta() + expected, 1e-5)
    close(result.dense["head"], torch.ones(3) * (1 + usual), 1e-6)


def test_a_site_that_does_not_say_its_steps_cannot_be_normalised():
    sent = update("hospital-a", Adapter({"q": make_pair(9, 8, 4, seed=0).to(SINGLE)}))
    with refused("no_count", WireError, "hospital-a"):
        combine(Adapter(), None, [sent], Aggregation(normalize_steps=True), 8)


def test_the_first_head_is_the_plain_mean_even_where_steps_are_normalised():
    sent = [update(s, Adapter({}, {"head": torch.full((2,), v)})) for s, v in (("a", 1.0), ("b", 3.0))]
    sent = [replace(u, report=replace(u.report, steps=k)) for u, k in zip(sent, (1, 9), strict=True)]
    head_ = combine(Adapter(), None, sent, Aggregation(normalize_steps=True), 4).adapter.dense["head"]
    assert torch.equal(head_, torch.full((2,), 2.0))
