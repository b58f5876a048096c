"""ε: against closed forms, against another library's accountant, and the laws that any ε obeys."""

import math
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nvflare_fm.errors import ConfigError
from nvflare_fm.privacy.accountant import epsilon, noise_multiplier
from nvflare_fm.privacy.events import Event, together


def normal_cdf(x: float) -> float:
    return 0.5 * math.erfc(-x / math.sqrt(2))


def gaussian_delta(eps: float, mu: float) -> float:
    """δ at ε of noise of deviation 1 on a sum of sensitivity μ: Balle and Wang, arXiv:1805.06530, theorem 8."""
    return normal_cdf(mu / 2 - eps / mu) - math.exp(eps) * normal_cdf(-mu / 2 - eps / mu)


def gaussian_epsilon(delta: float, mu: float) -> float:
    low, high = 0.0, 50.0
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if gaussian_delta(middle, mu) > delta else (low, middle)
    return high


@pytest.mark.parametrize(("noise", "steps"), [(0.8, 1), (1.0, 1), (2.0, 9), (5.0, 100), (20.0, 40)])
@pytest.mark.parametrize("delta", [1e-6, 1e-3])
def test_of_every_record_in_every_step_epsilon_is_the_gaussian_mechanisms(
    noise: float, steps: int, delta: float
) -> None:
    """Without sampling, T sums under noise σ are one under σ/√T. PRV finds it; RDP lies above it by its conversion."""
    exact = gaussian_epsilon(delta, math.sqrt(steps) / noise)
    event = [Event(noise, 1.0, steps)]
    assert exact - 1e-3 <= epsilon(event, delta, "prv") <= exact + 0.03
    assert exact <= epsilon(event, delta, "rdp")
    assert epsilon(event, delta) == min(epsilon(event, delta, "prv"), epsilon(event, delta, "rdp"))


@pytest.mark.parametrize(("noise", "steps"), [(1.0, 1), (2.0, 9), (5.0, 100)])
def test_rdp_is_its_closed_form_where_nothing_is_sampled(noise: float, steps: int) -> None:
    """Rényi divergence α·T/2σ² (Mironov, arXiv:1702.07476), and ε of it by Canonne et al. (arXiv:2004.00010)."""
    delta, orders = 1e-5, [1 + x / 10 for x in range(1, 100)] + list(range(12, 64))
    closed = min(
        a * steps / (2 * noise**2) + math.log((a - 1) / a) - (math.log(delta) + math.log(a)) / (a - 1) for a in orders
    )
    assert epsilon([Event(noise, 1.0, steps)], delta, "rdp") == pytest.approx(closed, rel=1e-6)


# By dp-accounting 0.6.0, in an environment of its own (it needs older attrs than ours):
#   python -m venv X; X/bin/pip install dp-accounting==0.6.0; X/bin/python -c '
#   from dp_accounting import dp_event as e; from dp_accounting.pld import PLDAccountant
#   from dp_accounting.rdp import RdpAccountant
#   ev = e.SelfComposedDpEvent(e.PoissonSampledDpEvent(q, e.GaussianDpEvent(s)), T)
#   print(PLDAccountant().compose(ev).get_epsilon(d), RdpAccountant().compose(ev).get_epsilon(d))'
OTHERS = [  # σ, q, T, δ, PLD, RDP
    (1.0, 0.01, 1000, 1e-5, 1.8282436455855091, 2.101366525420273),
    (0.8, 0.05, 200, 1e-5, 7.702169671197308, 8.743239135583078),
    (2.0, 0.3, 100, 1e-4, 6.911301716599047, 7.655481770661572),
    (0.6, 0.004, 5000, 1e-6, 7.287430737688497, 8.33253952620196),
    (1.5, 1.0, 10, 1e-5, 10.669522834696647, 11.440860686744493),
    (5.0, 0.5, 400, 1e-3, 7.6754561627489455, 8.651721122884936),
]


@pytest.mark.parametrize(("noise", "rate", "steps", "delta", "pld", "rdp"), OTHERS)
def test_another_librarys_accountants_agree(
    noise: float, rate: float, steps: int, delta: float, pld: float, rdp: float
) -> None:
    event = [Event(noise, rate, steps)]
    assert epsilon(event, delta, "prv") == pytest.approx(pld, abs=0.02)
    assert epsilon(event, delta, "rdp") == pytest.approx(rdp, rel=0.02)  # it leaves out orders that do not converge


Accountant = Literal["rdp", "prv"]


@pytest.mark.parametrize("accountant", ["rdp", "prv"])
def test_more_noise_costs_less_and_more_of_anything_else_more(accountant: Accountant) -> None:
    base, delta = (1.2, 0.05, 50), 1e-5

    def cost(noise: float, rate: float, steps: int, delta: float = delta) -> float:
        return epsilon([Event(noise, rate, steps)], delta, accountant)

    assert cost(1.5, *base[1:]) < cost(*base) < cost(1.0, *base[1:])
    assert cost(1.2, 0.03, 50) < cost(*base) < cost(1.2, 0.1, 50)
    assert cost(1.2, 0.05, 40) < cost(*base) < cost(1.2, 0.05, 60)
    assert cost(*base, delta=1e-4) < cost(*base) < cost(*base, delta=1e-6)


@given(st.lists(st.tuples(st.sampled_from([1.0, 2.5]), st.integers(1, 9)), min_size=1, max_size=5))
@settings(max_examples=10)
def test_the_order_of_events_and_how_they_are_cut_does_not_matter(parts: list[tuple[float, int]]) -> None:
    events = [Event(noise, 1.0, steps) for noise, steps in parts]
    single = [Event(event.noise_multiplier, 1.0) for event in reversed(events) for _ in range(event.steps)]
    assert epsilon(single, 1e-4, "rdp") == pytest.approx(epsilon(events, 1e-4, "rdp"), rel=1e-9)
    assert sum(event.steps for event in together(events)) == len(single)


def test_nothing_costs_nothing() -> None:
    assert epsilon([], 1e-5) == 0


@pytest.mark.parametrize(("target", "rate", "steps"), [(1.0, 1.0, 20), (8.0, 1.0, 20), (8.0, 0.2, 3)])
def test_the_noise_for_an_epsilon_is_enough_and_no_more(target: float, rate: float, steps: int) -> None:
    noise = noise_multiplier(target, 1e-5, rate, steps)
    assert epsilon([Event(noise, rate, steps)], 1e-5) <= target
    assert epsilon([Event(noise / 1.002, rate, steps)], 1e-5) > target


def test_an_epsilon_out_of_reach_is_told() -> None:
    with pytest.raises(ConfigError) as refused:
        noise_multiplier(1e-5, 1e-9, 1.0, 10**6)
    assert refused.value.code == "epsilon_out_of_reach"


def test_events_of_so_many_kinds_that_prv_would_take_gigabytes_count_by_rdp() -> None:
    """A server that asks for another noise in each round could otherwise spoil a site's budget for good."""
    many = [Event(50 + kind / 1000, 1.0) for kind in range(17)]
    assert epsilon(many, 1e-5) == epsilon(many, 1e-5, "rdp") > epsilon(many[:16], 1e-5)
    assert epsilon(many[:16], 1e-5) < epsilon(many[:16], 1e-5, "rdp")
