"""Ciphertexts as an enemy writes them: refused with a code, or such that they can be added to others'.

TenSEAL and SEAL read them in C++. A crash would end the process of this test; the server has another one read them
first (`encryption/reader.py`).
"""

import struct

import numpy
from hypothesis import given
from hypothesis import strategies as st

from nvflare_fm.encryption.ciphertexts import check, encrypted, weighted_sum
from nvflare_fm.errors import WireError
from tests.encryption import kits
from tests.fuzz.mutations import Changes, come, mutated

SERVER, SITE = kits()
COUNT = 9
ROW = encrypted(SITE, numpy.linspace(-1.0, 1.0, COUNT))
HEADS = 120  # bytes: lengths, protobuf's fields, SEAL's header, the start of what it has compressed
places = st.one_of(st.integers(0, HEADS), st.integers(len(ROW) - 20, len(ROW)), st.integers(0, len(ROW)))
changes: st.SearchStrategy[Changes] = st.lists(
    st.tuples(places, st.integers(0, 12), st.one_of(come, st.binary(min_size=1, max_size=9))), min_size=1, max_size=4
)


@given(how=changes, fitting=st.booleans())
def test_whatever_is_not_refused_can_be_added(how: Changes, fitting: bool) -> None:
    row = mutated(ROW, how)
    if fitting:  # a length that fits lets the rest be read
        row = struct.pack("<I", max(0, len(row) - 4)) + row[4:]
    code = refused(row)
    assert code in {"", "no_ciphertext", "other_ciphertext"}
    if not code:
        weighted_sum(SERVER, [ROW, row], [0.7, 0.3], COUNT)


def refused(row: bytes) -> str:
    try:
        check(SERVER, row, COUNT)
    except WireError as error:
        return error.code
    return ""
