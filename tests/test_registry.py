"""The folder is the list."""

import sys

import pytest

from nvflare_fm.aggregation import merge, weigh
from nvflare_fm.errors import ConfigError
from nvflare_fm.registry import Registry, nearest
from tests.codes import refused


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A package with one module per entry, importable for one test."""
    package = tmp_path / "menu_of_this_test"
    package.mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    (package / "__init__.py").write_text(
        f"from nvflare_fm.registry import Registry\nregistry = Registry('dish', {package.name!r})\n"
    )

    def add(module: str, entry: str) -> None:
        text = f"from . import registry\nregistry.register({entry!r})({module.upper()!r})\n"
        (package / f"{module}.py").write_text(text)

    add("soup", "soup")
    yield package.name, add
    for name in [n for n in sys.modules if n.split(".")[0] == package.name]:
        del sys.modules[name]


def filled(name: str) -> Registry[str]:
    return __import__(name).registry


def test_a_new_file_is_a_new_entry_and_no_other_file_changes(folder):
    name, add = folder
    add("bread", "rye")
    assert list(filled(name)) == ["rye", "soup"]
    assert filled(name)["rye"] == "BREAD"


def test_nothing_is_imported_before_somebody_asks(folder):
    name, _ = folder
    registry = filled(name)
    assert f"{name}.soup" not in sys.modules
    assert registry["soup"] == "SOUP"
    assert f"{name}.soup" in sys.modules


def test_an_unknown_name_is_refused_with_the_kind_the_nearest_and_all_known(folder):
    name, _ = folder
    with refused("unknown_name", ConfigError) as told:
        filled(name)["soap"]
    assert all(said in told.value.message for said in ("dish", '"soup"', "['soup']"))
    assert "soap" in str(told.value)
    assert "soap" not in told.value.message


def test_two_entries_of_one_name_are_refused(folder):
    name, add = folder
    add("broth", "soup")
    with refused("name_taken", ConfigError) as told:
        list(filled(name))
    assert "'soup'" in told.value.message


def test_nothing_near_gives_no_hint():
    assert nearest("zebra", ["examples", "uniform"]) == ""
    assert nearest("exampels", ["examples", "uniform"]) == 'did you mean "examples"? '


def test_the_package_offers_the_rules_its_documents_name():
    assert {"exact", "factor_mean", "svd", "zero_pad"} <= set(merge.registry)
    assert {"examples", "uniform"} <= set(weigh.registry)


@pytest.mark.parametrize("name", list(merge.registry))
def test_every_merge_rule_says_in_its_docstring_what_it_computes_and_its_module_whom_it_follows(name):
    function = merge.registry[name].merge
    assert function.__doc__
    assert sys.modules[function.__module__].__doc__
