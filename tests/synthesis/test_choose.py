"""The chosen: most votes first, so many of a label, and what got noise alone is chosen no more often than is said."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from nvflare_fm.synthesis.choose import choose, threshold

counts = st.lists(st.tuples(st.floats(-9, 9) | st.sampled_from([1.0, float("nan"), float("inf")]),
                            st.sampled_from(["a", "b", None])), max_size=12)  # fmt: skip


@given(counts, st.integers(0, 3), st.floats(-1, 5))
def test_the_chosen_have_the_most_votes_of_their_label(rows, per_label, floor):
    votes, labels = [vote for vote, _ in rows], [label for _, label in rows]
    chosen = choose(votes, labels, per_label, floor)
    assert len(set(chosen)) == len(chosen)
    assert all(floor < votes[place] < float("inf") for place in chosen)
    assert [votes[place] for place in chosen] == sorted((votes[place] for place in chosen), reverse=True)
    for label in {*labels}:
        fit = [p for p, vote in enumerate(votes) if labels[p] == label and floor < vote < float("inf")]
        mine = [place for place in chosen if labels[place] == label]
        assert len(mine) == min(per_label, len(fit))
        assert all(votes[left] <= votes[place] for place in mine for left in set(fit) - set(mine))


def test_a_candidate_that_got_only_noise_passes_with_the_stated_chance():
    """200,000 candidates that nobody voted for: the chance's deviation is 0.05 %, so 0.25 % are five of those."""
    generator, sigma, chance = torch.Generator().manual_seed(0), 7.0, 0.05
    noise = sigma * torch.randn(200_000, generator=generator)
    passed = choose(noise.tolist(), [None] * len(noise), len(noise), threshold(sigma, chance))
    assert abs(len(passed) / len(noise) - chance) < 0.0025


@given(st.floats(0, 100), st.floats(1e-6, 1 - 1e-6))
def test_a_threshold_is_never_below_no_votes(sigma, chance):
    assert threshold(sigma, chance) >= 0
    assert choose([0.0], ["a"], 1, threshold(sigma, chance)) == []
