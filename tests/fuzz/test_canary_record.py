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
from nvflare_fm.site.audit.canaries import RECORD, TRAIN, Record, made_up, record_of
from tests.fuzz.mutations import Changes, changes, junk, mutated
from tests.site import tiny

GOOD = Record(task="causal_lm", seed=2**63, canaries=made_up(tiny.plan(), 20, Random(0))).model_dump_json().encode()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("planted")


def read_or_refused(folder: Path, content: bytes) -> Record | None:
    file, found, error = folder / RECORD, None, None
    file.write_bytes(content)
    file.chmod(0o600)
    began = time.process_time()
    try:
        found = record_of(str(folder / TRAIN))
    except ConfigError as reason:
        error = reason
    assert time.process_time() - began < 5
    assert error is None or (error.code == "canary_record" and str(folder) not in error.message)
    return found


def test_a_good_record_is_read(folder: Path):
    assert read_or_refused(folder, GOOD)


@given(how=changes)
def test_a_record_with_mistakes_is_read_or_refused(folder: Path, how: Changes):
    read_or_refused(folder, mutated(GOOD, how))


@given(data=st.data(), value=junk)
def test_a_record_with_any_value_in_a_place_is_read_or_refused(folder: Path, data: st.DataObject, value: Any):
    record = json.loads(GOOD)
    group = data.draw(st.sampled_from([record, record["canaries"][3], record["canaries"][3]["row"]]))
    group[data.draw(st.sampled_from([*group, "x"]))] = value
    read_or_refused(folder, json.dumps(record).encode())
