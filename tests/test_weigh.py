"""What a site's update counts."""

from dataclasses import replace

import pytest
from hypothesis import given

from nvflare_fm.adapter import Adapter, Report
from nvflare_fm.aggregation.weigh import registry, weigh
from nvflare_fm.errors import ConfigError
from tests.strategies import cohorts, update


@pytest.fixture
def factor(monkeypatch):
    """Puts a weight factor of the given values into the registry, for one test."""
    list(registry)  # filled, so that what is added here goes away again

    def add(*values: float) -> None:
        monkeypatch.setitem(registry._entries, "given", lambda updates: list(values))

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
    with pytest.raises(ConfigError, match=r"examples.*hospital-a.*not all zero"):
        weigh(["examples"], [update("hospital-a", Adapter(), 0)])


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
def test_a_factor_that_is_negative_or_not_finite_is_refused_even_where_the_product_looks_sound(factor, bad):
    factor(bad, 1.0)
    with pytest.raises(ConfigError, match=r"given.*hospital-a"):
        weigh(["given", "given"], [update("hospital-a", Adapter()), update("b", Adapter())])


def test_an_unknown_factor_is_refused_with_the_nearest_known_one():
    with pytest.raises(ConfigError, match='did you mean "examples"'):
        weigh(["example"], [update("a", Adapter())])


def test_only_the_report_decides():
    one, other = update("a", Adapter(), 5), update("b", Adapter(), 5)
    assert weigh(["examples"], [one, replace(other, report=Report(examples=5, loss=99.0))]) == [0.5, 0.5]
