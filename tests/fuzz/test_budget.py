"""Fuzz target "budget": whatever lies in the place of a site's account, it is read as it was written, or refused."""

import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nvflare_fm.errors import PolicyError
from nvflare_fm.privacy.budget import HEAD, NAME, Budget, read, sealed
from tests.budget_kills import entry
from tests.fuzz.mutations import Changes, changes, junk, mutated

LINES = [sealed(entry(0), "0" * 64)]
for number in (1, 2):
    LINES.append(sealed(entry(number), read(b"".join(LINES)).seal))
WHOLE = b"".join(LINES)
FIELDS = st.fixed_dictionaries({}, optional=dict.fromkeys([*entry().__dict__, "x"], junk))
SHAPED = st.fixed_dictionaries({}, optional={"entry": FIELDS | junk, "seal": junk, "x": junk})


def understood(content: bytes) -> None:
    """It is exactly what a budget writes, or it is refused with its code and without what it holds."""
    try:
        book = read(content)
    except PolicyError as reason:
        error = reason
    else:
        error = None
    if error:
        assert error.code == "budget_damaged"
        assert len(error.message) < 300
        return
    again, seal = b"", "0" * 64
    for each, own in zip(book.entries, book.seals, strict=True):
        again, seal = again + sealed(each, seal), own
    assert content[: book.length] == again
    assert book.torn == (len(content) > book.length)


@given(how=changes)
def test_a_changed_account_is_refused_or_the_same(how: Changes) -> None:
    understood(mutated(WHOLE, how))
    with suppress(PolicyError):
        assert {*read(mutated(WHOLE, how)).entries} <= {*read(WHOLE).entries}


@given(content=st.binary(max_size=100) | st.lists(SHAPED | junk, max_size=3).map(lambda said: _as_lines(said)))
def test_any_bytes_are_refused_or_understood(content: bytes) -> None:
    understood(content)


def _as_lines(said: list[Any]) -> bytes:
    return b"".join(json.dumps(each).encode() + b"\n" for each in said)


@pytest.fixture(scope="module")
def budget(tmp_path_factory: pytest.TempPathFactory) -> Budget:
    return Budget(tmp_path_factory.mktemp("site") / NAME)


@given(account=changes | st.just([]), note=junk.map(lambda said: json.dumps(said).encode()) | st.binary(max_size=40))
def test_with_any_note_beside_it_an_account_is_whole_or_refused(budget: Budget, account: Changes, note: bytes) -> None:
    budget.file.write_bytes(mutated(WHOLE, account))
    budget.file.with_name(HEAD).write_bytes(note)
    with suppress(PolicyError):
        assert len(budget.verify().entries) <= 3
