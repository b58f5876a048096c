"""Client-level differential privacy: one site moves the sum by the clipping norm at most, and noise covers that."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nvflare_fm.adapter import Adapter, AdapterUpdate, LoraPair
from nvflare_fm.aggregation import noised
from nvflare_fm.aggregation.combine import Combined, combine
from nvflare_fm.aggregation.noised import combine_noised
from nvflare_fm.config import Aggregation
from nvflare_fm.errors import ConfigError, WireError
from nvflare_fm.privacy import accountant, clients, gaussian
from nvflare_fm.privacy.clients import HOPELESS, ClientNoise, checked, noised_numbers
from nvflare_fm.privacy.events import Event
from nvflare_fm.record.round import Round, in_words
from tests.codes import refused
from tests.strategies import MANIFEST, SINGLE, close, make_pair, scales, sides, update

HOW = Aggregation(merge="freeze_a", guard=(), step="plain")
SIZES = st.sampled_from([0.0, 1e-6, 0.1, 1.0, 30.0, 1e6])  # of what a site changed


def merged(state: Adapter, updates: list[AdapterUpdate], noise: ClientNoise, **more: Any) -> Combined:
    return combine_noised(state, MANIFEST, updates, more.pop("how", HOW), noise, 0, 8, **more)


def mean(state: Adapter, updates: list[AdapterUpdate], noise: ClientNoise) -> Adapter:
    """What gets the noise."""
    return quietly(state, updates, noise).adapter


def quietly(state: Adapter, updates: list[AdapterUpdate], noise: ClientNoise, **more: Any) -> Combined:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(noised, "normal", lambda count: torch.zeros(count, dtype=torch.float64))
        return merged(state, updates, noise, **more)


def numbers(adapter: Adapter) -> Tensor:
    """All that is noised, as one vector."""
    products = [(adapter.lora[name].scale * adapter.lora[name].B.double()).flatten() for name in sorted(adapter.lora)]
    return torch.cat([*products, *(adapter.dense[name].double().flatten() for name in sorted(adapter.dense))])


def moved(state: Adapter, seed: int, size: float, scale: float | None = None) -> Adapter:
    """The state with other values in every tensor, A among them, as far off as `size` says."""
    generator = torch.Generator().manual_seed(seed)

    def off(tensor: Tensor) -> Tensor:
        return tensor + size * torch.randn(tensor.shape, generator=generator)

    pairs = {name: pair.rescaled(scale or pair.scale) for name, pair in state.lora.items()}
    lora = {name: LoraPair(off(pair.A), off(pair.B), pair.scale) for name, pair in pairs.items()}
    return Adapter(lora, {name: off(tensor) for name, tensor in state.dense.items()})


@st.composite
def rounds(draw: st.DrawFn) -> tuple[Adapter, list[AdapterUpdate], ClientNoise]:
    shapes = draw(st.lists(st.tuples(sides, sides), max_size=2))
    scale, rank, seed = draw(scales), draw(st.integers(1, 4)), draw(st.integers(0, 2**32))
    lora = {f"layer{i}": make_pair(*s, rank, seed + i, scale=scale).to(SINGLE) for i, s in enumerate(shapes)}
    state = Adapter(lora, {"head": make_pair(3, 2, 2, seed).B.float()})
    sizes, own = draw(st.lists(SIZES, min_size=1, max_size=4)), draw(scales)
    updates = [update(f"site-{i}", moved(state, seed + i, size, own)) for i, size in enumerate(sizes)]
    norm, expected = draw(st.sampled_from([1e-6, 0.5, 1.0, 1e3])), draw(st.integers(2, 9))
    return state, updates, ClientNoise(1.0, norm, expected, 1e-5, 1)


@given(case=rounds(), size=SIZES, seed=st.integers(0, 2**32))
def test_whatever_one_site_sends_it_moves_the_mean_by_no_more_than_its_share_of_the_clipping_norm(case, size, seed):
    state, updates, noise = case
    most, rounding = noise.max_norm / noise.expected_sites, 1e-6 * (1 + float(numbers(state).norm()) + noise.max_norm)
    absent, full = replace(updates[0], adapter=state), numbers(mean(state, updates, noise))
    without = numbers(mean(state, [absent, *updates[1:]], noise))
    assert float((full - without).norm()) <= most + rounding
    if updates[1:]:  # a site that changed nothing and one that did not answer leave the same mean
        close(numbers(mean(state, updates[1:], noise)), without, 1e-12, 1.0)
    other = replace(updates[0], adapter=moved(state, seed, size))
    assert float((full - numbers(mean(state, [other, *updates[1:]], noise))).norm()) <= 2 * most + rounding


@given(case=rounds())
def test_what_is_short_enough_counts_in_full_and_what_is_longer_as_the_clipping_norm(case):
    state, updates, noise = case
    for one in updates:
        change, length = numbers(one.adapter) - numbers(state), float((numbers(one.adapter) - numbers(state)).norm())
        found = quietly(state, [one], noise)
        expected = change * min(1.0, noise.max_norm / length if length else 1.0) / noise.expected_sites
        got = numbers(found.adapter) - numbers(state)
        close(got, expected, 1e-6, 1 + float(numbers(state).norm()) + noise.max_norm)
        assert bool(found.guarded) == (length > noise.max_norm * (1 - 1e-9))
        assert found.noised is not None
        assert found.noised.clipped == len(found.guarded)


def test_without_clip_and_noise_it_is_the_mean_beside_the_frozen_a():
    state = Adapter({"q": make_pair(6, 5, 3, seed=0, scale=2.0).to(SINGLE)}, {"head": torch.ones(2, 3)})
    updates = [update(f"s{i}", moved(state, i, 1.0)) for i in range(3)]
    ours = mean(state, updates, ClientNoise(1.0, 1e6, 3, 1e-5, 1))
    plain = combine(state, MANIFEST, updates, HOW, 8).adapter
    close(ours.lora["q"].delta(), plain.lora["q"].delta(), 1e-6)
    close(ours.dense["head"], plain.dense["head"], 1e-6)
    assert torch.equal(ours.lora["q"].A, state.lora["q"].A)


@pytest.mark.parametrize(("sigma", "norm", "sites"), [(1.0, 1.0, 2), (5.0, 0.3, 40)])
def test_the_noise_is_as_large_as_asked_on_each_number_and_never_the_same(sigma: float, norm: float, sites: int):
    """40,000 numbers: the deviation found is within 2 % of the true one, but for one time in 10⁷."""
    state = Adapter({"q": make_pair(200, 5, 100, seed=0, scale=4.0).to(SINGLE)}, {"head": torch.zeros(200, 100)})
    noise = ClientNoise(sigma, norm, sites, 1e-5, 1)
    once, again = (merged(state, [update("s", state)], noise).adapter for _ in range(2))
    for first, second in ((once, state), (again, state), (once, again)):
        found = (numbers(first) - numbers(second)) / (sigma * norm / sites)
        expected = 1.0 if second is state else math.sqrt(2)
        for part in found.chunk(2):  # of B, of the head
            assert float(part.std()) == pytest.approx(expected, rel=0.02)
            assert abs(float(part.mean())) < 0.05
    assert torch.equal(once.lora["q"].A, state.lora["q"].A)


@given(case=rounds(), share=st.floats(0.01, 1.0))
def test_nothing_that_a_site_reports_but_its_own_wish_changes_what_it_counts(case, share):
    state, updates, noise = case
    boasting = [replace(u, report=replace(u.report, examples=10**9, loss=0.0, before={"loss": 9.0})) for u in updates]
    assert torch.equal(numbers(mean(state, updates, noise)), numbers(mean(state, boasting, noise)))
    shy = [replace(updates[0], report=replace(updates[0].report, max_weight=share)), *updates[1:]]
    found = merged(state, shy, noise).weights
    assert found[updates[0].site] == min(share, 1 / noise.expected_sites)
    assert all(found[u.site] == 1 / noise.expected_sites for u in updates[1:])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_change_without_a_length_does_not_count_and_spoils_nothing(value: float):
    state = Adapter({"q": make_pair(4, 3, 2, seed=0).to(SINGLE)}, {"head": torch.ones(2)})
    noise, good = ClientNoise(1.0, 1.0, 2, 1e-5, 1), update("good", moved(state, 1, 0.1))
    bad = update("bad", replace(state, dense={"head": torch.tensor([1.0, value])}))
    assert torch.equal(numbers(mean(state, [good, bad], noise)), numbers(mean(state, [good], noise)))
    assert merged(state, [good, bad], noise).refused["bad"].code == "not_finite"
    with refused("nothing_to_merge", WireError):
        merged(state, [bad], noise)


def test_an_update_of_other_layers_or_another_rank_is_held_against_the_state_and_not_against_the_others():
    state = Adapter({"q": make_pair(4, 3, 2, seed=0).to(SINGLE)})
    wide = Adapter({"q": make_pair(4, 3, 3, seed=0).to(SINGLE)})
    others = [update("a", wide), update("b", wide), update("c", state)]
    assert {*merged(state, others, ClientNoise(1.0, 1.0, 3, 1e-5, 1)).refused} == {"a", "b"}


def test_what_the_encoding_for_the_way_rounded_off_is_added_back():
    whole = Adapter({"q": make_pair(4, 3, 2, seed=0).to(SINGLE)}, {"head": torch.full((2,), 1 / 3)})
    received = moved(whole, 1, 1e-3)
    noise = ClientNoise(1.0, 1.0, 1, 1e-5, 1)
    found = quietly(received, [update("a", received)], noise, whole=whole).adapter
    close(numbers(found), numbers(whole), 1e-6)
    close(found.lora["q"].A, whole.lora["q"].A, 1e-6)


def test_a_server_step_acts_on_the_noised_mean():
    """So it costs nothing: with the same noise, twice the step is twice the change, noise included."""
    state = Adapter({}, {"head": torch.zeros(5, 5)})
    steps = [HOW.model_copy(update={"step": {"rule": "plain", "learning_rate": rate}}) for rate in (1.0, 2.0)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(noised, "normal", lambda count: torch.arange(count, dtype=torch.float64))
        noise, sites = ClientNoise(1.0, 1.0, 2, 1e-5, 1), [update("a", moved(state, 1, 1.0))]
        once, twice = (numbers(merged(state, sites, noise, how=how).adapter) for how in steps)
    close(twice, 2 * once, 1e-6)


def test_a_merge_without_noise_refuses_a_job_that_asks_for_it():
    asked = HOW.model_copy(update={"client_privacy": HOW.client_privacy.model_copy(update={"epsilon": 8.0})})
    with refused("merge_without_noise", ConfigError):
        combine(Adapter(), None, [], asked, 8)


# --- what it costs


@pytest.mark.parametrize(("sigma", "steps"), [(0.8, 1), (2.0, 9), (5.0, 100), (2.7, 20)])
@pytest.mark.parametrize("delta", [1e-6, 1e-3])
def test_epsilon_is_no_more_than_two_accountants_bounds_and_near_the_tighter_one(sigma, steps, delta):
    exact, event = gaussian.epsilon(sigma, steps, delta), [Event(sigma, 1.0, steps)]
    assert exact <= accountant.epsilon(event, delta, "rdp")
    assert accountant.epsilon(event, delta, "prv") - 0.03 <= exact <= accountant.epsilon(event, delta, "prv") + 1e-3


EPSILONS, DELTAS = st.floats(1e-3, 100), st.floats(1e-12, 0.01)


@given(epsilon=EPSILONS, delta=DELTAS, steps=st.integers(1, 10**6))
def test_the_noise_that_an_epsilon_needs_costs_that_epsilon_and_a_little_less_noise_more(epsilon, delta, steps):
    sigma = gaussian.noise_multiplier(epsilon, steps, delta)
    assert gaussian.epsilon(sigma, steps, delta) <= epsilon * (1 + 1e-6)
    assert gaussian.epsilon(0.99 * sigma, steps, delta) > epsilon


@given(sigma=st.floats(1e-3, 1e3), steps=st.integers(1, 10**6), delta=DELTAS)
def test_more_rounds_cost_more_and_more_noise_costs_less(sigma, steps, delta):
    cost = gaussian.epsilon(sigma, steps, delta)
    assert 0 <= cost <= 1e12
    assert cost <= gaussian.epsilon(sigma, 2 * steps, delta)
    assert cost >= gaussian.epsilon(2 * sigma, steps, delta)


# --- what is asked, and what is refused

WRITTEN = st.fixed_dictionaries(
    {},
    optional={
        "epsilon": st.none() | st.floats(allow_nan=True) | st.sampled_from([1e-300, 8.0, 100.0, "8", True]),
        "noise_multiplier": st.none() | st.floats(allow_nan=True) | st.sampled_from([1e-3, 1.0, 1e3]),
        "delta": st.floats(allow_nan=True) | st.sampled_from([1e-12, 1e-5, 0.01]),
        "max_norm": st.floats(allow_nan=True) | st.sampled_from([1e-6, 1.0, 1e6]),
        "expected_sites": st.integers() | st.sampled_from([0, 2, 50, 100_000]) | st.floats(),
        "sites": st.just(3),
    },
)


@given(written=WRITTEN, steps=st.integers(1, 10**6))
def test_settings_are_refused_or_give_noise_that_costs_what_they_say(written, steps):
    try:
        asked = Aggregation.read({"client_privacy": written}, "test").client_privacy
        noise = ClientNoise.of(asked, steps) if asked.asked else None
    except ConfigError:
        return
    if noise is None:
        assert not any(written.get(name) for name in ("expected_sites", "epsilon", "noise_multiplier"))
        return
    assert 0 < noise.spread < math.inf
    assert noise.delta * noise.expected_sites < 1
    assert asked.epsilon is None or noise.epsilon(steps) <= asked.epsilon * (1 + 1e-6) + 1e-9
    assert noise.ratio(100) == pytest.approx(noise.ratio_of_all(100) * math.sqrt(steps))
    assert noise.ratio_of_all(100) == pytest.approx(10 * noise.per_number)


ASKED = {"epsilon": 8.0, "expected_sites": 10, "delta": 1e-5}
START = Adapter({"q": make_pair(384, 384, 8, seed=0).to(SINGLE)}, {"head": torch.zeros(77, 384)})


@pytest.mark.parametrize(
    ("code", "asked", "start"),
    [
        ("client_start", ASKED, None),
        ("client_start", ASKED, Adapter()),
        ("delta_too_large", ASKED | {"expected_sites": 100, "delta": 0.01}, START),
        ("client_noise_hopeless", ASKED | {"expected_sites": 2, "epsilon": 1.0}, START),
    ],
)
def test_a_job_that_cannot_be_private_or_cannot_learn_is_refused(code, asked, start):
    with refused(code, ConfigError):
        checked(Aggregation.read({"client_privacy": asked}, "test").client_privacy, 20, start)


@given(epsilon=st.floats(0.01, 100), sites=st.integers(2, 10**4), steps=st.integers(1, 1000))
def test_a_job_is_refused_as_hopeless_by_the_noise_of_all_rounds_and_told_how_many_sites_it_takes(
    epsilon, sites, steps
):
    asked = Aggregation.read({"client_privacy": ASKED | {"epsilon": epsilon, "expected_sites": sites}}, "x")
    ratio = ClientNoise.of(asked.client_privacy, steps).per_number
    if ratio <= HOPELESS:
        checked(asked.client_privacy, steps, START)
        return
    with refused("client_noise_hopeless", ConfigError, f"it takes {math.ceil(sites * ratio / HOPELESS)} sites"):
        checked(asked.client_privacy, steps, START)


def test_the_numbers_that_get_noise_are_those_of_b_and_of_what_has_no_factors():
    assert noised_numbers(START) == 384 * 8 + 77 * 384 == len(numbers(START))
    assert clients.noised_numbers(Adapter()) == 0


def test_a_round_says_what_was_done():
    found = merged(START, [update("a", moved(START, 1, 1.0))], ClientNoise(2.0, 1.0, 40, 1e-5, 20))
    assert found.noised is not None
    assert found.noised.epsilon == gaussian.epsilon(2.0, 1, 1e-5)
    assert found.noised.ratio == pytest.approx(2.0 * len(numbers(START)) ** 0.5 / 40)
    (said, *_) = in_words(Round(round=0, total_rounds=20, noised=found.noised))
    assert all(word in said for word in ("1 changes clipped to 1", "σ 2", "ε of a site"))
