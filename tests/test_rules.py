"""Each merge rule against a dense computation of its paper's formula, written without the rule's own code."""

from dataclasses import replace
from itertools import pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st

from nvflare_fm.adapter import Adapter, LoraPair
from nvflare_fm.aggregation import merge
from nvflare_fm.aggregation.combine import combine
from nvflare_fm.algebra.lora import head, zero
from nvflare_fm.config import Aggregation, RoundPlan
from nvflare_fm.errors import WireError
from nvflare_fm.job.settle import settle
from tests.codes import refused
from tests.strategies import MANIFEST, SINGLE, close, layers, make_pair, update

FROZEN = [name for name in merge.registry if merge.registry[name].factors != ("AB",)]


@given(layer=layers())
def test_raflora_averages_each_partition_over_the_sites_that_reach_it(layer):
    """Partitions lie between neighbouring ranks; each is a dense sum over its sites, divided by their weight."""
    bounds = sorted({0, layer.start.rank, *(p.rank for p in layer.pairs)})
    expected = torch.zeros(layer.start.shape, dtype=torch.float64)
    for low, high in pairwise(bounds):
        reaching = [(w, p) for w, p in zip(layer.weights, layer.pairs, strict=True) if p.rank >= high]
        total = sum(w for w, _ in reaching)
        if total > 0:
            for weight, p in reaching:
                expected += weight / total * p.scale * p.B[:, low:high] @ p.A[low:high]
        else:
            expected += layer.start.scale * layer.start.B[:, low:high] @ layer.start.A[low:high]
    merged = merge.registry["rank_partition"].merge(layer.start, layer.pairs, layer.weights)
    shares = [w for w in layer.weights if w > 0]
    close(merged.delta(), expected, 1e-10, layer.size() / min(shares))


@given(layer=layers())
def test_flora_adds_the_weighted_products_to_the_whole_global_adapter(layer):
    expected = layer.start.scale * layer.start.B @ layer.start.A
    for weight, p in zip(layer.weights, layer.pairs, strict=True):
        expected = expected + weight * p.scale * p.B @ p.A
    close(merge.registry["stack"].merge(layer.start, layer.pairs, layer.weights).delta(), expected, 1e-10, layer.size())


@given(layer=layers(mixed_ranks=False, frozen="A"))
def test_ffa_lora_is_the_mean_of_b_times_the_frozen_a_and_exact(layer):
    frozen = layer.pairs[0].A
    mean_b = sum(w * p.scale * p.B for w, p in zip(layer.weights, layer.pairs, strict=True))
    merged = merge.registry["freeze_a"].merge(layer.start, layer.pairs, layer.weights)
    close(merged.delta(), mean_b @ frozen, 1e-10, layer.size())


def test_ffa_lora_does_not_take_another_a_from_a_site():
    start = make_pair(6, 5, 3, seed=0)
    strange = make_pair(6, 5, 3, seed=1)
    merged = merge.registry["freeze_a"].merge(start, [strange], [1.0])
    assert torch.equal(merged.A, start.A)


def test_in_the_first_round_ffa_lora_takes_the_a_that_most_sites_hold():
    ours, strange = make_pair(6, 5, 3, seed=0), make_pair(6, 5, 3, seed=1)
    others = [replace(ours, B=ours.B * k) for k in (1.0, 2.0)]
    merged = merge.registry["freeze_a"].merge(zero(6, 5), [strange, *others], [1 / 3] * 3)
    close(merged.A, ours.A, 1e-10)


@given(layer=layers(mixed_ranks=False, frozen="B"))
def test_rolora_is_exact_where_one_factor_was_frozen(layer):
    expected = sum(w * p.delta() for w, p in zip(layer.weights, layer.pairs, strict=True))
    merged = merge.registry["alternate"].merge(layer.start, layer.pairs, layer.weights)
    close(merged.delta(), expected, 1e-10, layer.size())


def test_rolora_trains_b_first_and_then_a_in_turn():
    how = Aggregation(merge="alternate")
    plan = settle(RoundPlan(), how)
    assert [plan.of_round(number).factors for number in range(4)] == ["B", "A", "B", "A"]


def test_ffa_lora_trains_b_in_every_round():
    how = Aggregation(merge="freeze_a")
    assert [settle(RoundPlan(), how).of_round(number).factors for number in range(3)] == ["B", "B", "B"]


def test_every_other_rule_trains_both_factors():
    for name in set(merge.registry) - set(FROZEN):
        assert settle(RoundPlan(), Aggregation(merge=name)).of_round(3).factors == "AB", name


def test_fedsa_lora_averages_a_and_refuses_a_site_that_sends_its_b():
    a = {site: torch.full((2, 3), float(site)) for site in (1, 3)}
    name = "layers.0.lora_A.weight"
    sites = [update(f"s{site}", Adapter(dense={name: a[site]})) for site in a]
    how = Aggregation(merge="share_a")
    assert torch.equal(combine(Adapter(), None, sites, how, 2).adapter.dense[name], torch.full((2, 3), 2.0))
    whole = [update("s1", Adapter({"layers.0": make_pair(4, 3, 2, seed=0).to(SINGLE)}))]
    with refused("whole_pairs", WireError):
        combine(Adapter(), None, whole, how, 2)


@given(ranks=st.lists(st.integers(1, 6), min_size=1, max_size=4), keep=st.floats(0.1, 0.99))
def test_the_global_rank_follows_the_share_of_energy_that_is_to_stay(ranks, keep):
    updates = [update(f"s{i}", Adapter({"q": make_pair(9, 8, r, seed=i).to(SINGLE)})) for i, r in enumerate(ranks)]
    whole = combine(Adapter(), None, updates, Aggregation(), 8)
    short = combine(Adapter(), None, updates, Aggregation(keep_energy=keep), 8)
    assert 1 <= short.adapter.lora["q"].rank <= 8
    assert short.energy_lost["q"] <= 1 - keep + 1e-6
    energy = torch.tensor(whole.spectrum["q"]).square()
    shorter = energy[: short.adapter.lora["q"].rank - 1].sum() / energy.sum()
    assert float(shorter) < keep + 1e-6, "one direction less would have been enough"


def test_the_spectrum_is_that_of_the_merged_change_whichever_factor_holds_it():
    updates = [update(f"s{i}", Adapter({"q": make_pair(9, 8, 3, seed=i).to(SINGLE)})) for i in range(2)]
    for sigma in ("A", "balanced", "B"):
        result = combine(Adapter(), None, updates, Aggregation(sigma=sigma), 5)
        expected = torch.linalg.svdvals(result.adapter.lora["q"].delta())[:5]
        close(torch.tensor(result.spectrum["q"]), expected, 1e-5)


def test_no_direction_dies_over_twenty_rounds_in_which_each_site_learns_in_its_own():
    """The rank-collapse curve, in small: energy above the smallest rank, as sites of rank 2 and 6 go on learning."""

    def above(name: str) -> float:
        how, state, manifest = Aggregation(merge=name), Adapter(), None
        for number in range(20):
            updates = []
            for i, rank in enumerate((2, 2, 2, 6)):
                held = (
                    head(state.lora["q"], rank) if state else make_pair(16, 16, rank, seed=1, kind="fresh").to(SINGLE)
                )
                step = make_pair(16, held.rank, held.rank, seed=100 * number + i).to(SINGLE)
                pair = LoraPair(held.A, held.B + 0.1 * step.B, held.scale)
                updates.append(update(f"s{i}", Adapter({"q": pair})))
            combined = combine(state, manifest, updates, how, 6)
            state, manifest = combined.adapter, MANIFEST
        energy = torch.tensor(combined.spectrum["q"]).square()
        return float(energy[2:].sum() / energy.sum())

    assert above("exact") > 3 * above("svd")
