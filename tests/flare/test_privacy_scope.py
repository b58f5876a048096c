"""A site's `privacy.json`: no job goes around our filter, and what the site has of its own stays."""

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nvflare.apis.fl_constant import FilterKey
from nvflare.apis.workspace import Workspace
from nvflare.private.fed.app.fl_conf import create_privacy_manager

from nvflare_fm.errors import ConfigError
from nvflare_fm.flare.egress import EgressFilter, EgressGuard
from nvflare_fm.flare.kit.privacy_scope import (
    FILE,
    FILTER,
    GUARD,
    fault,
    faults,
    install,
    remove,
    with_ours,
    without_ours,
)
from tests.codes import refused

THEIRS = {"path": "nvflare.app_common.filters.exclude_vars.ExcludeVars", "args": {"exclude_vars": ["a"]}}
OWN: dict[str, Any] = {
    "scopes": [
        {"name": "open", "properties": {"a": 1}, "task_result_filters": [THEIRS], "task_data_filters": [THEIRS]},
        {"name": "bare"},
    ],
    "default_scope": "bare",
    "components": [{"id": "own", "path": "nvflare.widgets.widget.Widget", "args": {}}],
}


@pytest.fixture
def kit(tmp_path: Path) -> Path:
    for folder in ("startup", "local"):
        (tmp_path / folder).mkdir()
    return tmp_path


def manager(kit: Path) -> Any:
    """What NVFlare makes of the file in a site's process of a job."""
    return create_privacy_manager(Workspace(str(kit), "clinic"), names_only=False)


def test_nvflare_puts_our_filter_last_in_the_scope_of_every_job(kit: Path):
    install(kit / "local")
    found = manager(kit)
    assert found.default_scope.name == "nvflare_fm"
    assert found.get_scope("") is found.get_scope("nvflare_fm") is found.default_scope
    assert found.get_scope("unknown") is None  # and AppDeployer refuses a job that names it
    assert [type(f) for f in found.default_scope.task_result_filters[FilterKey.OUT]] == [EgressFilter]
    assert [type(c) for c in found.components.values()] == [EgressGuard]
    assert not faults(kit / "local")
    assert remove(kit / "local") == kit / "local" / FILE
    assert not (kit / "local" / FILE).exists()
    assert remove(kit / "local") is None


def test_a_sites_own_scopes_stay_and_each_ends_with_our_filter(kit: Path):
    (kit / "local" / FILE).write_text(json.dumps(OWN))
    assert len(faults(kit / "local")) == 1
    install(kit / "local")
    again = (kit / "local" / FILE).read_text()
    install(kit / "local")
    assert (kit / "local" / FILE).read_text() == again
    found = manager(kit)
    assert found.default_scope.name == "bare"
    for name, before in (("open", ["ExcludeVars"]), ("bare", [])):
        filters = found.get_scope(name).task_result_filters[FilterKey.OUT]
        assert [type(each).__name__ for each in filters] == [*before, "EgressFilter"]
    assert not faults(kit / "local")
    remove(kit / "local")
    left = json.loads((kit / "local" / FILE).read_text())
    assert without_ours(left) == left
    assert (left["default_scope"], left["components"], left["scopes"][0]) == (
        "bare",
        OWN["components"],
        OWN["scopes"][0],
    )


def test_scopes_without_a_default_one_are_refused_with_what_to_do(kit: Path):
    for wrong in ({}, {"default_scope": "gone"}):
        (kit / "local" / FILE).write_text(json.dumps({"scopes": OWN["scopes"]} | wrong))
        with refused("no_default_scope", ConfigError, "set default_scope"):
            install(kit / "local")
        assert faults(kit / "local")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda said: said.pop("default_scope"),
        lambda said: said.pop("components"),
        lambda said: said.update(scopes=[]),
        lambda said: said["scopes"][0].update(task_result_filters=[]),
        lambda said: said["scopes"][0]["task_result_filters"].append(THEIRS),
        lambda said: said["scopes"][0]["task_result_filters"][0].update(direction="in"),
        lambda said: said["scopes"].append({"name": "other"}),
        lambda said: said["scopes"][0].update(name="other"),
    ],
)
def test_whatever_opens_a_way_around_the_filter_is_found(kit: Path, spoil: Callable[[Any], object]):
    install(kit / "local")
    said = json.loads((kit / "local" / FILE).read_text())
    spoil(said)
    (kit / "local" / FILE).write_text(json.dumps(said))
    assert faults(kit / "local")
    with suppress(ConfigError):  # and mended, where it is known how
        install(kit / "local")
        assert not faults(kit / "local")


JUNK = st.recursive(
    st.sampled_from([None, 0, "bare", "nvflare_fm", FILTER, GUARD, True]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["scopes", "name", "path", "args", "components", "default_scope", "task_result_filters"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=10,
)


@given(said=st.dictionaries(st.sampled_from([*OWN]), JUNK) | JUNK, scope=st.sampled_from(["", "bare", "x"]))
def test_any_file_is_completed_or_refused_and_never_thought_safe_without_the_filter(
    tmp_path_factory: pytest.TempPathFactory, said: Any, scope: str
):
    local = tmp_path_factory.getbasetemp()
    (local / FILE).write_text(json.dumps(said))
    if not fault(local, scope):
        (chosen,) = [each for each in said["scopes"] if each["name"] == (scope or said["default_scope"])]
        assert chosen["task_result_filters"][-1]["path"] == FILTER
    with suppress(ConfigError):
        install(local)
        assert not faults(local)
        assert with_ours(json.loads((local / FILE).read_text())) == json.loads((local / FILE).read_text())
    (local / FILE).unlink()
