"""Votes: whoever adds or removes one unit moves them by at most 1, and the noise is as large as it is said to be."""

from dataclasses import dataclass

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from nvflare_fm.synthesis.vote import noised, votes

LABELS = ["a", "b", None]


def points(count: int, width: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(count, width, generator=generator).round(), dim=1)  # rounded: ties, and zero vectors


@dataclass(frozen=True)
class Poll:
    rows: Tensor
    row_labels: list[str | None]
    units: list[int]
    candidates: Tensor
    candidate_labels: list[str | None]
    nearest: int

    def count(self, without: int | None = None) -> Tensor:
        kept = [place for place, unit in enumerate(self.units) if unit != without]
        return votes(
            self.rows[kept],
            [self.row_labels[place] for place in kept],
            [self.units[place] for place in kept],
            self.candidates,
            self.candidate_labels,
            self.nearest,
        )


@st.composite
def polls(draw: st.DrawFn) -> Poll:
    rows, width, seed = draw(st.integers(0, 8)), draw(st.integers(1, 3)), draw(st.integers(0, 2**31))
    count = draw(st.integers(0, 6))
    labels = st.sampled_from(LABELS)
    return Poll(
        points(rows, width, seed),
        draw(st.lists(labels, min_size=rows, max_size=rows)),
        draw(st.lists(st.integers(0, 3), min_size=rows, max_size=rows)),
        points(count, width, seed + 1),
        draw(st.lists(labels, min_size=count, max_size=count)),
        draw(st.integers(1, 4)),
    )


@given(polls())
def test_a_unit_moves_the_votes_by_at_most_1_however_many_rows_it_has(poll: Poll):
    whole = poll.count()
    for unit in {*poll.units, 99}:
        assert float((whole - poll.count(without=unit)).norm()) <= 1 + 1e-9


@given(polls())
def test_a_unit_that_can_vote_has_one_whole_vote(poll: Poll):
    able = {u for u, label in zip(poll.units, poll.row_labels, strict=True) if label in poll.candidate_labels}
    if poll.nearest == 1:
        assert abs(float(poll.count().sum()) - len(able)) < 1e-9
    assert (poll.count() >= 0).all()


@given(polls())
def test_a_row_votes_for_its_own_label_alone(poll: Poll):
    for place, label in enumerate(poll.candidate_labels):
        if label not in poll.row_labels:
            assert poll.count()[place] == 0


@given(polls())
def test_the_votes_do_not_depend_on_the_order_of_the_rows(poll: Poll):
    turned = Poll(
        poll.rows.flip(0), poll.row_labels[::-1], poll.units[::-1], poll.candidates, poll.candidate_labels, poll.nearest
    )
    assert torch.allclose(poll.count(), turned.count())


def test_a_row_votes_for_the_nearest():
    candidates = points(40, 8, 1)
    rows = normalize(candidates[[7, 3, 7]] + 0.01, dim=1)
    found = votes(rows, ["x"] * 3, [0, 1, 2], candidates, ["x"] * 40)
    assert found.nonzero()[:, 0].tolist() == [3, 7]
    assert found[[3, 7]].tolist() == [1, 2]


def test_rows_of_one_patient_share_a_vote():
    candidates = torch.eye(3)
    found = votes(candidates[[0, 0, 1]], ["x"] * 3, ["ann", "ann", "ann"], candidates, ["x"] * 3)
    assert torch.allclose(found, torch.tensor([2 / 3, 1 / 3, 0.0], dtype=torch.float64))


def test_the_noise_is_normal_with_the_deviation_that_was_asked():
    """By the χ² of 100,000 numbers: its relative error is 0.45 %, so 3 % are six of those; and by the tails."""
    sigma, count = 3.0, 100_000
    noise = noised(torch.full((count,), 5.0), sigma) - 5
    assert noise.dtype == torch.float32
    assert abs(float(noise.double().square().mean()) / sigma**2 - 1) < 0.03
    assert abs(float(noise.mean())) < 6 * sigma / count**0.5
    beyond = float((noise.abs() > 2 * sigma).float().mean())
    assert abs(beyond - 0.0455) < 0.004


def test_noise_is_drawn_anew_each_time():
    assert not torch.equal(noised(torch.zeros(8), 1.0), noised(torch.zeros(8), 1.0))
