"""Measures say what they should where the answer is known: of copies, of nothing, and of rows of the same source."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import normalize

from nvflare_fm.synthesis.measure import copying, coverage, distinct_2, membership_auc


def points(count: int, seed: int, width: int = 4) -> torch.Tensor:
    return normalize(torch.randn(count, width, generator=torch.Generator().manual_seed(seed)), dim=1)


@pytest.mark.parametrize(
    ("texts", "share"),
    [([], 0.0), (["one"], 0.0), (["a b c"], 1.0), (["a b", "A, b!"], 0.5), (["a b a b"], 2 / 3), (["a b", "b a"], 1.0)],
)
def test_distinct_2_is_the_share_of_different_pairs(texts, share):
    assert distinct_2(texts) == pytest.approx(share)


@given(st.integers(7, 20), st.integers(0, 99))
def test_coverage_is_whole_with_the_rows_themselves_and_grows_with_rows(count, seed):
    real, made = points(count, seed), points(5, seed + 1)
    assert coverage(real, real) == 1
    assert coverage(real, made[:0]) == 0
    shares = [coverage(real, made[:n]) for n in range(6)]
    assert shares == sorted(shares)


@given(st.integers(0, 99))
def test_copies_are_nearer_than_held_out_rows_and_rows_of_the_source_are_as_near(seed):
    private, held_out, fresh = points(200, seed), points(200, seed + 1), points(400, seed + 2)
    copies = copying(private[:50], private, held_out)
    assert copies.made < 1e-6
    assert copies.nearest > 0.9
    assert copying(fresh, private, held_out).nearest < 0.15


@given(st.integers(0, 99))
def test_made_rows_give_away_members_where_they_are_copies_and_not_where_they_are_not(seed):
    members, others = points(100, seed), points(100, seed + 1)
    assert membership_auc(members, members, others) > 0.99
    assert abs(membership_auc(points(50, seed + 2), members, others) - 0.5) < 0.2
