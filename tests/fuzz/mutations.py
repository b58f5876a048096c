"""Files as a broken disk, a broken program or an enemy leaves them."""

from typing import Any

from hypothesis import strategies as st

Changes = list[tuple[int, int, bytes]]
TOKENS = [
    *(b"\x00", b"\xff", b"\n", b"\r", b'"', b"{", b"}", b"[", b"]", b",", b":", b"null", b"NaN", b"-1", b"1e999"),
    *(b"\\ud800", b"[" * 200, b"9" * 30, b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"\x00\x00\x00\x80", b"PAR1"),
]
come = st.one_of(st.sampled_from(TOKENS), st.binary(max_size=8))
changes = st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 40), come), min_size=1, max_size=4)
junk: st.SearchStrategy[Any] = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(2**70), 2**70),
        st.floats(),
        st.text(max_size=12),
        st.sampled_from(["calm", "ill", "\ud800", "\x00", "user", "assistant", " "]),
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


def mutated(content: bytes, how: Changes) -> bytes:
    """`content` with pieces of it replaced: each change is where, how many bytes go, and what comes."""
    for place, gone, new in how:
        start = place % (len(content) + 1)
        content = content[:start] + new + content[start + gone :]
    return content
