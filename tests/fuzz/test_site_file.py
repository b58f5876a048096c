"""Fuzz target "site file": whatever lies in its place, it is read or refused with a code, and soon."""

import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from nvflare_fm.errors import ConfigError
from nvflare_fm.site.offer.site_config import FILE_NAME, SiteConfig, load_site
from nvflare_fm.site.offer.site_file import render

CODES = {"double_key", "site_file_malformed", "site_file_wrong"}
GOOD = render(
    {
        "models": {"base": {"path": "/srv/m", "fingerprint": "ab"}},
        "data": {"notes": {"folder": "/srv/n", "train": "train.jsonl", "columns": {"text": "Brief"}}},
        "limits": {"max_rank": 8, "quantizations": ["nf4"]},
        "privacy": {"min_examples": 50},
        "welcome": {"orgs": ["company"]},
    }
)
LINES = GOOD.splitlines(keepends=True)
SPICE = st.sampled_from(
    [
        *"[]{}:,-?&*!|>'\"%@`#~ \n\t\0",
        *("<<: ", "&a ", "*a", "!!set ", "---\n", "...\n", "? ", "9" * 5000, "1:2:3", ".nan", "0x", "0b", "1e999"),
        *("2001-99-99", "null", "yes", "\ufeff", "\u2028", "\ud7ff", "\\x", "[" * 300, "{a: " * 300),
    ]
)
KEYS = [*SiteConfig.model_fields, "base", "path", "train", "max_rank", "memory_gib", "submitters", "min_examples", "x"]
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.dates() | st.binary(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=12,
)


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """The file of a site, with lines doubled, dropped, moved and spiced."""
    lines = list(LINES)
    for _ in range(draw(st.integers(1, 6))):
        place = draw(st.integers(0, len(lines) - 1))
        match draw(st.sampled_from(["double", "drop", "uncomment", "indent", "spice", "spice"])):
            case "double":
                lines.insert(draw(st.integers(0, len(lines))), lines[place])
            case "drop" if len(lines) > 1:
                del lines[place]
            case "uncomment":
                lines[place] = lines[place].replace("# ", "", 1)
            case "indent":
                lines[place] = " " * draw(st.integers(1, 5)) + lines[place]
            case _:
                column = draw(st.integers(0, len(lines[place])))
                lines[place] = lines[place][:column] + draw(SPICE) + lines[place][column:]
    return "".join(lines).encode("utf-8", "surrogatepass")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("site") / FILE_NAME


def read_or_refused(file: Path, content: bytes) -> SiteConfig | None:
    file.write_bytes(content)
    began, found, error = time.process_time(), None, None
    try:
        found = load_site(file)
    except ConfigError as reason:
        error = reason
    assert time.process_time() - began < 5
    assert error is None or (error.code in CODES and str(file.parent) not in error.message)
    return found


@given(content=mutated())
def test_a_site_file_with_mistakes_is_read_or_refused(file: Path, content: bytes):
    read_or_refused(file, content)


@given(content=st.binary(max_size=200) | st.text(max_size=200).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_bytes_of_any_kind_are_read_or_refused(file: Path, content: bytes):
    read_or_refused(file, content)


@given(values=st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=4) | VALUES)
def test_any_values_under_the_names_of_settings_are_read_or_refused(file: Path, values: Any):
    found = read_or_refused(file, yaml.safe_dump(values, allow_unicode=True).encode("utf-8", "surrogatepass"))
    if found is not None:
        assert load_site(file) == found
