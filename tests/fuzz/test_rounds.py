"""A `rounds.jsonl` may be anything: it is read or refused, and what is told of it is plain lines."""

import json
from contextlib import suppress
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from nvflare_fm.errors import DataError
from nvflare_fm.rounds import read_line, told

VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
NAMES = st.sampled_from(["round", "total_rounds", "asked", "out", "late", "sites", "metrics", "seconds", "loss", "x"])
LINES = st.dictionaries(NAMES, VALUES).map(json.dumps).map(str.encode)
LIKELY = st.fixed_dictionaries(
    {"round": st.integers(0, 3), "total_rounds": st.integers(1, 3)},
    optional={"sites": st.dictionaries(st.text(max_size=4), st.dictionaries(NAMES, VALUES)), "out": VALUES},
).map(lambda line: json.dumps(line).encode())


@given(LINES | LIKELY | st.binary(max_size=64))
def test_a_line_is_told_or_refused(line: bytes) -> None:
    with suppress(DataError):
        assert all(text.isprintable() for text in told(read_line(line)))
