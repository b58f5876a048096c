"""Of all that a job can name, a kit lets it build only the listed components, and these do nothing but their work."""

import importlib
import json
import pkgutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from nvflare.apis.fl_exception import UnsafeComponentError
from nvflare.apis.workspace import Workspace
from nvflare.app_common.widgets.component_path_authorizer import ComponentPathAuthorizer
from nvflare.fuel.utils.class_loader import load_class

import nvflare_fm
from nvflare_fm.flare import components
from nvflare_fm.flare.jobs import job
from nvflare_fm.flare.recipe import FedPEFTRecipe, SyntheticVotesRecipe
from nvflare_fm.synthesis.candidates import Candidate, CandidateSet, Provenance, write
from tests.deployment.system import SERVER, project
from tests.flare.test_provision import quickly

ROOT = Path(__file__).parents[2]


@cache
def reachable() -> dict[str, object]:
    """Every callable that a job could name under this package: ours, and whatever our modules import."""
    modules = [module.name for module in pkgutil.walk_packages(nvflare_fm.__path__, "nvflare_fm.")]
    return {
        f"{module}.{name}": value
        for module in modules
        for name, value in vars(importlib.import_module(module)).items()
        if callable(value)
    }


@pytest.fixture(scope="module", params=[True, False], ids=["only ours", "beside NVFlare's"])
def kits(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    asked = project(8002, {"clinic": {}})
    (builder,) = [b for b in asked["builders"] if "nvflare_fm" in b["path"]]
    builder["args"]["only_ours"] = request.param
    return quickly(tmp_path_factory.mktemp("kits"), asked)


def allowed(kit: Path, names: list[str]) -> set[str]:
    """What NVFlare builds, by the kit's own resources."""
    workspace, authorizer, found = Workspace(str(kit), kit.name), ComponentPathAuthorizer(), set()
    for name in names:
        try:
            authorizer.authorize_component_config({"path": name}, workspace=workspace)
            found.add(name)
        except UnsafeComponentError:
            continue
    return found


def test_a_site_and_the_server_build_the_listed_alone(kits: Path) -> None:
    names = sorted(reachable())
    assert len(names) > 1200
    assert "nvflare_fm.flare.executor.ClientAPIExecutor" in names
    assert "nvflare_fm.export.folder.save_file" in names
    assert allowed(kits / "clinic", names) == set(components.SITE)
    assert allowed(kits / SERVER, names) == set(components.SERVER)


def test_nothing_can_be_built_below_a_listed_name(kits: Path) -> None:
    """NVFlare's list allows it; its loader, which looks for a module, finds none."""
    for name in components.OURS:
        for inside in ("__init__", "__class__", "mro", "logger"):
            with pytest.raises(TypeError):
                load_class(f"{name}.{inside}")


def test_the_list_is_what_a_job_is_read_with_and_what_recipes_make(tmp_path: Path) -> None:
    kinds = {name: components.load(name) for name in components.OURS}
    assert all(f"{kind.__module__}.{kind.__name__}" == name for name, kind in kinds.items())
    recipe = FedPEFTRecipe("job", cross_site_evaluation=True)
    recipe.export(str(tmp_path))
    rows = tmp_path / "made.jsonl"
    rows.write_bytes(write(CandidateSet((Candidate(text="a text"),), Provenance())))
    SyntheticVotesRecipe("votes", rows, privacy={"epsilon": 1.0}).export(str(tmp_path))
    written = {path for file in tmp_path.rglob("*.json") for path in _paths(json.loads(file.read_text()))}
    assert {path for path in written if path.startswith("nvflare_fm.")} == set(components.OURS)
    assert {path for path in written if path.startswith("nvflare.")} <= {
        *components.NVFLARE_SERVER,
        *components.NVFLARE_SITE,
    }
    assert job.read_job(tmp_path / "job").name == "job"


def test_a_job_that_asks_for_the_sites_logs_is_not_built_at_a_server_of_the_example(tmp_path: Path) -> None:
    kits = quickly(tmp_path / "kits", project(8002, {"clinic": {}}))
    recipe = FedPEFTRecipe("job")
    recipe.enable_log_streaming("log.txt", "error_log.txt")
    recipe.export(str(tmp_path))
    (server,) = (tmp_path / "job").rglob("config_fed_server.json")
    (receiver,) = [path for path in _paths(json.loads(server.read_text())) if path.endswith("JobLogReceiver")]
    assert not allowed(kits / SERVER, [receiver])


def _paths(value: object) -> list[str]:
    if isinstance(value, dict):
        inner = [path for each in value.values() for path in _paths(each)]
        return [value["path"], *inner] if isinstance(value.get("path"), str) else inner
    return [path for each in value for path in _paths(each)] if isinstance(value, list) else []


def test_whatever_a_job_says_to_them_the_components_touch_nothing_outside_the_job() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.flare.watched"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["seen"] == []
    assert told["wrong"] == []
    assert len(told["planted"]) == 3, "the hook sees nothing"
    assert told["outcomes"]["refused"] > 10
