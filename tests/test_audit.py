"""What an audit computes of losses and tokens: laws, agreement with other implementations, and simulated truth."""

from math import exp, log
from random import Random

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from scipy.stats import binom, norm
from sklearn.metrics import roc_auc_score, roc_curve

from nvflare_fm.privacy.audit.copying import longest_run
from nvflare_fm.privacy.audit.exposure import exposure
from nvflare_fm.privacy.audit.membership import auc, by_chance, curve, found_at, interval, membership
from nvflare_fm.privacy.audit.one_run import bound, ceiling, lower_bound, p_value

SCORES = st.lists(st.floats(-3, 3).map(lambda x: round(x, 1)), min_size=2, max_size=12)  # with ties
DELTA = 1e-5


# --- membership


@given(members=SCORES, held_out=SCORES)
def test_the_auc_is_the_share_of_pairs_in_order_as_scikit_learn_has_it(members: list[float], held_out: list[float]):
    pairs = [(m > h) + 0.5 * (m == h) for m in members for h in held_out]
    truth = [1] * len(members) + [0] * len(held_out)
    assert auc(members, held_out) == pytest.approx(sum(pairs) / len(pairs))
    assert auc(members, held_out) == pytest.approx(roc_auc_score(truth, members + held_out))


@given(members=SCORES, held_out=SCORES)
def test_an_interval_holds_the_auc_and_turns_round_with_the_sides(members: list[float], held_out: list[float]):
    low, high = interval(members, held_out)
    assert 0 <= low <= auc(members, held_out) <= high <= 1
    turned = interval(held_out, members)
    assert turned == pytest.approx((1 - high, 1 - low))


@given(members=SCORES, held_out=SCORES)
def test_the_curve_is_that_of_scikit_learn_and_holds_what_is_found_at_few_false_alarms(
    members: list[float], held_out: list[float]
):
    ours = curve(members, held_out)
    alarms, found, _ = roc_curve([1] * len(members) + [0] * len(held_out), members + held_out, drop_intermediate=False)
    assert np.allclose(ours, np.stack([alarms, found], axis=1))
    for rate in (0.0, 0.1, 0.5, 1.0):
        best = max(y for x, y in ours if x <= rate + 1e-12)
        assert found_at(members, held_out, rate) == pytest.approx(best)


@pytest.mark.parametrize(("members", "held_out"), [(10, 10), (44, 12), (300, 30)])
@pytest.mark.parametrize("shift", [0.0, 1.0, 3.0])
def test_the_interval_holds_the_true_auc_in_95_of_100_audits(members: int, held_out: int, shift: float):
    random, truth = np.random.default_rng(0), norm.cdf(shift / np.sqrt(2))
    intervals = [interval(random.normal(shift, 1, members), random.normal(0, 1, held_out)) for _ in range(400)]
    covered = np.mean([low <= truth <= high for low, high in intervals])
    assert covered >= 0.93  # two standard deviations below 0.95
    assert np.mean([high - low for low, high in intervals]) < 1.3 * 2 * by_chance(members, held_out)


def test_the_interval_holds_where_a_few_members_give_themselves_away_and_where_scores_are_lumped():
    """Distributions on which Newcombe's assumption, or DeLong's number of rows, does not hold."""
    random = np.random.default_rng(1)

    def given_away() -> tuple[np.ndarray, np.ndarray]:
        return np.where(random.random(60) < 0.1, 9.0, random.random(60)), random.random(60)

    def lumped() -> tuple[np.ndarray, np.ndarray]:
        return random.uniform(0.4, 0.6, 60), np.where(random.random(60) < 0.5, 0.0, 1.0)

    for draw, truth in ((given_away, 0.55), (lumped, 0.5)):
        found = [interval(*draw()) for _ in range(400)]
        assert np.mean([low <= truth <= high for low, high in found]) >= 0.93, draw


def test_rows_that_separate_wholly_still_leave_doubt_and_the_more_rows_the_less():
    lows = [interval([1.0] * n, [0.0] * n)[0] for n in (10, 40, 160)]
    assert lows == sorted(lows)
    assert 0.5 < lows[0] < 0.9 < lows[2] < 1.0


def test_a_rate_of_false_alarms_is_shown_only_where_so_many_rows_can_show_it():
    few, many = membership([1.0, 2.0] * 50, [0.0] * 10), membership([1.0, 2.0] * 50, [0.0] * 100)
    assert set(few.found) == {0.1}
    assert set(many.found) == {0.01, 0.1}


# --- a lower bound on ε


@given(
    canaries=st.integers(1, 60),
    guesses=st.floats(0, 1),
    right=st.floats(0, 1),
    epsilon=st.floats(0, 5),
    delta=st.sampled_from([0.0, 1e-5, 1e-2]),
)
def test_the_p_value_is_that_of_the_paper_s_appendix(
    canaries: int, guesses: float, right: float, epsilon: float, delta: float
):
    made = round(guesses * canaries)
    good = round(right * made)
    q = 1 / (1 + exp(-epsilon))
    most, summed = 0.0, 0.0
    for i in range(1, good + 1):
        summed += binom.pmf(good - i, made, q)
        most = max(most, summed / i)
    expected = min(1.0, binom.sf(good - 1, made, q) + most * delta * 2 * canaries)
    assert p_value(canaries, made, good, epsilon, delta) == pytest.approx(expected, abs=1e-9)


def test_the_bound_is_the_paper_s_own_example():
    assert lower_bound(1000, 100, 75, 1e-4, 0.05) == pytest.approx(0.673, abs=5e-4)


@pytest.mark.parametrize(("canaries", "most"), [(100, 3.5), (1000, 5.8)])
def test_a_ceiling_is_what_a_fair_coin_would_have_to_be_for_all_guesses_to_be_right(canaries: int, most: float):
    chance = 0.05 ** (1 / canaries)
    assert ceiling(canaries, tries=1) == pytest.approx(log(chance / (1 - chance)), abs=2e-4)
    assert round(ceiling(canaries, tries=1), 1) == most
    assert ceiling(canaries, DELTA) < ceiling(canaries) < most


@given(count=st.integers(20, 60), seed=st.integers(0, 999), delta=st.sampled_from([0.0, DELTA]))
def test_no_bound_is_above_its_ceiling_and_a_larger_claim_needs_more_right_guesses(count: int, seed: int, delta: float):
    random = Random(seed)
    coins = [random.random() < 0.5 for _ in range(count)]
    found = bound([coin + random.gauss(0, 0.3) for coin in coins], coins, delta)
    assert 0 <= found.epsilon <= found.ceiling
    assert found.included == sum(coins)
    bounds = [lower_bound(count, count, right, delta, 0.05) for right in range(count + 1)]
    assert bounds == sorted(bounds)


def randomized_response(epsilon: float, count: int, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Scores of a mechanism that is ε-DP in each coin and no better, and the coins."""
    coins = random.random(count) < 0.5
    told = coins ^ (random.random(count) > 1 / (1 + exp(-epsilon)))
    return told + random.random(count) / 10, coins


@pytest.mark.parametrize("epsilon", [0.0, 1.0, 2.0])
def test_the_bound_is_below_the_true_epsilon_in_95_of_100_audits(epsilon: float):
    random = np.random.default_rng(2)
    found = [bound(*randomized_response(epsilon, 200, random), 0.0).epsilon for _ in range(200)]
    assert np.mean([each <= epsilon for each in found]) >= 0.95
    assert np.median(found) >= 0.6 * epsilon  # and it is not idle


def gaussian(noise: float, count: int, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Canaries that do not meet in a sum: one step of DP-SGD without sampling, as the accountant has it."""
    coins = random.random(count) < 0.5
    return coins + noise * random.normal(size=count), coins


def test_the_bound_is_below_what_the_accountant_says_and_above_a_claim_that_no_noise_keeps():
    from nvflare_fm.privacy.accountant import epsilon
    from nvflare_fm.privacy.events import Event

    random = np.random.default_rng(3)
    claimed = epsilon([Event(2.0, 1.0)], DELTA)
    assert all(bound(*gaussian(2.0, 200, random), DELTA).epsilon < claimed for _ in range(40))
    assert all(bound(*gaussian(0.0, 200, random), DELTA).epsilon > claimed for _ in range(5))


def test_where_all_scores_are_alike_nothing_is_shown_whatever_the_coins():
    for included in ([True] * 20 + [False] * 20, [False] * 20 + [True] * 20):
        assert bound([0.0] * 40, included, DELTA).right == 0


def test_few_sure_guesses_show_what_many_unsure_ones_do_not():
    """A tenth of the canaries are remembered, the others are not: the surest quarter shows more than all."""
    random = np.random.default_rng(4)
    coins = random.random(1000) < 0.5
    scores = random.normal(size=1000) + np.where(random.random(1000) < 0.25, np.where(coins, 9, -9), 0)
    found, all_guessed = bound(scores, coins, DELTA), (scores > np.median(scores)) == coins
    assert found.guesses < 1000
    assert found.epsilon > lower_bound(1000, 1000, int(all_guessed.sum()), DELTA, 0.05) + 0.5


# --- secrets and copies


@given(others=st.lists(st.integers(0, 5).map(float), min_size=1, max_size=30), secret=st.integers(0, 5).map(float))
def test_a_rank_is_the_place_in_the_sorted_list_and_exposure_falls_with_it(others: list[float], secret: float):
    found = exposure(secret, others)
    places = [place for place, loss in enumerate(sorted([*others, secret]), 1) if loss == secret]
    assert found.rank == sum(places) / len(places)
    assert 0 <= found.bits <= np.log2(len(others) + 1)
    assert found.bits >= exposure(secret + 1, others).bits


def test_a_secret_that_was_not_learned_has_one_bit_in_the_median_and_1_44_in_the_mean():
    random = np.random.default_rng(5)
    bits = [exposure(random.random(), random.random(999)).bits for _ in range(2000)]
    assert np.median(bits) == pytest.approx(1.0, abs=0.1)
    assert np.mean(bits) == pytest.approx(1.44, abs=0.1)


TOKENS = st.lists(st.integers(0, 3), max_size=10)


@given(written=TOKENS, texts=st.lists(TOKENS, max_size=4))
@example(written=[0, 1], texts=[[0], [1]])
def test_the_longest_run_is_that_of_trying_all(written: list[int], texts: list[list[int]]):
    parts = {tuple(text[i:j]) for text in texts for i in range(len(text)) for j in range(i + 1, len(text) + 1)}
    runs = [j - i for i in range(len(written)) for j in range(i + 1, len(written) + 1) if tuple(written[i:j]) in parts]
    assert longest_run(written, texts) == max(runs, default=0)
