"""Fuzz target "canary record": whatever lies beside the training rows, it is read or refused with a code, and soon."""

import json
import time
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nvflare_fm.errors import ConfigError
from nvflare_fm.site.audit.canaries import RECORD, TRAIN, made_up, record_of
from tests.site import tiny

GOOD = {
    "version": 1,
    "task": "causal_lm",
    "seed": 2**63,
    "canaries": [canary.model_dump() for canary in made_up(tiny.plan(), 20, Random(0))],
}
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just("\ud800"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@st.composite
def changed(draw: st.DrawFn) -> dict[str, Any]:
    """A record in which a value, of the whole or of a canary, is anything."""
    record = json.loads(json.dumps(GOOD))
    group = draw(st.sampled_from([record, record["canaries"][3], record["canaries"][3]["row"]]))
    group[draw(st.sampled_from([*group, "x"]))] = draw(VALUES)
    return record  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("planted")


def read_or_refused(folder: Path, content: bytes) -> None:
    (folder / RECORD).write_bytes(content)
    (folder / RECORD).chmod(0o600)
    began = time.process_time()
    try:
        assert record_of(str(folder / TRAIN))
    except ConfigError as reason:
        assert reason.code == "canary_record"
        assert str(folder) not in reason.message
    assert time.process_time() - began < 5


@given(record=changed())
def test_a_record_with_any_value_is_read_or_refused(folder: Path, record: dict[str, Any]):
    read_or_refused(folder, json.dumps(record).encode())


@given(content=st.binary(max_size=200), place=st.integers(0, 3000), whole=st.booleans())
def test_bytes_of_any_kind_are_read_or_refused(folder: Path, content: bytes, place: int, whole: bool):
    good = json.dumps(GOOD).encode()
    read_or_refused(folder, content if whole else good[:place] + content + good[place:])
