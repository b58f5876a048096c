"""Filters take out what they say and nothing else."""

import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import normalize

from nvflare_fm.synthesis import keep

WORDS = ["card", "my", "lost", "the", "a", "pin", "was", "stolen", "today"]
texts = st.lists(st.lists(st.sampled_from(WORDS), min_size=1, max_size=12).map(" ".join), max_size=6)


@given(texts, texts, st.integers(2, 5), st.sampled_from([0.5, 0.8, 1.0]))
def test_a_near_copy_is_what_an_exhaustive_search_finds(offered, private, run, alike):
    found = keep.near_copies(offered, private, run, alike)
    for place, text in enumerate(offered):
        mine = text.split()
        shares = any(" ".join(mine[i : i + run]) in f" {other} " and f" {' '.join(mine[i : i + run])} " in f" {other} "
                     for other in private for i in range(len(mine) - run + 1))  # fmt: skip
        sets = [(set(mine), set(other.split())) for other in private]
        close = any(len(a & b) >= alike * len(a | b) for a, b in sets)
        assert (place in found) == (shares or close)


@given(texts)
def test_a_private_text_is_a_near_copy_of_itself_however_it_is_written(private):
    shouted = [text.upper().replace(" ", " - ") + "!" for text in private]
    assert set(keep.near_copies(shouted, private)) == set(range(len(private)))


def test_a_text_of_its_own_is_none():
    assert keep.near_copies(["How do I get a new card?"], ["My card was stolen and I need help today"]) == {}


@given(texts)
def test_of_duplicates_the_first_is_kept(offered):
    found = keep.duplicates(offered)
    kept = [text for place, text in enumerate(offered) if place not in found]
    assert len(set(kept)) == len(kept)
    assert set(kept) == set(offered)


@pytest.mark.parametrize(
    "text",
    [
        "write to ann.lee@mail.example.org now",
        "see https://example.org/x",
        "call +1 (555) 123-4567",
        "call 0171-555-1234 now",
        "my account DE89 3704 0044 0532 0130 00 is empty",
        "card 4111 1111 1111 1111 was used",
        "record number 00123456789",
        "from 192.168.0.1",
        "born 3/14/1961",
        "born 1961-03-14",
        "I saw Dr. Miller there",
    ],
)
def test_what_looks_like_personal_data_is_taken_out(text):
    assert set(keep.personal_data(["a harmless text", text])) == {1}


@pytest.mark.parametrize(
    "text",
    [
        "I was charged 2.50 for a top-up",
        "I take 500 mg twice a day, at 8 and 20",
        "the 3rd of 4 payments",
        "10-15 mg/kg",
    ],
)
def test_ordinary_numbers_are_no_personal_data(text):
    assert keep.personal_data([text]) == {}


@pytest.mark.parametrize("piece", ["1", "1 ", "a.", "a@", "AB12 ", "1.1", "1-22-", "www."])
def test_no_text_takes_long(piece):
    began = time.process_time()
    keep.personal_data([(piece * 2000)[:1999] + "x"] * 5)
    assert time.process_time() - began < 1


@given(st.integers(0, 5), st.integers(0, 5), st.integers(0, 99))
def test_the_nearest_distance_is_the_least_of_all(count, others, seed):
    generator = torch.Generator().manual_seed(seed)
    points, theirs = (normalize(torch.randn(n, 3, generator=generator), dim=1) for n in (count, others))
    found = keep.nearest_distance(points, theirs)
    for place in range(count):
        all_of_them = [float(1 - points[place] @ other) for other in theirs]
        assert float(found[place]) == pytest.approx(max(0, min(all_of_them, default=float("inf"))), abs=1e-6)
    assert set(keep.too_near(points, theirs, 0.5)) == {place for place in range(count) if found[place] < 0.5}


def test_a_candidate_that_is_more_like_another_label_is_taken_out():
    anchors = torch.eye(3)
    candidates = torch.stack([anchors[0], anchors[1], normalize(anchors[0] + 0.1 * anchors[1], dim=0), anchors[0]])
    found = keep.label_margin(candidates, ["a", "a", "a", "z"], anchors, ["a", "b", None])
    assert set(found) == {1}
    assert set(keep.label_margin(candidates, ["a", "a", "a", "z"], anchors, ["a", "b", None], 0.95)) == {1, 2}
    assert keep.label_margin(candidates, ["a"] * 4, anchors[:1], ["a"]) == {}
