"""Of three sites or more, none decides alone; of honest ones the tally is the sum."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from nvflare_fm.config import PrivacySettings
from nvflare_fm.privacy import gaussian
from nvflare_fm.privacy.accountant import noise_multiplier
from nvflare_fm.synthesis.tally import FACTOR, noise, tally

SITES = st.integers(3, 6)
NUMBERS = st.floats(-50, 50, width=32)
VOTES = st.integers(1, 5).flatmap(
    lambda size: st.lists(st.lists(NUMBERS, min_size=size, max_size=size), min_size=3, max_size=6)
)


@given(votes=VOTES, loud=st.floats(1, 1e9))
def test_one_site_moves_the_tally_by_no_more_than_four_times_the_median(votes: list[list[float]], loud: float):
    given = {f"site-{i}": torch.tensor(each) for i, each in enumerate(votes)}
    others = sorted(float(each.double().norm()) for each in list(given.values())[1:])
    given["site-0"] = given["site-0"] * loud
    rest = tally({site: each for site, each in given.items() if site != "site-0"})
    moved = float((tally(given) - rest).norm())
    assert moved <= 2 * FACTOR * others[-1] * len(votes) + 1e-6


@given(votes=VOTES)
def test_the_tally_of_sites_of_like_size_is_their_sum_in_any_order(votes: list[list[float]]):
    given = {f"site-{i}": torch.tensor([*each, 100.0]) for i, each in enumerate(votes)}
    total = sum(each.double() for each in given.values())
    assert torch.allclose(tally(given), torch.as_tensor(total))
    assert torch.equal(tally(dict(reversed(given.items()))), tally(given))


def test_a_site_that_shouts_is_scaled_down():
    quiet = {site: torch.tensor([1.0, 0.0]) for site in "abc"}
    assert tally({**quiet, "d": torch.tensor([0.0, 1e9])}).tolist() == [3.0, FACTOR]


def test_the_noise_is_that_of_a_site_from_below():
    for epsilon in (0.5, 1.0, 4.0):
        ours, theirs = noise(PrivacySettings(epsilon=epsilon)), noise_multiplier(epsilon, 1e-5, 1.0, 1)
        assert ours <= theirs <= 1.05 * ours
        assert gaussian.epsilon(theirs, 1, 1e-5) <= epsilon
    assert noise(PrivacySettings(noise_multiplier=2.0)) == 2.0
