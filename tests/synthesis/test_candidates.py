"""A set of candidates is read as it was written; what nobody of ours wrote is refused."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nvflare_fm.errors import ConfigError
from nvflare_fm.synthesis.candidates import (
    LARGEST,
    LONGEST,
    MOST_ROWS,
    Candidate,
    CandidateSet,
    Provenance,
    read,
    write,
)
from tests.codes import refused

characters = st.characters(exclude_categories=("Cc", "Cs")) | st.sampled_from("\n\t")
texts = st.text(characters, min_size=1, max_size=30).filter(str.strip)
candidates = st.builds(
    Candidate,
    text=texts,
    label=st.none() | texts,
    prompt=st.none() | texts,
    votes=st.none() | st.floats(-1e12, 1e12, allow_nan=False),
)
digests = st.text("0123456789abcdef", max_size=64)
provenances = st.builds(
    Provenance,
    generator=st.sampled_from(["", "smollm2-135m-instruct"]),
    fingerprint=digests,
    prompts=digests,
    seed=st.integers(0, 2**63 - 1),
    parent=digests,
    epsilon=st.none() | st.floats(1e-3, 1e3),
)
sets = st.builds(CandidateSet, st.lists(candidates, max_size=5).map(tuple), provenances)
ROW = b'{"text": "where is my card?", "label": "card_arrival"}\n'
HEAD = b'{"candidates": 1, "provenance": {}}\n'


@given(sets)
def test_what_is_read_is_what_was_written(made: CandidateSet):
    again = read(write(made), "set")
    assert again == made
    assert again.digest == made.digest


@given(sets, sets)
def test_different_sets_have_different_digests(one: CandidateSet, other: CandidateSet):
    assert (one == other) == (one.digest == other.digest)


@given(candidates)
def test_a_row_holds_what_a_reader_sees(candidate: Candidate):
    assert candidate.text in candidate.whole
    assert (candidate.prompt or "") in candidate.whole
    assert set(candidate.row.values()) >= {candidate.text}
    assert ("label" in candidate.row) == (candidate.label is not None and candidate.prompt is None)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\n",
        ROW,
        b'{"candidates": 2, "provenance": {}}\n' + ROW,
        b'{"candidates": 1, "provenance": {"seed": true}}\n' + ROW,
        HEAD + b"\xff\n",
        HEAD + b"\n" + ROW,
        HEAD + b"[" * 10_000 + b"\n",
        HEAD + b'{"text": "a\\u0000b"}\n',
        HEAD + b'{"text": "a\\ud800"}\n',
        HEAD + b'{"text": "  "}\n',
        HEAD + b'{"text": 3}\n',
        HEAD + b'{"text": "a", "votes": NaN}\n',
        HEAD + b'{"text": "a", "votes": 1e999}\n',
        HEAD + b'{"text": "a", "code": "b"}\n',
        HEAD + json.dumps({"text": "a" * (LONGEST + 1)}).encode(),
        HEAD + json.dumps({"text": "a", "label": "a" * 257}).encode(),
        HEAD + ROW * (MOST_ROWS + 1),
        HEAD + ROW.strip() + b" " * LARGEST,
    ],
    ids=lambda content: repr(content[:60]),
)
def test_what_nobody_of_ours_wrote_is_refused(content: bytes):
    with refused("candidates_unreadable", ConfigError, "the chosen set"):
        read(content, "the chosen set")


def test_a_refusal_names_the_line_and_repeats_nothing_of_it():
    with refused("candidates_unreadable", ConfigError, "line 3") as caught:
        read(HEAD + ROW + b'{"text": "Mrs Jones", "laable": "x"}\n', "set")
    assert "Jones" not in caught.value.message


def test_a_set_that_nobody_could_read_is_not_made():
    with refused("too_many_candidates", ConfigError, MOST_ROWS):
        CandidateSet((Candidate(text="a"),) * (MOST_ROWS + 1), Provenance())
    with refused("too_many_candidates", ConfigError):
        write(CandidateSet((Candidate(text="a" * LONGEST),) * 9000, Provenance()))
