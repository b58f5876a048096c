"""Laws of the merge rules: the promises a rule makes choose the laws it must pass."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nvflare_fm.adapter import LoraPair
from nvflare_fm.aggregation import merge
from nvflare_fm.algebra.lora import head, shorten, stack, tail
from nvflare_fm.config import Aggregation
from tests import pages
from tests.strategies import (
    TOLERANCE,
    Layer,
    close,
    dense_mean,
    layers,
    make_pair,
    precisions,
    rotated,
    scales,
)

REGISTERED = {name: merge.registry[name] for name in merge.registry}
with pages.pasted() as of_the_how_to:  # the rule that docs/how_to/add_a_merge_rule.md prints
    assert of_the_how_to
    RULES = {**REGISTERED, **of_the_how_to}


def rules(**promises):
    """Every rule, present and future, that makes these promises and merges whole pairs; the how-to's rule as well."""
    promises = {"shares": "AB", **promises}
    kept = {n: rule for n, rule in RULES.items() if all(getattr(rule, k) == v for k, v in promises.items())}
    return pytest.mark.parametrize("rule", [pytest.param(rule, id=name) for name, rule in kept.items()])


def test_the_default_rule_promises_all_there_is():
    rule = merge.registry[Aggregation().merge]
    assert rule.exact
    assert rule.mixed_ranks
    assert rule.rest == "tail"
    assert rule.canonical


def cohort(data, rule: merge.MergeRule) -> Layer:
    return data.draw(layers(mixed_ranks=rule.mixed_ranks, frozen="A" if rule.factors == ("B",) else ""))


def won(rule: merge.MergeRule, layer: Layer, site: int) -> torch.Tensor:
    """What is left where one site has all the weight: its whole adapter."""
    whole = layer.wholes(rule.rest)[site]
    if rule is merge.registry["rank_partition"]:  # directions that no site with any weight reaches stay
        whole = whole + tail(layer.start, layer.pairs[site].rank).delta()
    return whole


def merged(rule: merge.MergeRule, layer: Layer) -> torch.Tensor:
    return rule.merge(layer.start, layer.pairs, layer.weights).delta()


@rules(exact=True)
@given(data=st.data(), dtype=precisions)
def test_an_exact_rule_gives_the_weighted_mean_of_the_sites_whole_adapters(rule, data, dtype):
    layer = cohort(data, rule)
    expected = dense_mean(layer.wholes(rule.rest), layer.weights)
    close(merged(rule, layer.to(dtype)), expected, TOLERANCE[dtype], layer.size())


@rules()
@given(data=st.data())
def test_a_site_with_all_the_weight_wins(rule, data):
    layer = cohort(data, rule)
    all_of_it = [0.0] * (len(layer.pairs) - 1) + [1.0]
    close(rule.merge(layer.start, layer.pairs, all_of_it).delta(), won(rule, layer, -1), 1e-10, layer.size())


@rules()
@given(data=st.data())
def test_equal_sites_give_what_each_of_them_has(rule, data):
    layer = cohort(data, rule)
    same = Layer(layer.start, [layer.pairs[0]] * len(layer.pairs), layer.weights)
    close(merged(rule, same), won(rule, same, 0), 1e-10, same.size())


@rules(rest="tail")
@given(data=st.data())
def test_sites_that_learned_nothing_leave_the_whole_global_adapter_at_any_ranks(rule, data):
    layer = cohort(data, rule)
    idle = Layer(layer.start, [head(layer.start, p.rank) for p in layer.pairs], layer.weights)
    close(merged(rule, idle), layer.start.delta(), 1e-10, layer.size())


@rules()
@given(data=st.data(), scale=scales)
def test_a_site_may_write_the_same_change_at_another_scale(rule, data, scale):
    layer = cohort(data, rule)
    other = Layer(layer.start, [layer.pairs[0].rescaled(scale), *layer.pairs[1:]], layer.weights)
    close(merged(rule, other), merged(rule, layer), 1e-10, layer.size())


@rules(exact=True)
@given(data=st.data(), seed=st.integers(0, 99))
def test_an_exact_rule_does_not_see_how_b_and_a_are_turned_inside_the_rank(rule, data, seed):
    layer = cohort(data, rule)
    turned = Layer(layer.start, [rotated(p, seed + i) for i, p in enumerate(layer.pairs)], layer.weights)
    close(merged(rule, turned), merged(rule, layer), 1e-10, layer.size())


@rules(exact=True)
@given(data=st.data())
def test_doubling_every_change_doubles_what_an_exact_rule_gives(rule, data):
    layer = cohort(data, rule)
    doubled = [LoraPair(p.A, p.B, 2 * p.scale) for p in (layer.start, *layer.pairs)]
    close(merged(rule, Layer(doubled[0], doubled[1:], layer.weights)), 2 * merged(rule, layer), 1e-10, layer.size())


@rules(mixed_ranks=True)
def test_a_rule_that_promises_mixed_ranks_uses_every_site(rule):
    start = shorten(make_pair(6, 5, 4, seed=9), 4)[0]
    pairs = [make_pair(6, 5, r, seed=r) for r in (0, 2, 4, 7)]
    whole = rule.merge(start, pairs, [0.25] * 4).delta()
    for site in (1, 2, 3):
        changed = [make_pair(6, 5, p.rank, seed=50) if i == site else p for i, p in enumerate(pairs)]
        assert (rule.merge(start, changed, [0.25] * 4).delta() - whole).norm() > 0.01


@rules()
def test_weights_are_respected(rule):
    start, pairs = make_pair(6, 5, 3, seed=0), [make_pair(6, 5, 3, seed=s, scale=s) for s in (1, 2)]
    towards = [rule.merge(start, pairs, [w, 1 - w]).delta() for w in (0.9, 0.5, 0.1)]
    distances = [float((t - pairs[0].delta()).norm()) for t in towards]
    assert distances == sorted(distances)
    assert distances[0] < 0.5 * distances[2]


@given(layer=layers(mixed_ranks=False))
def test_the_factor_mean_is_off_by_the_covariance_of_the_factors(layer):
    rule = merge.registry["factor_mean"]
    scale = layer.pairs[0].scale
    pairs = [p.rescaled(scale) for p in layer.pairs]
    mean_a, mean_b = (dense_mean([getattr(p, f) for p in pairs], layer.weights) for f in "AB")
    off = dense_mean([scale * (p.B - mean_b) @ (p.A - mean_a) for p in pairs], layer.weights)
    products = dense_mean([p.delta() for p in pairs], layer.weights)
    close(merged(rule, layer), products - off, 1e-10, layer.size())


@given(layer=layers())
def test_zero_padding_is_the_factor_mean_of_padded_factors(layer):
    rank, scale = max(p.rank for p in (layer.start, *layer.pairs)), layer.pairs[0].scale
    (fan_out, fan_in), zeros = layer.start.shape, layer.start.A.new_zeros
    a = [torch.cat([p.A, zeros(rank - p.rank, fan_in)]) for p in layer.pairs]
    b = [torch.cat([p.rescaled(scale).B, zeros(fan_out, rank - p.rank)], dim=1) for p in layer.pairs]
    expected = scale * dense_mean(b, layer.weights) @ dense_mean(a, layer.weights)
    padded = merge.registry["zero_pad"].merge(layer.start, layer.pairs, layer.weights)
    assert padded.rank == rank
    close(padded.delta(), expected, 1e-10, layer.size())


def test_zero_padding_keeps_the_rank_of_the_global_adapter_where_every_site_is_below_it():
    start, low = make_pair(6, 5, 4, seed=0), make_pair(6, 5, 2, seed=1)
    assert merge.registry["zero_pad"].merge(start, [low, low], [0.5, 0.5]).rank == 4


@rules(canonical=False)
def test_a_rule_on_raw_factors_depends_on_how_they_are_turned_inside_the_rank(rule):
    pairs = [make_pair(6, 5, 3, seed=s) for s in (1, 2)]
    turned = [pairs[0], rotated(pairs[1], seed=3)]
    both = [rule.merge(pairs[0], p, [0.5, 0.5]).delta() for p in (pairs, turned)]
    assert (both[0] - both[1]).norm() > 0.1 * both[0].norm()


def test_a_direction_a_low_rank_site_never_held_is_moved_by_the_others_alone():
    start = shorten(make_pair(8, 8, 4, seed=0), 4)[0]
    low = head(make_pair(8, 8, 4, seed=1), 2)
    step = LoraPair(start.A[3:], make_pair(8, 8, 1, seed=2).B)
    high = LoraPair(start.A, start.B + torch.nn.functional.pad(step.B, (3, 0)))
    after = merge.registry["exact"].merge(start, [low, high], [0.75, 0.25]).delta()
    held = 0.75 * low.delta() + 0.25 * head(start, 2).delta()
    close(after, held + tail(start, 2).delta() + 0.25 * step.delta(), 1e-10)


@pytest.mark.parametrize(
    ("name", "share_left"), [("svd", 9.0**-3), ("zero_pad", 81.0**-3), ("exact", 1.0), ("rank_partition", 1.0)]
)
def test_averaging_cut_adapters_starves_high_directions_and_the_delta_form_does_not(name, share_left):
    """Energy above rank 8 after three rounds in which nobody learns anything, at ranks 4, 8 and 16."""
    rule = merge.registry[name]
    columns, rows = (torch.linalg.qr(make_pair(32, 32, 16, seed=s).B)[0] for s in (0, 1))
    start = LoraPair(rows.T, columns * torch.linspace(1.1, 1.0, 16))
    before = tail(start, 8).delta().square().sum()
    for _ in range(3):
        result = rule.merge(start, [head(start, r) for r in (4, 8, 16)], [1 / 3] * 3)
        start = shorten(result, 16)[0] if rule.canonical else result
    after = (start.delta() @ rows[:, 8:]).square().sum()
    assert float(after / before) == pytest.approx(share_left, rel=1e-9)


def test_stacking_does_not_mix_up_the_factors_of_two_sites():
    pairs = [make_pair(3, 4, 1, seed=1), make_pair(3, 4, 2, seed=2)]
    assert torch.equal(stack(pairs, [1.0, 1.0]).A[:1], pairs[0].A)
    assert torch.equal(stack(pairs, [1.0, 1.0]).B[:, 1:], pairs[1].B)
