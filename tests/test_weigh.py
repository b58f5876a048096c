"""What a site's update counts."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nvflare_fm.adapter import Adapter, Report
from nvflare_fm.aggregation.cohort import Cohort
from nvflare_fm.aggregation.weigh import capped, registry
from nvflare_fm.aggregation.weigh import weigh as whole
from nvflare_fm.errors import ConfigError
from tests.codes import refused
from tests.strategies import SINGLE, cohorts, make_pair, update


def weigh(names: list, updates: list, max_weight: float = 1.0) -> list[float]:
    """The shares, in the order of the updates; all that a factor might ask for is reported."""
    said = [
        u if u.report.before else replace(u, report=replace(u.report, before={"loss": 1.5}, label_skew=0.2))
        for u in updates
    ]
    return list(whole(names, Cohort(said), max_weight).shares.values())


@pytest.fixture
def factor(monkeypatch):
    """Puts a weight factor of the given values into the registry, for one test."""
    list(registry)  # filled, so that what is added here goes away again

    def add(*values: float) -> None:
        monkeypatch.setitem(registry._entries, "given", lambda cohort: list(values))

    return add


@pytest.mark.parametrize("name", list(registry))
@given(updates=cohorts())
def test_every_factor_gives_weights_that_are_not_negative_and_sum_to_one(name, updates):
    weights = weigh([name], updates)
    assert len(weights) == len(updates)
    assert min(weights) >= 0
    assert sum(weights) == pytest.approx(1)


@pytest.mark.parametrize("name", list(registry))
@given(updates=cohorts())
def test_a_weight_belongs_to_the_site_not_to_its_place(name, updates):
    there, back = weigh([name], updates), weigh([name], updates[::-1])
    assert there == pytest.approx(back[::-1])


def test_examples_weigh_in_proportion():
    assert weigh(["examples"], [update("a", Adapter(), 30), update("b", Adapter(), 10)]) == [0.75, 0.25]


def test_uniform_weighs_every_site_the_same():
    assert weigh(["uniform"], [update("a", Adapter(), 30), update("b", Adapter(), 10)]) == [0.5, 0.5]


def test_no_factor_at_all_is_uniform():
    assert weigh([], [update("a", Adapter(), 30), update("b", Adapter(), 10)]) == [0.5, 0.5]


def test_several_factors_are_multiplied(factor):
    factor(1.0, 3.0)
    assert weigh(["examples", "given"], [update("a", Adapter(), 30), update("b", Adapter(), 10)]) == [0.5, 0.5]


def test_a_site_without_examples_counts_nothing():
    assert weigh(["examples"], [update("a", Adapter(), 0), update("b", Adapter(), 10)]) == [0.0, 1.0]


def test_sites_without_any_examples_between_them_are_refused_by_name():
    with refused("weights_unusable", ConfigError, "examples", "hospital-a"):
        weigh(["examples"], [update("hospital-a", Adapter(), 0)])


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
def test_a_factor_that_is_negative_or_not_finite_is_refused_even_where_the_product_looks_sound(factor, bad):
    factor(bad, 1.0)
    with refused("weights_unusable", ConfigError, "given", "hospital-a"):
        weigh(["given", "given"], [update("hospital-a", Adapter()), update("b", Adapter())])


def test_an_unknown_factor_is_refused_with_the_nearest_known_one():
    with refused("unknown_name", ConfigError, '"examples"'):
        weigh(["example"], [update("a", Adapter())])


def test_only_the_report_decides():
    one, other = update("a", Adapter(), 5), update("b", Adapter(), 5)
    assert weigh(["examples"], [one, replace(other, report=Report(examples=5, loss=99.0))]) == [0.5, 0.5]


def at(site: str, seed: int, examples: int = 10, sign: float = 1.0, **report) -> object:
    pair = make_pair(6, 5, 2, seed=seed).to(SINGLE)
    sent = update(site, Adapter({"q": replace(pair, B=sign * pair.B)}), examples)
    return replace(sent, report=replace(sent.report, before={"loss": 1.0}, **report))


def test_feddisco_is_its_formula_where_examples_weigh_too():
    sites = [at("a", 0, 60, label_skew=0.1), at("b", 1, 30, label_skew=0.6), at("c", 2, 10, label_skew=0.9)]
    raw = [max(n / 100 - 0.5 * d + 0.1, 0.0) for n, d in ((60, 0.1), (30, 0.6), (10, 0.9))]
    found = weigh(["examples", {"rule": "skew", "a": 0.5, "b": 0.1}], sites)
    assert found == pytest.approx([r / sum(raw) for r in raw])
    assert found[2] == 0.0


def test_a_site_that_keeps_its_labels_to_itself_is_named():
    with refused("no_label_skew", ConfigError, "hospital-a"):
        whole(["skew"], Cohort([update("hospital-a", Adapter(), 5)]))


@given(q=st.sampled_from([0.0, 1.0, 2.5]))
def test_a_site_on_which_the_adapter_does_badly_counts_more_with_q(q):
    sites = [replace(at("a", 0), report=replace(at("a", 0).report, before={"loss": v})) for v in (1.0, 3.0)]
    sites[1] = replace(sites[1], site="b")
    assert weigh([{"rule": "loss", "q": q}], sites) == pytest.approx([1 / (1 + 3**q), 3**q / (1 + 3**q)])


def test_a_site_that_did_not_measure_the_loss_is_named():
    with refused("no_loss", ConfigError, "hospital-a", "evaluation.before"):
        whole(["loss"], Cohort([update("hospital-a", Adapter(), 5)]))


def test_agreement_is_the_cosine_to_the_others_unit_changes():
    sites = [at(s, i) for i, s in enumerate("abcd")]
    units = [u.adapter.lora["q"].delta().double().flatten() for u in sites]
    units = [u / u.norm() for u in units]
    expected = []
    for k, unit in enumerate(units):
        others = sum(u for i, u in enumerate(units) if i != k)
        expected.append(float((1 + unit @ others / others.norm()) / 2) ** 2)
    found = whole([{"rule": "agreement", "power": 2.0}], Cohort(sites)).factors["agreement"]
    assert list(found.values()) == pytest.approx(expected)


def test_a_site_that_pulls_the_other_way_counts_nothing_by_agreement_and_size_does_not_matter():
    sites = [at("a", 7), at("b", 7, sign=3.0), at("c", 7), at("d", 7, sign=-1.0)]
    assert weigh(["agreement"], sites) == pytest.approx([1 / 3, 1 / 3, 1 / 3, 0.0], abs=1e-6)


def test_agreement_looks_at_what_a_site_changed_not_at_what_it_was_sent():
    start = Adapter({"q": make_pair(6, 5, 2, seed=50).to(SINGLE)})
    heavy = Adapter({"q": replace(start.lora["q"], B=100 * start.lora["q"].B)})

    def moved(seed: int, sign: float) -> Adapter:
        pair = heavy.lora["q"]
        return Adapter({"q": replace(pair, B=pair.B + sign * make_pair(6, 5, 2, seed=seed).to(SINGLE).B)})

    sites = [update(s, moved(1, sign)) for s, sign in (("a", 1.0), ("b", 1.0), ("c", -1.0))]
    found = whole(["agreement"], Cohort(sites, heavy, "tail")).shares
    assert found["c"] < 1e-3


def test_norm_is_in_proportion_to_what_a_site_holds():
    sites = [at("a", 3), at("b", 3, sign=2.0)]
    assert weigh(["norm"], sites) == pytest.approx([1 / 3, 2 / 3])
    empty = [update(s, Adapter({"q": make_pair(6, 5, 2, seed=0, kind="fresh").to(SINGLE)})) for s in "ab"]
    assert weigh(["norm"], empty) == [0.5, 0.5]
    one = [at("a", 3), update("b", Adapter({"q": make_pair(6, 5, 2, seed=0, kind="fresh").to(SINGLE)}))]
    assert weigh(["norm"], one) == pytest.approx([1.0, 0.0])


shares_ = st.lists(st.floats(0.01, 1), min_size=1, max_size=6)


@given(data=st.data(), raw=shares_)
def test_capped_shares_sum_to_one_and_stay_within_their_limits_where_those_leave_room(data, raw):
    shares = [r / sum(raw) for r in raw]
    limits = data.draw(st.lists(st.floats(0.05, 1), min_size=len(raw), max_size=len(raw)))
    found = capped(shares, limits)
    assert sum(found) == pytest.approx(1)
    if sum(limits) > 1:
        assert all(f <= limit + 1e-9 for f, limit in zip(found, limits, strict=True))
        free = [i for i, (f, limit) in enumerate(zip(found, limits, strict=True)) if f < limit - 1e-9]
        ratios = [found[i] / shares[i] for i in free]
        assert ratios == pytest.approx([ratios[0]] * len(ratios)) if ratios else True
    else:
        assert found == pytest.approx([limit / sum(limits) for limit in limits])


def test_a_cap_can_push_another_site_to_its_own():
    assert capped([0.6, 0.3, 0.1], [0.4, 0.4, 1.0]) == pytest.approx([0.4, 0.4, 0.2])


def test_a_site_counts_no_more_than_it_wants_to_and_no_more_than_the_job_lets_it():
    sites = [at("a", 0, 90, max_weight=0.5), at("b", 1, 10)]
    assert weigh(["examples"], sites) == pytest.approx([0.5, 0.5])
    assert weigh(["examples"], [at("a", 0, 90), at("b", 1, 10)], max_weight=0.8) == pytest.approx([0.8, 0.2])


def test_each_factor_is_told_site_by_site():
    told = whole(["examples", "norm"], Cohort([at("a", 3, 30), at("b", 3, 10, sign=2.0)])).factors
    assert told["examples"] == {"a": 30.0, "b": 10.0}
    assert told["norm"]["b"] == pytest.approx(2 * told["norm"]["a"])
