"""An adapter's folder with a file mutated: no other adapter comes out of it, and no error but ours."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nvflare_fm import at_rest
from nvflare_fm.aggregation.step import Memory
from nvflare_fm.config import TaskPlan
from nvflare_fm.errors import FmError, ModelError
from nvflare_fm.export import folder as export
from nvflare_fm.flare import wire
from tests.flare.messages import MANIFEST, adapter
from tests.fuzz.mutations import Changes, changes, junk, mutated

Files = dict[str, bytes]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    saved = export.Saved(adapter(1), MANIFEST, 3, TaskPlan(seed=5), "adam", Memory(adapter(2), {}))
    return export.write_adapter(tmp_path_factory.mktemp("fuzz") / "last", saved)


@pytest.fixture(scope="module")
def whole(folder: Path) -> Files:
    return {name: (folder / name).read_bytes() for name in export.FILES}


def outcome(folder: Path) -> str:
    """The code under which the folder is refused, or "read" once the server could go on with what it holds."""
    try:
        saved = export.read_adapter(folder)
    except ModelError as error:
        return error.code
    export.adapter_config(saved.adapter, saved.manifest)
    message = wire.write_saved(saved)
    with suppress(FmError):
        wire.read_saved(message.params, message.meta, "the server")
    return "read"


REFUSED = ("adapter_damaged", "adapter_unreadable")


@given(name=st.sampled_from(export.FILES), how=changes)
def test_mutated_bytes_are_noticed(folder: Path, whole: Files, name: str, how: Changes) -> None:
    content = mutated(whole[name], how)
    try:
        (folder / name).write_bytes(content)
        assert outcome(folder) in (REFUSED if content != whole[name] else ["read"])
    finally:
        (folder / name).write_bytes(whole[name])


@given(name=st.sampled_from((*export.NEEDED, export.STEP)), how=changes)
def test_without_sums_mutated_bytes_are_an_adapter_or_refused(
    folder: Path, whole: Files, name: str, how: Changes
) -> None:
    try:
        (folder / at_rest.SUMS).unlink()
        (folder / name).write_bytes(mutated(whole[name], how))
        assert outcome(folder) in ("read", *REFUSED)
    finally:
        for file in (name, at_rest.SUMS):
            (folder / file).write_bytes(whole[file])


@given(data=st.data(), name=st.sampled_from([export.CONFIG, export.PROVENANCE]))
def test_without_sums_strange_values_are_an_adapter_or_refused(
    folder: Path, whole: Files, data: st.DataObject, name: str
) -> None:
    said: dict[str, Any] = json.loads(whole[name])
    keys = st.sampled_from(["alpha_pattern", "use_rslora", "more", *said])
    for key in data.draw(st.lists(keys, min_size=1, max_size=3)):
        said[key] = data.draw(junk)
    for key in data.draw(st.lists(keys, max_size=1)):
        said.pop(key, None)
    try:
        (folder / at_rest.SUMS).unlink()
        (folder / name).write_text(json.dumps(said))
        assert outcome(folder) in ("read", *REFUSED)
    finally:
        for file in (name, at_rest.SUMS):
            (folder / file).write_bytes(whole[file])
