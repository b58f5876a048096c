"""Every name of NVFlare that is used and not public, in one table: a new NVFlare that has it no longer is seen here."""

import ast
import importlib
import inspect
import pkgutil
import re
import sys
import textwrap
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

PACKAGE = Path(__file__).parents[2] / "nvflare_fm"
SHELL = sorted((PACKAGE / "flare").rglob("*.py"))
OURS = re.compile(r"_[a-z]\w*")

BACKEND = "nvflare.app_common.executors.client_api.external_process_backend.ExternalProcessBackend"
CELL = "nvflare.app_common.executors.client_api.cell_backend.CellBackendBase"
MODELS = "nvflare.app_common.workflows.base_model_controller.BaseModelController"

# Owner and name; the parameters of what is a method, besides self; None for an attribute.
PRIVATE: dict[tuple[str, str], str | None] = {
    (MODELS, "_accept_train_result"): "client_name result fl_ctx is_unknown_task",
    (MODELS, "_prepare_task"): "data task_name timeout callback",
    ("nvflare.app_common.executors.client_api_executor.ClientAPIExecutor", "_command"): None,
    ("nvflare.app_common.executors.client_api_executor.ClientAPIExecutor", "_create_external_process_backend"): "",
    (BACKEND, "_abort"): None,
    (BACKEND, "_abort_reason"): None,
    (BACKEND, "_active_launch"): None,
    (BACKEND, "_execute_admitted_task"): "task_name shareable fl_ctx abort_signal",
    (BACKEND, "_launch_trainer"): "timeout abort_signal",
    (BACKEND, "_stop_trainer"): "trainer natural_exit_wait termination_grace",
    (BACKEND, "_terminal_intent"): None,
    (BACKEND, "_trainer_liveness_error"): "trainer",
    (CELL, "_context"): None,  # ours, and NVFlare sets it to the same
    (CELL, "_send_abort"): "session reason",
    ("nvflare.client.cell.api.CellClientAPI", "_abort_signal"): None,
    ("nvflare.fuel.utils.config_factory.ConfigFactory", "_fmt2Loader"): None,
    ("nvflare.recipe.spec.Recipe", "_job"): None,
    ("nvflare.recipe.spec.Recipe", "_prepare_client_apps"): "",
}
# No underscore, and still nobody promises them: what a look into a running part of NVFlare finds.
INSIDE = {
    ("nvflare.private.aux_runner.AuxRunner", "topic_table"),
    ("nvflare.private.fed.client.client_run_manager.ClientRunManager", "aux_runner"),
}
# Modules and names under `nvflare.private`, and modules that are started or looked for by name.
BELOW_PRIVATE = {
    "nvflare.private.fed.app.server.runner_process",
    "nvflare.private.fed.app.simulator.simulator",
    "nvflare.private.fed.simulator.simulator_const.SimulatorConstants",
    "nvflare.private.fed.utils.app_deployer.AppDeployer",
}


def found(dotted: str) -> Any:
    """A module, or what it holds."""
    return pkgutil.resolve_name(dotted)


@cache
def has(owner: type) -> dict[str, str | None]:
    """What a class itself has: methods with their parameters, and attributes, also those it sets in its methods."""
    names: dict[str, str | None] = {}
    for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(owner)))):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            names[node.attr] = None
    for name, value in vars(owner).items():
        function = inspect.unwrap(value) if inspect.isroutine(value) else value
        names[name] = " ".join([*inspect.signature(function).parameters][1:]) if inspect.isfunction(function) else None
    return names


def path(owner: type) -> str:
    return f"{owner.__module__}.{owner.__qualname__}"


def accesses(tree: ast.AST) -> Iterator[tuple[bool, str]]:
    """Each private name that is read, set or defined; and whether it is one of the object's own."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and OURS.fullmatch(node.attr):
            yield ast.unparse(node.value) in ("self", "cls", "super()"), node.attr
        elif isinstance(node, ast.FunctionDef) and OURS.fullmatch(node.name):
            yield True, node.name


def defined(tree: ast.AST) -> set[str]:
    """Private names of our own: of functions, methods, classes, attributes and variables."""
    names = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute | ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.attr if isinstance(node, ast.Attribute) else node.id)
    return names


def uses(file: Path) -> Iterator[tuple[str, str]]:
    """Owner and private name of each use of NVFlare's in a file; the owner is empty where it cannot be told.

    A class that inherits from NVFlare may use a name without meaning to: what it calls `_x` is NVFlare's `_x`, too.
    """
    tree, rest = ast.parse(file.read_text()), []
    module = importlib.import_module(".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts))
    for part in tree.body:
        if not isinstance(part, ast.ClassDef):
            rest.append(part)
            continue
        bases = getattr(module, part.name).__mro__
        owners = [c for c in bases if c.__module__.split(".")[0] == "nvflare"]
        ours = {name for c in bases if c.__module__.split(".")[0] == PACKAGE.name for name in has(c)}
        for own, name in set(accesses(part)):
            owner = next((path(c) for c in owners if name in has(c)), "") if own else ""
            if owner or name not in defined(tree) | ours:
                yield owner, name
    for part in rest:
        yield from (("", name) for own, name in accesses(part) if not own and name not in defined(tree))


@pytest.fixture(scope="module")
def used() -> set[tuple[str, str]]:
    theirs = {name: owner for owner, name in PRIVATE}
    named = {(owner or theirs.get(name, "?"), name) for file in SHELL for owner, name in uses(file)}
    return named - {("?", "_exit")}  # os._exit, by which a trainer ends at once


def test_every_private_name_of_nvflare_that_we_use_is_in_the_table_and_no_other(used: set[tuple[str, str]]) -> None:
    assert used - PRIVATE.keys() == set(), "used: put it in PRIVATE, or do without"
    assert PRIVATE.keys() - used == set(), "no longer used: take it out of PRIVATE"


@pytest.mark.parametrize(("owner", "name"), PRIVATE, ids=lambda text: text.rpartition(".")[2])
def test_this_nvflare_has_it_as_we_know_it(owner: str, name: str) -> None:
    names = has(found(owner))
    assert name in names
    assert names[name] == PRIVATE[owner, name]


@pytest.mark.parametrize(("owner", "name"), sorted(INSIDE), ids=lambda text: text.rpartition(".")[2])
def test_this_nvflare_has_what_we_look_into(owner: str, name: str) -> None:
    assert name in has(found(owner))
    assert any(re.search(rf"\.{name}\b", file.read_text()) for file in SHELL)


def dotted_names() -> Iterator[tuple[Path, str]]:
    """What our files import from NVFlare and what they name as text."""
    for file in SHELL:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and not node.level:
                yield from ((file, f"{node.module}.{alias.name}") for alias in node.names)
            elif isinstance(node, ast.Import):
                yield from ((file, alias.name) for alias in node.names)
            elif isinstance(node, ast.Constant) and re.fullmatch(r"nvflare(\.\w+)+", str(node.value)):
                yield file, str(node.value)


def test_every_name_below_nvflares_private_package_is_in_the_table() -> None:
    named = {name for _, name in dotted_names() if name.startswith("nvflare.")}
    assert {n for n in named if any(p == "private" or p.startswith("_") for p in n.split("."))} == BELOW_PRIVATE


def test_every_class_and_module_of_nvflare_that_our_files_name_is_there() -> None:
    optional = {"mlflow", "wandb"}  # receivers of trackers that are not installed
    for file, name in dotted_names():
        if name.startswith("nvflare.") and not optional & {*name.split(".")}:
            assert found(name) is not None, f"{file.name} names {name}"


PLANTED = {
    "class A(FedAvg):\n    def m(self): return self._received_count": ("FedAvg", "_received_count"),
    "class A(FedAvg):\n    def _aggregate_one_result(self, result): pass": ("FedAvg", "_aggregate_one_result"),
    "class A(FedAvg):\n    def m(self): super()._prepare_task(1)": ("BaseModelController", "_prepare_task"),
    "class A(FedAvg):\n    def m(self): return self._of_a_later_version": ("", "_of_a_later_version"),
    "def f(job): return job._secret": ("", "_secret"),
}


@pytest.mark.parametrize("text", PLANTED)
def test_a_use_is_found(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ours_planted").mkdir()
    file = tmp_path / "ours_planted" / "planted.py"
    file.write_text("from nvflare.app_common.workflows.fedavg import FedAvg\n" + text)
    monkeypatch.setattr(f"{__name__}.PACKAGE", file.parent)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "ours_planted.planted", raising=False)
    ((owner, name),) = uses(file)
    assert (owner.rpartition(".")[2], name) == PLANTED[text]
