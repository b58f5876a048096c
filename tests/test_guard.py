"""No site moves the federation much farther than its sites usually do; where nobody is far off, nothing changes."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nvflare_fm.adapter import Adapter, AdapterUpdate, LoraPair
from nvflare_fm.aggregation import merge
from nvflare_fm.aggregation.cohort import Cohort
from nvflare_fm.aggregation.combine import Combined, combine
from nvflare_fm.aggregation.guard import Verdict, judge, registry
from nvflare_fm.aggregation.late import rebased
from nvflare_fm.algebra.lora import head, stack
from nvflare_fm.config import Aggregation, RoundPlan, SiteOverrides
from nvflare_fm.errors import ConfigError, WireError
from nvflare_fm.job.settle import settle
from nvflare_fm.record.reason import Reason
from tests.codes import refused
from tests.strategies import MANIFEST, SINGLE, close, identical, make_pair, update

RULES = [name for name in merge.registry if merge.registry[name].shares == "AB"]
DELTA = [name for name in RULES if merge.registry[name].delta]
SHAPES = {"q": (9, 8), "v": (7, 6)}
MOST = 4.0


def start(rank: int = 4) -> Adapter:
    pairs = {n: make_pair(*shape, rank, seed=50 + i).to(SINGLE) for i, (n, shape) in enumerate(SHAPES.items())}
    return Adapter(pairs, {"head": torch.ones(5)})


def moved(site: str, state: Adapter, far: float, seed: int, rank: int = 3, dense: float | None = None) -> AdapterUpdate:
    """An update that changed the products by `far` in all, and the head by `dense`, in a direction of its own."""
    changes = {n: make_pair(*shape, rank, seed=seed * 10 + i) for i, (n, shape) in enumerate(SHAPES.items())}
    length = sum(float(c.delta().norm()) ** 2 for c in changes.values()) ** 0.5
    lora = {}
    for name, change in changes.items():
        step = replace(change, B=change.B * far / length).to(SINGLE)
        start = head(state.lora[name], rank) if state else None
        lora[name] = stack([start, step], [1.0, 1.0]) if start else step
    turn = torch.randn(5, generator=torch.Generator().manual_seed(seed))
    before = state.dense["head"] if state else torch.zeros(5)
    return update(site, Adapter(lora, {"head": before + turn / turn.norm() * (far if dense is None else dense)}))


def merged(state: Adapter, updates: list[AdapterUpdate], rule: str = "exact", **how) -> Combined:
    asked = {"merge": rule, "step": "plain", **how}
    return combine(state, MANIFEST if state else None, updates, Aggregation(**asked), 64)


def change(result: Combined, state: Adapter) -> float:
    """How far the global adapter has moved, of its products."""
    total = 0.0
    for layer, pair in result.adapter.lora.items():
        before = state.lora[layer].delta() if state else 0.0
        total += float((pair.delta().double() - before).norm()) ** 2
    return total**0.5


# A pair that began at rank 3 of the global adapter and changed is of rank 6 here: exact takes its first six directions
# off, so the global adapter must not have more than three.
BEGAN = start(3)


def test_how_far_each_site_moved_is_what_it_changed_and_not_what_it_holds():
    for state in (Adapter(), BEGAN):
        sites = [moved("a", state, 0.5, 1, dense=0.1), moved("b", state, 2.0, 2, dense=3.0)]
        for rest in ("none", "tail"):
            found = Cohort(sites, state, rest).moved
            assert [m.products for m in found] == pytest.approx([0.5, 2.0], rel=1e-4)
            assert [m.dense for m in found] == pytest.approx([0.1, 3.0], rel=1e-4)
    fresh = [moved("a", Adapter(), 0.5, 1), moved("b", Adapter(), 2.0, 2)]
    assert [m.products for m in Cohort(fresh, BEGAN, "all").moved] == pytest.approx([0.5, 2.0], rel=1e-4)


def test_who_changed_nothing_moved_nowhere_whatever_rounding_leaves():
    state = Adapter({n: replace(p, scale=1.0) for n, p in start(4).lora.items()}, {"head": torch.rand(5)})
    held = {n: head(p, 2).rescaled(3.7) for n, p in state.lora.items()}
    (found,) = Cohort([update("a", Adapter(held, {"head": state.dense["head"] * (1 + 1e-8)}))], state, "tail").moved
    assert (found.products, found.dense) == (0.0, 0.0)


@pytest.mark.parametrize("rule", DELTA)
@settings(max_examples=20)
@given(
    far=st.floats(4.5, 1e6), sites=st.integers(3, 6), first=st.booleans(), where=st.sampled_from(["products", "head"])
)
def test_one_site_moves_no_more_than_its_share_of_the_limit_however_far_it_went(rule, far, sites, first, where):
    """As if it had gone four times the median itself, in its products and in its head alike. A first head starts from
    nothing that could be kept instead, so there what the site lacks in weight goes to the others.
    """
    state = Adapter() if first or rule == "stack" else BEGAN
    lengths = (far, 1.0) if where == "products" else (1.0, far)
    honest = [moved(f"s{i}", state, 1.0, i) for i in range(sites - 1)]
    result = merged(state, [*honest, moved("liar", state, lengths[0], 99, dense=lengths[1])], rule)
    assert list(result.guarded) == ["liar"]
    assert result.guarded["liar"].multiplier == pytest.approx(MOST / far, rel=1e-3)
    near = moved("liar", state, lengths[0] * MOST / far, 99, dense=1.0)
    as_if = merged(state, [*honest, near], rule, guard=())
    for layer in SHAPES:
        close(result.adapter.lora[layer].delta(), as_if.adapter.lora[layer].delta(), 1e-3, 1.0)
    assert change(result, state) <= 1.01 * (sites - 1 + MOST) / sites
    before = state.dense["head"] if state else torch.zeros(5)
    bound = (sites - 1 + MOST) / (sites if state else sites - 1)
    assert float((result.adapter.dense["head"] - before).norm()) <= 1.01 * bound


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("first", [True, False])
def test_where_nobody_is_far_off_the_result_is_the_same_bit_for_bit(rule, first):
    state = Adapter() if first or rule == "stack" else start(3)
    lengths = (0.5, 1.0, 2.0, 1.5)
    sites = [moved(f"s{i}", Adapter(), length, i) for i, length in enumerate(lengths)]
    guarded, free = merged(state, sites, rule), merged(state, sites, rule, guard=())
    assert identical(guarded.adapter, free.adapter)
    assert not guarded.guarded
    assert guarded.weights == free.weights


@pytest.mark.parametrize("rule", [name for name in RULES if name not in DELTA])
@pytest.mark.parametrize("how", ["products", "head", "one factor up, the other down"])
def test_where_a_change_cannot_be_scaled_a_site_that_is_far_off_is_left_out(rule, how):
    honest = [moved(f"s{i}", Adapter(), 1.0, i) for i in range(3)]
    liar = moved("liar", Adapter(), 20.0 if how == "products" else 1.0, 9, dense=20.0 if how == "head" else 1.0)
    if how.startswith("one factor"):  # ΔW is as long as the others', the mean of the factors would not be
        turned = {n: LoraPair(p.A * 1e4, p.B * 1e-4, p.scale) for n, p in liar.adapter.lora.items()}
        liar = replace(liar, adapter=Adapter(turned, liar.adapter.dense))
    result = merged(Adapter(), [*honest, liar], rule)
    assert set(result.weights) == {"s0", "s1", "s2"}
    assert result.guarded["liar"].multiplier == 0
    assert result.refused["liar"] == Reason("guard", result.guarded["liar"].reason)
    assert identical(result.adapter, merged(Adapter(), honest, rule).adapter)


@pytest.mark.parametrize(("far", "stays"), [(8.0, True), (12.0, False)])
def test_who_cannot_be_scaled_may_go_farther_before_being_left_out(far, stays):
    sites = [moved(f"s{i}", Adapter(), 1.0, i, dense=0.0) for i in range(3)] + [
        moved("t", Adapter(), far, 9, dense=0.0)
    ]
    even = [
        replace(s, adapter=Adapter({n: _balanced(p) for n, p in s.adapter.lora.items()}, s.adapter.dense))
        for s in sites
    ]
    verdicts = registry["clip_norm"](Cohort(even, Adapter(), "none"))
    assert ("t" not in verdicts) == stays


def _balanced(pair: LoraPair) -> LoraPair:
    """The same product, both factors equally long."""
    ratio = (pair.B.norm() / pair.A.norm()).sqrt()
    return LoraPair(pair.A * ratio, pair.B / ratio, pair.scale)


@pytest.mark.parametrize("far", [1.0, 1e6])
def test_of_two_sites_neither_is_judged(far):
    sites = [moved("a", Adapter(), 1.0, 1), moved("b", Adapter(), far, 2)]
    assert not judge(["clip_norm"], Cohort(sites, Adapter(), "tail"))
    idle = [moved(name, Adapter(), 0.0, 3, dense=0.0) for name in "cd"]
    assert not judge(["clip_norm"], Cohort([*sites, *idle], Adapter(), "tail"))  # who changed nothing has no say


def test_a_late_change_is_measured_from_where_it_began_and_clipped_like_any_other():
    before, today = start(3), Adapter({n: replace(p, B=5 * p.B) for n, p in start(3).lora.items()}, start(3).dense)
    honest = [moved(f"s{i}", today, 1.0, i) for i in range(3)]
    late = {far: replace(moved("late", before, far, 9), start=before, staleness=1) for far in (1.0, 40.0)}
    assert not merged(today, [*honest, late[1.0]]).guarded
    result = merged(today, [*honest, late[40.0]])
    assert result.guarded["late"].multiplier == pytest.approx(0.1, rel=1e-3)
    assert change(result, today) <= 1.01 * (3 + MOST) / 4
    (found,) = Cohort([rebased(late[40.0], today, "tail")], today, "tail").moved
    assert found.products == pytest.approx(40.0, rel=1e-3)


def test_what_is_clipped_counts_less_in_the_inner_products_that_steps_and_weights_look_at():
    sites = [moved(f"s{i}", Adapter(), 1.0, i) for i in range(3)] + [moved("t", Adapter(), 100.0, 9)]
    whole = Cohort(sites, Adapter(), "tail").products
    left = torch.tensor([1.0, 1.0, 1.0, 0.04], dtype=torch.float64)
    close(Cohort(sites, Adapter(), "tail", multipliers=left.tolist()).products, whole * left * left[:, None], 1e-12)
    fedexp = {"rule": "fedexp", "most": 100}
    step = merged(Adapter(), sites, step=fedexp).step_size
    as_if = merged(Adapter(), [*sites[:3], moved("t", Adapter(), 4.0, 9)], step=fedexp).step_size
    assert step == pytest.approx(as_if, rel=1e-3)
    assert 1 < step < 100


def test_the_verdicts_of_several_guards_are_multiplied(monkeypatch):
    list(registry)  # filled, so that what is added here goes away again
    monkeypatch.setitem(registry._entries, "given", lambda cohort: {"b": Verdict(0.5, "why not")})
    sites = [moved("a", Adapter(), 1.0, 1), moved("b", Adapter(), 1.0, 2)]
    assert judge(["given", "given"], Cohort(sites, Adapter(), "tail")) == {"b": Verdict(0.25, "why not; why not")}


def test_where_guards_leave_nobody_the_round_says_why(monkeypatch):
    list(registry)
    monkeypatch.setitem(registry._entries, "given", lambda cohort: {"a": Verdict(0.0, "why not")})
    with pytest.raises(WireError) as raised:
        merged(Adapter(), [moved("a", Adapter(), 1.0, 1)], guard=("given",))
    assert raised.value.code == "nothing_to_merge"
    assert "a: guard: why not" in raised.value.message


def test_an_unknown_guard_and_a_setting_out_of_range_are_refused_by_name():
    with refused("unknown_name", ConfigError, '"clip_norm"'):
        judge(["clip_norms"], Cohort([]))
    with refused("wrong_setting", ConfigError, "clip_norm", "most"):
        judge([{"rule": "clip_norm", "most": 0.5}], Cohort([]))


LENGTHS, PLACES = ["clip_norm"], ["clip_norm", {"rule": "geometric_median", "mix": "nnm", "near": 1.5}]


@pytest.mark.parametrize(
    ("plan", "how", "usual"),
    [
        ({}, {}, PLACES),
        ({"peft": {"method": "ia3"}}, {}, PLACES),
        ({}, {"merge": "freeze_a"}, PLACES),
        ({}, {"merge": "factor_mean"}, LENGTHS),
        ({}, {"merge": "share_a"}, LENGTHS),
        ({"training": {"local_steps": 0}}, {}, LENGTHS),
        ({"negotiable": ["local_steps"]}, {}, LENGTHS),
        ({}, {"normalize_steps": True}, LENGTHS),
        ({}, {"max_staleness": 1}, LENGTHS),
        ({"privacy": {"epsilon": 8, "delta": 1e-5}}, {}, LENGTHS),
        ({"uplink": ["ckks"], "downlink": []}, {"merge": "freeze_a"}, []),
    ],
)
def test_the_guard_a_job_leaves_open_compares_places_where_honest_sites_do_the_same_work(plan, how, usual):
    asked = RoundPlan.read(plan, "plan"), Aggregation.read(how, "aggregation")
    assert list(settle(*asked).aggregation.guard) == usual
    assert settle(asked[0], asked[1].model_copy(update={"guard": ()})).aggregation.guard == ()
    own = settle(*asked, {"north": SiteOverrides(local_steps=3)}).aggregation.guard
    assert list(own) == (LENGTHS if usual else [])


def test_by_default_one_of_five_that_sends_the_opposite_is_left_out_and_nobody_where_all_are_honest():
    how = settle(RoundPlan(), Aggregation(step="plain")).aggregation
    honest = [moved(f"s{place}", BEGAN, 1.0, 7, dense=1.0) for place in range(4)]
    bad = moved("bad", BEGAN, -3.0, 7, dense=-3.0)
    result = combine(BEGAN, MANIFEST, [*honest, bad], how, 3)
    assert (list(result.refused), result.weights["s0"]) == (["bad"], pytest.approx(0.25))
    assert not combine(BEGAN, MANIFEST, honest, how, 3).guarded
