"""What a site says of itself cannot take the others' weight, and what it measured cannot choose the best alone."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nvflare_fm.adapter import Adapter, AdapterUpdate
from nvflare_fm.aggregation import guard
from nvflare_fm.aggregation.claims import FAR, FAR_LOSS, at_most, held, shared, within
from nvflare_fm.aggregation.combine import combine, per_step
from nvflare_fm.aggregation.metrics import mean, medians
from nvflare_fm.config import Aggregation
from nvflare_fm.untrusted import printable, usable
from tests.strategies import SINGLE, make_pair, update

counts = st.lists(st.integers(1, 10**9), min_size=1, max_size=7)
PAIR = Adapter({"q": make_pair(4, 3, 2, seed=0).to(SINGLE)})


def saying(site: str, examples: int = 10, steps: int = 5, loss: float = 2.0) -> AdapterUpdate:
    one = update(site, PAIR, examples)
    return replace(one, report=replace(one.report, steps=steps, label_skew=0.1, before={"loss": loss}))


@given(values=st.lists(st.floats(0, 1e9), min_size=1, max_size=7))
def test_what_is_within_ten_times_the_median_of_the_others_stays_and_nothing_counts_more(values):
    found = at_most(values)
    for place, (before, after) in enumerate(zip(values, found, strict=True)):
        others = sorted([*values[:place], *values[place + 1 :]])
        usual = (others[(len(others) - 1) // 2] + others[len(others) // 2]) / 2 if others else 0.0
        assert after == (before if usual <= 0 or before <= FAR * usual else pytest.approx(FAR * usual))


@given(honest=st.lists(st.integers(1, 1000), min_size=2, max_size=7), lie=st.integers(1, 10**9))
def test_of_n_sites_one_that_lies_about_its_examples_has_less_than_its_bound_of_the_weight(honest, lie):
    sites = [saying(f"s{i}", n) for i, n in enumerate(honest)] + [saying("liar", lie)]
    for weigh in (["examples"], ["examples", "skew"]):
        share = combine(Adapter(), None, sites, Aggregation(weigh=weigh), 2).weights["liar"]
        if weigh == ["examples"]:
            assert share <= 2 * FAR / (len(sites) - 1 + 2 * FAR) + 1e-9
        assert share < 1


@given(honest=st.lists(st.integers(1, 1000), min_size=1, max_size=7), lie=st.integers(1, 10**9))
def test_where_a_guard_counts_sites_one_that_lies_has_no_more_than_twice_an_equal_share(honest, lie):
    sites = [saying(f"s{i}", n) for i, n in enumerate(honest)] + [saying("liar", lie)]
    guards = guard.usual(unseen=False, alike=True)
    share = combine(Adapter(), None, sites, Aggregation(weigh=["examples"], guard=guards), 2).weights["liar"]
    assert share <= 2 / len(sites) + 1e-9


@pytest.mark.parametrize(("most", "share"), [(None, 2 / 5), (0.3, 0.3), (1.0, FAR / (FAR + 4))])
def test_a_job_sets_another_limit(most, share):
    sites = [saying(f"s{i}", 10) for i in range(4)] + [saying("liar", 10**9)]
    how = Aggregation(weigh=["examples"], guard=guard.usual(unseen=False, alike=True), max_weight=most)
    assert combine(Adapter(), None, sites, how, 2).weights["liar"] == pytest.approx(share)


@pytest.mark.parametrize("loss", [1e308, 1e9, 5e-324, 0.0])
@pytest.mark.parametrize("q", [1.0, 2.0])
def test_one_that_lies_about_its_loss_does_not_have_all_the_weight(loss, q):
    sites = [saying("a"), saying("b"), saying("liar", loss=loss)]
    result = combine(Adapter(), None, sites, Aggregation(weigh=[{"rule": "loss", "q": q}]), 2)
    assert result.weights["liar"] <= FAR_LOSS**q / (FAR_LOSS**q + 2) + 1e-9
    assert ("liar" in result.held) == (loss > 6)


@given(honest=st.lists(st.floats(0.0, 1.4), min_size=2, max_size=7), lie=st.floats(0.0, 1.4))
def test_one_that_claims_evenly_spread_labels_weighs_no_more_than_the_most_even_of_the_others(honest, lie):
    sites = [saying(f"s{i}") for i in range(len(honest))] + [saying("liar")]
    said = [replace(s, report=replace(s.report, label_skew=d)) for s, d in zip(sites, [*honest, lie], strict=True)]
    kept = {u.site: u.report.label_skew for u in held(said, ["skew"])[0]}
    assert kept["liar"] == max(lie, min(honest))
    how = Aggregation(weigh=["examples", {"rule": "skew", "b": 1.0}])
    weights = combine(Adapter(), None, said, how, 2).weights
    assert weights["liar"] <= max(w for s, w in weights.items() if s != "liar") + 1e-9
    assert shared([]) == []


def test_one_that_holds_a_long_product_has_no_more_than_three_times_the_usual_weight():
    pairs = {"q": replace(PAIR.lora["q"], scale=1e6)}
    sites = [saying("a"), saying("b"), replace(saying("liar"), adapter=Adapter(pairs))]
    weights = combine(Adapter(), None, sites, Aggregation(weigh=["norm"], guard=()), 2).weights
    assert weights["liar"] == pytest.approx(FAR_LOSS / (FAR_LOSS + 2))


def test_where_the_loss_is_nothing_everywhere_all_weigh_the_same():
    sites = [saying(name, loss=0.0) for name in "abc"]
    assert list(combine(Adapter(), None, sites, Aggregation(weigh=["loss"]), 2).weights.values()) == [1 / 3] * 3


@given(steps=st.integers(10, 1000), sites=st.integers(2, 6), lie=st.integers(1, 10**9))
def test_among_sites_of_equal_steps_one_that_lies_about_its_own_makes_nobody_count_more_than_ten_times(
    steps, sites, lie
):
    said, _ = held([saying(f"s{i}", steps=steps) for i in range(sites)] + [saying("liar", steps=lie)], ["steps"])
    shares = [1 / len(said)] * len(said)
    assert max(per_step(shares, said)) <= FAR * shares[0] * (1 + 1e-9)


def test_only_what_is_weighed_by_is_touched_and_it_is_told():
    sites = [saying("a"), saying("b"), saying("c", examples=10**9, steps=10**9, loss=1e8)]
    kept, notes = held(sites, ())
    assert (kept, notes) == (sites, {})
    kept, notes = held(sites, ["examples", "loss", "steps"])
    assert kept[:2] == sites[:2]
    assert (kept[2].report.examples, kept[2].report.steps, kept[2].report.before) == (100, 50, {"loss": 6.0})
    assert notes == {
        "c": "examples 1e+09 counts as 100, loss 1e+08 counts as 6, steps 1e+09 counts as 50: too far from the others'"
    }
    assert held([saying("a", examples=10**9)], ["examples"])[1] == {}  # alone, there is nobody to hold it against
    assert within([5.0, 5.0, 0.0]) == [5.0, 5.0, 0.5]


# --- what they measured

finite = st.floats(-1e9, 1e9)


@given(
    honest=st.lists(st.tuples(finite, st.floats(0.001, 1e6)), min_size=2, max_size=6),
    lie=st.floats(allow_nan=True, allow_infinity=True),
    weight=st.floats(0.001, 1e9),
)
def test_of_three_or_more_sites_one_cannot_move_the_median_out_of_the_range_of_the_others(honest, lie, weight):
    metrics = {f"s{i}": {"loss": value} for i, (value, _) in enumerate(honest)} | {"liar": {"loss": lie}}
    weights = {f"s{i}": w for i, (_, w) in enumerate(honest)} | {"liar": weight}
    found = medians(metrics, weights)["loss"]
    values = [value for value, _ in honest]
    if math.isfinite(lie) or len(honest) > 2:
        assert min(values) - 1e-6 <= found <= max(values) + 1e-6


@given(values=st.lists(finite, min_size=3, max_size=9))
def test_where_all_weigh_the_same_it_is_the_median(values):
    from statistics import median

    names = {f"s{i}": {"loss": value} for i, value in enumerate(values)}
    assert medians(names, dict.fromkeys(names, 0.1))["loss"] == pytest.approx(median(values))


def test_of_one_or_two_sites_it_is_the_mean_and_who_has_no_weight_or_no_value_has_no_say():
    metrics = {"a": {"loss": 1.0, "accuracy": 0.5}, "b": {"loss": 3.0}, "c": {"loss": math.nan}, "d": {"loss": 9.0}}
    weights = {"a": 0.75, "b": 0.25, "c": 0.5, "d": 0.0}
    assert medians(metrics, weights) == mean(metrics, weights) == {"loss": 1.5, "accuracy": 0.5}
    assert medians({}, weights) == mean({}, {}) == {}


def test_metrics_that_cannot_be_compared_are_left_out():
    said = {"a": 1.0, "b": math.nan, "c": math.inf, "d": 1e300, "e": -1e9}
    assert usable(said) == {"a": 1.0, "e": -1e9}


@given(text=st.text(max_size=40), longest=st.integers(0, 30))
def test_a_text_from_elsewhere_is_one_short_line_that_prints_as_itself(text, longest):
    found = printable(text, longest)
    assert found.isprintable()
    assert len(found) <= 10 * longest + 1
    assert printable(found, 1000) == found


def test_terminal_codes_line_breaks_and_reversed_writing_are_shown_and_what_is_no_text_is_abbreviated():
    assert printable("a\x1b[31mb\nc\u202ed\ud800é中") == "a\\x1b[31mb\\nc\\u202ed\\ud800é中"
    assert printable("x" * 10**7) == "x" * 500 + "…"
    assert len(printable([[0] * 1000] * 1000)) < 500
