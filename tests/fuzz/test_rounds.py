"""A `rounds.jsonl` or `spectra.jsonl` may be anything: it is read or refused, and what is told of it is plain lines."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from nvflare_fm.errors import DataError
from nvflare_fm.record.noised import Noised
from nvflare_fm.record.result import Result, explanation
from nvflare_fm.record.round import SPECTRA, Round, in_words, read_line, read_spectra, written

VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
NAMES = st.sampled_from([*Round.model_fields, "spectrum", "loss", "x"])
LINES = st.dictionaries(NAMES, VALUES).map(json.dumps).map(str.encode)
SITES = st.text(max_size=4)
WHY = st.fixed_dictionaries(
    {"kind": st.sampled_from(["refused", "late", "x"]), "text": st.text(max_size=8)}, optional={"code": VALUES}
)
REPORT = st.sampled_from(["weight", "loss", "bytes_up", "before", "quantization", "lowered", "x"])
LIKELY = st.fixed_dictionaries(
    {"round": st.integers(0, 3), "total_rounds": st.integers(1, 3)},
    optional={
        "asked": st.lists(SITES, max_size=3),
        "sites": st.dictionaries(SITES, st.dictionaries(REPORT, VALUES)),
        "out": st.dictionaries(SITES, WHY | st.text(max_size=8).map("refused: {}".format)) | VALUES,
        "noised": st.fixed_dictionaries(dict.fromkeys(Noised.__dataclass_fields__, st.integers(-1, 2) | VALUES)),
        "guarded": st.dictionaries(
            SITES,
            st.fixed_dictionaries(
                {"multiplier": st.floats(-1, 2), "reason": st.text(max_size=8)}, optional={"weight": st.floats(-1, 2)}
            ),
        ),
    },
).map(lambda line: json.dumps(line).encode())


@given(LINES | LIKELY | st.binary(max_size=64))
def test_a_line_is_told_and_explained_or_refused(line: bytes) -> None:
    with suppress(DataError):
        read = read_line(line)
        assert all(text.isprintable() for text in in_words(read))
        assert all(text.isprintable() for text in explanation(Result(Path(), [read], {}, {}, [])))
        assert written(read_line(written(read))) == written(read)


@given(st.dictionaries(st.sampled_from(["round", "layers", "x"]), VALUES).map(json.dumps).map(str.encode) | st.binary())
def test_a_line_of_spectra_is_read_or_refused(tmp_path_factory: Any, line: bytes) -> None:
    file = tmp_path_factory.getbasetemp() / SPECTRA
    file.write_bytes(line + b"\n")
    with suppress(DataError):
        assert all(spectra.round >= 0 for spectra in read_spectra(file))
