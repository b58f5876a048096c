"""Shape annotations of the core are checked at every call in a test run; tests that need public data ask for it."""

import functools
import gc
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import jaxtyping
import pytest
import torch
import typer.testing
from hypothesis import HealthCheck, settings
from xdist.scheduler import LoadFileScheduling

from tests import typechecking

gc.disable()  # until all is imported; see pytest_collection_finish
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # as in a trainer: nothing is compiled, and no compiler is loaded

CORE = [f"nvflare_fm.{name}" for name in ("adapter", "algebra", "aggregation")]
assert all(map(importlib.util.find_spec, CORE)), "a room of the core has another name: its shapes are not checked"
typer.testing._get_command = functools.cache(typer.testing._get_command)  # not anew at each command of 4,000

jaxtyping.install_import_hook(CORE, f"{typechecking.__name__}.check")

# Whole systems, longest first: deployed ones run on one worker, simulated ones, one after the other, on a second. Each
# waits for NVFlare half of its time, while a third worker runs all the rest.
DEPLOYED, *SIMULATED = "tests/deployment/", "test_interruptions", "integration/test_federation", "test_templates"
SYSTEMS = (DEPLOYED, *SIMULATED)

settings.register_profile(
    "suite",
    deadline=None,
    derandomize=True,
    max_examples=50,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.register_profile("thorough", settings.get_profile("suite"), max_examples=100)
settings.register_profile("search", settings.get_profile("suite"), derandomize=False, max_examples=1000)
settings.register_profile(
    "fuzz", settings.get_profile("search"), max_examples=int(os.environ.get("FUZZ_EXAMPLES", "100000"))
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "suite"))


@pytest.fixture(scope="session")
def writer() -> ModuleType:
    """What writes the pages of docs/reference that are made from the code."""
    spec = importlib.util.spec_from_file_location(
        "reference_writer", Path(__file__).parents[1] / "docs" / "reference" / "write.py"
    )
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def malformed_allowed() -> Iterator[None]:
    """Shape checks off, as in production, where a stranger's tensors may have any shape and type."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def pytest_collection_finish() -> None:
    """What is imported and collected stays: Python need not look for garbage in it, as it does after each training."""
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: next((i for i, name in enumerate(SYSTEMS) if name in item.nodeid), len(SYSTEMS)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> LoadFileScheduling:
    """A file's tests go to one worker, because they share what its fixtures have made; so do all systems of a kind."""

    class OneAfterTheOther(LoadFileScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            file = str(super()._split_scope(nodeid))
            if DEPLOYED in file:
                return DEPLOYED
            return "simulated" if any(name in file for name in SIMULATED) else file

    return OneAfterTheOther(config, log)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("cpu") and torch.cuda.is_available():
        pytest.skip("shows what holds where no GPU is")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of public data sets and small models."""
    folder = Path(os.environ.get("NVFLARE_FM_SHARED", Path(__file__).parents[2] / "shared"))
    if not (folder / "data").is_dir():
        pytest.skip("no public data here: set NVFLARE_FM_SHARED to the folder that holds data/ and models/")
    return folder
