"""Fuzz target "candidates": whatever a file of candidates holds, it is read or refused with a code, and soon."""

import json
import time
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from nvflare_fm.errors import ConfigError
from nvflare_fm.synthesis.candidates import Candidate, CandidateSet, Provenance, read, write
from tests.fuzz.mutations import Changes, changes, junk, mutated

ROWS = (
    Candidate(text="where is my card?", label="card_arrival", votes=2.5),
    Candidate(text="Rest, and drink.", prompt="What helps against a cold?"),
)
GOOD = write(CandidateSet(ROWS, Provenance(generator="smollm2", seed=7, epsilon=1.0, parent="ab" * 32)))


def read_or_refused(content: bytes) -> None:
    began, found, refusal = time.process_time(), None, None
    try:
        found = read(content, "set")
    except ConfigError as error:
        refusal = error
    assert refusal is None or (refusal.code == "candidates_unreadable" and len(refusal.message) < 5000)
    if found is not None:
        assert read(write(found), "set") == found
    assert time.process_time() - began < 5


def test_a_good_file_is_read():
    assert read(GOOD, "set").rows == ROWS


@given(how=changes)
def test_a_file_with_mistakes_is_read_or_refused(how: Changes):
    read_or_refused(mutated(GOOD, how))


@given(data=st.data(), value=junk)
def test_a_file_with_any_value_in_a_place_is_read_or_refused(data: st.DataObject, value: Any):
    lines = [json.loads(line) for line in GOOD.splitlines()]
    group = data.draw(st.sampled_from([*lines, lines[0]["provenance"]]))
    group[data.draw(st.sampled_from([*group, "x"]))] = value
    read_or_refused("\n".join(map(json.dumps, lines)).encode())
