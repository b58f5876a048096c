"""Laws of the guards that weigh sites by where their changes lie, of mixing, and of the coordinate-wise rules."""

from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from nvflare_fm.adapter import Adapter, AdapterUpdate
from nvflare_fm.aggregation import guard, merge
from nvflare_fm.aggregation.cohort import Cohort
from nvflare_fm.aggregation.combine import Combined, combine
from nvflare_fm.aggregation.guard.centered_clip import clipped
from nvflare_fm.aggregation.guard.geometric_median import weiszfeld
from nvflare_fm.aggregation.guard.multi_krum import chosen
from nvflare_fm.aggregation.merge.median import medians
from nvflare_fm.aggregation.merge.trimmed_mean import trimmed
from nvflare_fm.aggregation.mixing import MIXES, bucketing, nnm
from nvflare_fm.config import Aggregation
from nvflare_fm.errors import ConfigError, WireError
from nvflare_fm.record.reason import Reason
from tests.codes import refused
from tests.strategies import SINGLE, close, identical, make_pair, rotated, update

GUARDS = [name for name in guard.registry if guard.registry.needs([name]).sums]
KERNELS = {"geometric_median": weiszfeld, "centered_clip": lambda gram, _: clipped(gram, 1.0), "multi_krum": chosen}
MIXED = ["none", "nnm", "bucketing"]
every_guard = pytest.mark.parametrize("name", GUARDS)
every_mix = pytest.mark.parametrize("mix", MIXED)
seeds = st.integers(0, 2**32)


def points(count: int, size: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, size, generator=generator, dtype=torch.float64)


@st.composite
def clouds(draw: st.DrawFn, least: int = 3) -> Tensor:
    return points(draw(st.integers(least, 9)), draw(st.integers(1, 6)), draw(seeds))


def heads(vectors: Tensor) -> list[AdapterUpdate]:
    """A first round of sites that send these vectors as their head, and nothing else."""
    return [update(f"s{i}", Adapter({}, {"head": v.float()})) for i, v in enumerate(vectors)]


def weight(sites: list[AdapterUpdate], name: str, state: Adapter | None = None, **settings) -> dict[str, float]:
    verdicts = guard.judge([{"rule": name, **settings}], Cohort(sites, state or Adapter(), "tail"))
    return {site.site: verdicts[site.site].weight if site.site in verdicts else 1.0 for site in sites}


def merged(sites: list[AdapterUpdate], *guards, **how) -> Combined:
    return combine(Adapter(), None, sites, Aggregation(step="plain", guard=guards, **how), 16)


# --- each rule against its paper, on vectors


@given(cloud=clouds(), seed=seeds, size=st.floats(0.01, 3))
def test_no_other_point_has_a_lesser_sum_of_distances_than_the_geometric_median(cloud, seed, size):
    beta = weiszfeld(cloud @ cloud.T, 0)

    def distances(at: Tensor) -> float:
        return float((cloud - at).norm(dim=1).sum())

    found = distances(beta @ cloud)
    others = [*cloud, cloud.mean(0), *(beta @ cloud + size * points(4, cloud.shape[1], seed))]
    assert found <= min(map(distances, others)) + 1e-3


@given(cloud=clouds(), radius=st.floats(0.3, 3))
def test_centered_clipping_rests_where_the_clipped_differences_cancel(cloud, radius):
    beta = clipped(cloud @ cloud.T, radius)
    centre = beta @ cloud
    away = cloud - centre
    limit = radius * away.norm(dim=1).median()
    held = away * (limit / away.norm(dim=1).clamp(min=1e-150)).clamp(max=1)[:, None]
    assert float(beta.sum()) == pytest.approx(1.0, abs=1e-3)
    assert float(held.mean(0).norm()) <= 1e-3 * float(limit) + 1e-9


@given(cloud=clouds(5), data=st.data())
def test_multi_krum_takes_the_n_less_f_points_of_the_lowest_scores(cloud, data):
    n = len(cloud)
    f = data.draw(st.integers(0, (n - 3) // 2))
    scores = []
    for i in range(n):
        others = sorted(float((cloud[i] - cloud[j]).norm()) ** 2 for j in range(n) if j != i)
        scores.append(sum(others[: n - f - 2]))
    best = sorted(range(n), key=lambda i: scores[i])[: n - f]
    found = {i for i, taken in enumerate(chosen(cloud @ cloud.T, f).tolist()) if taken}
    assert {*best} <= found
    assert all(scores[i] <= max(scores[j] for j in best) * (1 + 1e-6) for i in found)


@given(cloud=clouds(), data=st.data())
def test_mixing_makes_each_point_the_mean_of_the_n_less_f_nearest(cloud, data):
    f = data.draw(st.integers(0, (len(cloud) - 1) // 2))
    means = nnm(cloud @ cloud.T, f)
    for i, row in enumerate(cloud):
        nearest = (cloud - row).norm(dim=1).argsort()[: len(cloud) - f]
        close(means[i] @ cloud, cloud[nearest].mean(0), 1e-6, 1.0)


@given(cloud=clouds())
def test_every_point_lies_in_one_bucket_of_at_most_two(cloud):
    means = bucketing(cloud @ cloud.T, 0)
    assert torch.equal((means > 0).sum(0), torch.ones(len(cloud), dtype=torch.int64))
    assert int((means > 0).sum(1).max()) <= 2
    close(means.sum(1), torch.ones(len(means), dtype=torch.float64), 1e-12)
    assert torch.equal(means, bucketing(cloud @ cloud.T, 0))


# --- laws of all


@every_guard
@pytest.mark.parametrize("mix", ["none", "nnm"])
@given(cloud=clouds(5), seed=seeds, times=st.sampled_from([1e-3, 7.0, 1e3]))
def test_neither_the_order_of_the_sites_nor_the_unit_of_their_changes_decides(name, mix, cloud, seed, times):
    order = torch.randperm(len(cloud), generator=torch.Generator().manual_seed(seed))

    def beta(of: Tensor) -> Tensor:
        gram = of @ of.T
        gram = gram / gram.diagonal().median()
        means = MIXES[mix](gram, 1)
        found = KERNELS[name](means @ gram @ means.T, 1) @ means
        return found / found.sum()

    close(beta(times * cloud[order]), beta(cloud)[order], 1e-4, 1.0)


@every_guard
@every_mix
@settings(max_examples=20)
@given(data=st.data(), seed=seeds, far=st.sampled_from([10.0, 1e3, 1e6]), alike=st.booleans())
def test_f_sites_move_the_result_by_a_bounded_amount_however_far_they_go(name, mix, data, seed, far, alike):
    """As far as a few times the honest sites lie apart, wherever those are; a bound that does not grow with `far`."""
    f = data.draw(st.integers(1, 2))
    n = data.draw(st.integers(4 * f + 5, 4 * f + 7))
    honest = 3.0 + 0.1 * points(n - f, 4, seed)
    bad = points(f, 4, seed + 1)
    bad = far * (bad[:1].expand_as(bad) if alike else bad) / bad.norm(dim=1, keepdim=True)
    sites = heads(torch.cat([honest, bad]))
    result = merged(sites, {"rule": name, "f": f, "mix": mix})
    apart = float(torch.cdist(honest, honest).max())
    assert float((result.adapter.dense["head"] - honest.mean(0)).norm()) <= 10 * apart
    if mix == "nnm":
        assert sum(result.weights.get(f"s{i}", 0.0) for i in range(n - f, n)) <= 1e-2


@every_guard
@every_mix
def test_where_all_changed_the_same_nothing_changes_bit_for_bit(name, mix):
    one = Adapter({"q": make_pair(6, 5, 3, seed=1).to(SINGLE)}, {"head": torch.ones(4)})
    sites = [update(f"s{i}", one) for i in range(10)]
    free, guarded = merged(sites), merged(sites, {"rule": name, "mix": mix, "f": 1})
    assert identical(free.adapter, guarded.adapter)
    assert (guarded.weights, guarded.guarded, guarded.refused) == (free.weights, {}, {})


def moved(site: str, seed: int, of_pair: float = 1.0, of_head: float = 1.0, rank: int = 2) -> AdapterUpdate:
    """Sites agree on a direction and differ about it: 0.3 of the length is their own."""
    common, own = make_pair(6, 5, rank, seed=99), make_pair(6, 5, rank, seed=seed)
    pair = replace(common, B=of_pair * (common.B + 0.3 * own.B)).to(SINGLE)
    return update(site, Adapter({"q": pair}, {"head": (of_head * (1 + 0.3 * points(1, 5, seed)[0])).float()}))


@every_guard
@settings(max_examples=20)
@given(seed=st.integers(0, 99))
def test_how_b_and_a_are_turned_inside_the_rank_changes_nothing(name, seed):
    sites = [moved(f"s{i}", i, 1.0 if i else -1.0) for i in range(5)]
    turned = [replace(s, adapter=Adapter({"q": rotated(s.adapter.lora["q"], seed)}, s.adapter.dense)) for s in sites]
    assert weight(turned, name, f=1) == pytest.approx(weight(sites, name, f=1), abs=1e-4)


@every_guard
@pytest.mark.parametrize(("pair", "head"), [(1.0, -3.0), (-3.0, 1.0), (1.0, 1e5), (1e5, 1.0), (-3.0, -3.0)])
def test_a_poisoned_head_cannot_hide_behind_a_sound_layer_nor_the_other_way_round(name, pair, head):
    """Whatever the units: the layers change by a thousand times more than the head, or less."""
    for units in (1e-3, 1e3):
        sites = [moved(f"s{i}", i, units, 1 / units) for i in range(4)] + [moved("t", 9, pair * units, head / units)]
        result = merged(sites, {"rule": name, "f": 1, "mix": "nnm"})
        assert result.guarded["t"].left_out
        assert result.refused["t"] == Reason("guard", result.guarded["t"].reason)
        assert "times as far from what the sites agree on" in result.guarded["t"].reason
        assert "t" not in result.weights


@pytest.mark.parametrize("far", [1e-3, 1e9])
def test_who_changes_what_most_sites_left_alone_is_left_out_however_little_it_is(far):
    state = Adapter({"q": make_pair(6, 5, 2, seed=1).to(SINGLE)}, {"head": torch.ones(5)})
    sites = [replace(s, adapter=Adapter(s.adapter.lora, state.dense)) for s in (moved(f"s{i}", i) for i in range(4))]
    one = moved("t", 9)
    far_off = replace(one, adapter=Adapter(one.adapter.lora, {"head": torch.full((5,), 1 + far)}))
    kept = weight([*sites, far_off], "geometric_median", state, f=1)
    assert kept["t"] == 0
    assert min(kept[f"s{i}"] for i in range(4)) > 0.2
    said = guard.judge(["geometric_median"], Cohort([*sites, far_off], state, "tail"))["t"]
    assert said.reason == "its dense tensors lie apart, where those of most sites are the same"


@every_guard
def test_a_site_that_changed_nothing_and_one_that_went_as_far_as_admission_lets_it_are_judged_like_any_other(name):
    sites = [moved(f"s{i}", i) for i in range(5)]
    idle = update("idle", Adapter({"q": replace(make_pair(6, 5, 2, seed=1), B=torch.zeros(6, 2)).to(SINGLE)},
                                  {"head": torch.zeros(5)}))  # fmt: skip
    huge = moved("huge", 8, 1e8, 1e8)
    result = merged([*sites, idle, huge], {"rule": name, "f": 2, "mix": "nnm"})
    assert "huge" in result.refused
    assert sum(result.weights.values()) == pytest.approx(1.0)
    assert float(result.adapter.dense["head"].norm()) < 10


def test_values_that_are_not_finite_are_refused_by_code():
    bad = moved("t", 9, float("nan"))
    with refused("not_comparable", WireError):
        weight([*(moved(f"s{i}", i) for i in range(4)), bad], "geometric_median", f=1)


# --- what they make of the weights


@every_guard
@settings(max_examples=20)
@given(seed=seeds, examples=st.lists(st.integers(5, 20), min_size=6, max_size=6))
def test_the_result_is_the_mean_by_weight_times_beta_and_all_weigh_one(name, seed, examples):
    vectors = 1 + 0.5 * points(6, 4, seed)
    sites = [replace(s, report=replace(s.report, examples=n)) for s, n in zip(heads(vectors), examples, strict=True)]
    kept = weight(sites, name, f=1)
    result = merged(sites, {"rule": name, "f": 1}, weigh=["examples"], max_weight=1.0)
    parts = torch.tensor([n * kept[s.site] for s, n in zip(sites, examples, strict=True)], dtype=torch.float64)
    close(result.adapter.dense["head"], (parts / parts.sum()) @ vectors, 1e-5, 1.0)
    assert sum(result.weights.values()) == pytest.approx(1.0)
    assert max(kept.values()) == 1.0
    left = {s: w for s, w in kept.items() if w > 0}
    assert result.factors.get("guard", dict.fromkeys(left, 1.0)) == left
    assert {*result.refused} == {s for s, w in kept.items() if w == 0}


@settings(max_examples=20)
@given(limit=st.floats(0.2, 0.3))
def test_what_a_limit_takes_from_sound_sites_does_not_go_to_one_that_a_guard_holds_down(limit):
    sites = [moved(f"s{i}", i) for i in range(4)] + [moved("t", 9, -1.0, -1.0)]
    share = merged(sites, {"rule": "geometric_median", "f": 1}, max_weight=limit).weights
    free = merged(sites, {"rule": "geometric_median", "f": 1}).weights
    assert share["t"] <= free["t"] * 1.3
    assert sum(share.values()) == pytest.approx(1.0)


def test_a_site_that_weighs_less_than_half_of_the_usual_is_told_of_in_words():
    vectors = torch.tensor([[1.0, 0.1], [1.0, -0.1], [1.1, 0.0], [0.9, 0.0], [5.0, 5.0]])
    (found,) = merged(heads(vectors), {"rule": "geometric_median", "f": 1}).guarded.items()
    kept = weight(heads(vectors), "geometric_median", f=1)
    shares = torch.tensor([*kept.values()]) / sum(kept.values())
    others = [shares[[j for j in range(5) if j != i]] for i in range(5)]
    means = [s @ vectors[[j for j in range(5) if j != i]] / s.sum() for i, s in enumerate(others)]
    far = (vectors - torch.stack(means)).norm(dim=1)
    assert found[0] == "s4"
    assert str(found[1]) == (
        f"{kept['s4']:.3g} of its weight counts: its dense tensors lie {float(far[4] / far.median()):.3g} times as far "
        "from what the sites agree on as the usual site's"
    )


@every_guard
def test_one_that_goes_as_far_as_it_can_does_not_make_another_look_near(name):
    sites = [moved(f"s{i}", i) for i in range(7)] + [moved("t", 9, 1e3, 1e3), moved("u", 10, 1e9, 1e9)]
    kept = weight(sites, name, f=2, mix="nnm", near=1.5)
    assert (kept["t"], kept["u"]) == (0.0, 0.0)


@every_guard
@pytest.mark.parametrize("mix", ["none", "nnm"])
@settings(max_examples=20)
@given(seed=seeds, near=st.floats(1.1, 3))
def test_who_lies_near_keeps_its_whole_weight_and_who_lies_far_in_one_part_does_not(name, mix, seed, near):
    generator = torch.Generator().manual_seed(seed)
    heads_ = 1 + 0.1 * torch.nn.functional.normalize(torch.randn(6, 60, generator=generator), dim=1)
    spared = weight(heads(heads_), name, f=1, mix=mix, near=2.0)
    assert spared == dict.fromkeys(spared, 1.0)
    far = heads_.clone()
    far[5] = heads_[:5].mean(0) + 3 * near * (heads_[5] - heads_[:5].mean(0))
    kept = weight(heads(far), name, f=1, mix=mix, near=near)
    assert kept["s5"] < 0.7
    assert kept["s5"] == weight(heads(far), name, f=1, mix=mix)["s5"]
    pair = {"q": make_pair(6, 5, 2, seed=1).to(SINGLE)}  # all alike: nobody lies far by it
    both = [replace(s, adapter=Adapter(pair, s.adapter.dense)) for s in heads(far)]
    assert weight(both, name, f=1, mix=mix, near=near)["s5"] < 0.7


def test_clipping_and_weighing_go_together():
    sites = [moved(f"s{i}", i) for i in range(5)] + [moved("t", 9, 100.0, 100.0)]
    both = merged(sites, "clip_norm", {"rule": "geometric_median", "f": 1}).guarded["t"]
    assert 0 < both.multiplier < 0.1
    assert both.weight < 0.1
    assert "times the median" in both.reason
    assert "from what the sites agree on" in both.reason


# --- how many sites it takes


@every_guard
@every_mix
@given(f=st.integers(0, 3), n=st.integers(1, 12))
def test_fewer_sites_than_f_asks_for_are_refused_by_code_and_no_more(name, mix, f, n):
    least = guard.registry.needs([{"rule": name, "f": f, "mix": mix}]).fewest
    alone = 2 * f + 3 if name == "multi_krum" else 2 * f + 1
    assert least == (2 * alone - 1 if mix == "bucketing" else alone)
    sites = heads(1 + 0.1 * points(n, 3, n))
    if n >= least:
        assert len(weight(sites, name, f=f, mix=mix)) == n
    else:
        with refused("too_few_for_guard", ConfigError, str(least)):
            weight(sites, name, f=f, mix=mix)


@every_guard
@every_mix
@settings(max_examples=20)
@given(n=st.integers(0, 12), seed=seeds)
def test_an_unset_f_is_a_quarter_of_those_present_and_asks_for_nobody(name, mix, n, seed):
    sites = heads(points(n, 3, seed))
    assert guard.registry.needs([{"rule": name, "mix": mix}]).fewest == 1
    found = weight(sites, name, mix=mix)
    if n < 4:
        assert set(found.values()) <= {1.0}
    elif mix != "bucketing":
        assert found == weight(sites, name, mix=mix, f=(n - 1) // 4)


@pytest.mark.parametrize("settings", [{"f": -1}, {"f": 1.5}, {"mix": "nn"}, {"radius": 0.0}, {"trim": 1}])
def test_settings_out_of_range_are_refused(settings):
    with refused("wrong_setting", ConfigError):
        guard.registry.needs([{"rule": "centered_clip", **settings}])


# --- the coordinate-wise rules


@given(cloud=clouds(1), data=st.data())
def test_the_trimmed_mean_is_that_of_the_sorted_values_without_both_ends(cloud, data):
    n = len(cloud)
    f = data.draw(st.integers(0, (n - 1) // 2))
    expected = cloud.sort(dim=0).values[f : n - f].mean(0)
    close(trimmed(list(cloud), [1 / n] * n, trim=f / n), expected, 1e-9, 1.0)


@given(cloud=clouds(1), seed=seeds)
def test_the_median_is_the_middle_value_of_each_coordinate_by_weight(cloud, seed):
    n = len(cloud)
    expected = torch.quantile(cloud, 0.5, dim=0, interpolation="midpoint")
    close(medians(list(cloud), [1 / n] * n), expected, 1e-9, 1.0)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    close(medians(list(cloud[order]), [1 / n] * n), expected, 1e-9, 1.0)
    twice = torch.cat([cloud, cloud[:1]])
    by_weight = medians(list(cloud), [2 / (n + 1), *[1 / (n + 1)] * (n - 1)])
    close(by_weight, medians(list(twice), [1 / (n + 1)] * (n + 1)), 1e-9, 1.0)


@pytest.mark.parametrize("name", ["median", "trimmed_mean"])
@given(cloud=clouds(3), data=st.data(), far=st.floats(-1e9, 1e9))
def test_a_minority_cannot_move_a_number_out_of_the_range_of_the_others(name, cloud, data, far):
    n = len(cloud)
    f = data.draw(st.integers(0, (n - 1) // 4))
    assume(f)
    start, frozen = make_pair(5, 4, 2, seed=3), make_pair(5, 4, 2, seed=3)
    honest = [replace(frozen, B=make_pair(5, 4, 2, seed=10 + i).B) for i in range(n - f)]
    bad = [replace(make_pair(5, 4, 2, seed=50 + i), B=torch.full((5, 2), far, dtype=torch.float64)) for i in range(f)]
    found = merge.registry[name].merge(start, [*honest, *bad], [1 / n] * n)
    values = torch.stack([pair.B for pair in honest])
    assert torch.equal(found.A, start.A)
    assert (values.amax(0) + 1e-9 >= found.B).all()
    assert (values.amin(0) - 1e-9 <= found.B).all()


@pytest.mark.parametrize("rule", ["median", {"rule": "trimmed_mean", "trim": 0.3}])
def test_a_coordinate_wise_rule_holds_the_head_as_well(rule):
    sites = heads(torch.tensor([[1.0], [2.0], [3.0], [1e6]]))
    assert 1 <= float(merged(sites, merge=rule).adapter.dense["head"]) <= 3


def test_a_share_of_the_weight_that_leaves_nothing_is_refused():
    with refused("wrong_setting", ConfigError, "trim"):
        merged(heads(points(3, 2, 1)), merge={"rule": "trimmed_mean", "trim": 0.5})
