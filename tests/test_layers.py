"""Who may import whom: the core knows torch, a site knows Hugging Face, only flare/ knows nvflare."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from nvflare_fm.flare import components

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "nvflare_fm"
MODULES = sorted(PACKAGE.rglob("*.py"))
HUGGING_FACE = {"transformers", "peft", "bitsandbytes", "accelerate", "datasets", "trl", "sentence_transformers"}
CORE_KNOWS = {"torch", "numpy", "pydantic", "jaxtyping", "safetensors", "nvflare_fm"}
PRIVACY_KNOWS = CORE_KNOWS | {"opacus"}  # sites and the command line load it, the server's side does not
ENCRYPTION_KNOWS = {"numpy", "tenseal", "nvflare_fm"}  # no torch, so that a process that reads ciphertexts starts fast
KNOWS = {"privacy": PRIVACY_KNOWS, "encryption": ENCRYPTION_KNOWS}
BRIDGES = {"simulate"}  # files that bring the core and what a site does together
COMMANDS = {"cli"}
LOADS_MODELS = {
    f"synthesis/{name}.py" for name in ("embed", "generate", "look", "vary")
}  # beside functions of the core
ROOMS_ABOVE = {
    "core": {"site", "flare", "demo", "compare", *COMMANDS, *BRIDGES},
    "site": {"flare", "demo", "compare", *COMMANDS, *BRIDGES},
    "bridge": {"flare", "demo", "compare", *COMMANDS},
    "flare": {"demo", "compare", *COMMANDS},
}


def room(module: Path) -> str:
    """site, flare, demo, compare, cli, bridge, or core for all the rest."""
    if module.relative_to(PACKAGE).as_posix() in LOADS_MODELS:
        return "site"
    first = module.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if first in BRIDGES | COMMANDS:
        return "bridge" if first in BRIDGES else "cli"
    return first if first in {"site", "flare", "demo", "compare"} else "core"


def imported(module: Path) -> Iterator[str]:
    """The dotted names a module imports anywhere in its text, relative ones resolved."""
    package = ("nvflare_fm", *module.relative_to(PACKAGE).parts[:-1])
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parent = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*parent, *filter(None, [node.module])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def third_party(module: Path) -> set[str]:
    return {name.split(".")[0] for name in imported(module)} - sys.stdlib_module_names


def loaded_after(*modules: str) -> set[str]:
    """Which libraries a fresh interpreter has loaded after importing `modules`."""
    return {name.split(".")[0] for name in modules_after("; ".join(f"import {m}" for m in modules))}


def modules_after(code: str) -> set[str]:
    """The dotted names of what a fresh interpreter has loaded after running `code`."""
    code += "; import sys; print('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines())


def reached_from(*modules: str) -> set[str]:
    """All of our modules that `modules` import, those that the imported ones import, and so on; in functions, too."""
    files = {dotted(module): module for module in MODULES}
    found, left = set(), list(modules)
    while left:
        name = left.pop()
        while name not in files and "." in name:  # what a module imports by name may be no module
            name = name.rpartition(".")[0]
        if name not in files or name in found:
            continue
        found.add(name)
        left += [name.rpartition(".")[0], *imported(files[name])]  # a package is loaded before its modules
        if files[name].name == "__init__.py" and "Registry(" in files[name].read_text():  # it imports all of its folder
            left += [other for other in files if other.startswith(f"{name}.")]
    return found


def dotted(module: Path) -> str:
    return ".".join(module.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize("module", [m for m in MODULES if room(m) == "core"], ids=dotted)
def test_the_core_knows_torch_and_little_else(module):
    assert third_party(module) <= KNOWS.get(module.parent.name, CORE_KNOWS)


@pytest.mark.parametrize("module", [m for m in MODULES if room(m) != "flare"], ids=dotted)
def test_only_flare_imports_nvflare(module):
    assert "nvflare" not in third_party(module)


@pytest.mark.parametrize("module", [m for m in MODULES if room(m) in ROOMS_ABOVE], ids=dotted)
def test_no_room_imports_from_one_above_it(module):
    forbidden = {f"nvflare_fm.{above}" for above in ROOMS_ABOVE[room(module)]}
    assert not {name for name in imported(module) if ".".join(name.split(".")[:2]) in forbidden}


def test_importing_the_core_loads_neither_hugging_face_nor_nvflare():
    loaded = loaded_after(*(dotted(m) for m in MODULES if room(m) == "core"))
    assert "nvflare_fm" in loaded
    assert not loaded & (HUGGING_FACE | {"nvflare"})


def test_what_the_server_runs_imports_nothing_of_what_a_site_does():
    rooms = [dotted(m) for m in MODULES if m.relative_to(PACKAGE).parts[0] in ("aggregation", "job")]
    decides = ("combination", "legality", "feasible", "export")
    server = {kind.rpartition(".")[0] for kind in components.SERVER}
    reached = reached_from(*rooms, *server, *(f"nvflare_fm.{name}" for name in decides), "nvflare_fm.flare.wire")
    assert len(reached) > 50
    site = {dotted(module) for module in MODULES if room(module) == "site"}
    assert not reached & site


def test_a_job_is_settled_and_its_server_built_without_loading_what_a_site_does():
    loaded = modules_after(
        "from nvflare_fm.flare import components, stats, wire; "
        "kinds = [components.load(name) for name in components.SERVER]; "
        "from nvflare_fm.job.peft import registry; from nvflare_fm.aggregation import merge; "
        "classify = {'task': 'sequence_classification', 'labels': ['a', 'b']}; "
        "[kinds[0](plan={'peft': {'method': method}, **classify}) for method in registry]; list(merge.registry)"
    )
    assert {"nvflare_fm.job.peft.lora", "nvflare_fm.aggregation.merge.exact", "nvflare_fm.flare.persistor"} <= loaded
    assert not {name for name in loaded if name.startswith("nvflare_fm.site")}
    assert not {name.split(".")[0] for name in loaded} & (HUGGING_FACE | {"opacus"})


def test_no_process_of_nvflares_own_loads_hugging_face():
    """A site's gate runs in one, and what a data scientist submits with in another."""
    loaded = loaded_after("nvflare_fm.flare.executor", "nvflare_fm.flare.recipe")
    assert "nvflare" in loaded
    assert not loaded & HUGGING_FACE


def test_what_reads_a_strangers_ciphertexts_loads_no_torch():
    assert not loaded_after("nvflare_fm.encryption.reader") & (HUGGING_FACE | {"torch", "nvflare", "tenseal"})


def test_what_the_parent_processes_of_a_site_and_the_server_run_loads_no_torch():
    assert not loaded_after("nvflare_fm.flare.deployment") & (HUGGING_FACE | {"torch"})


def test_the_command_line_starts_without_torch():
    loaded = loaded_after("nvflare_fm.cli")
    assert "typer" in loaded
    assert not loaded & (HUGGING_FACE | {"torch", "nvflare"})


def test_every_library_that_is_imported_is_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    declared = {plain(re.split(r"[\[<>=~! ]", line)[0]) for group in groups for line in group}
    distributions = packages_distributions()
    for module in MODULES:
        for name in third_party(module) - {"nvflare_fm"}:
            owners = {plain(owner) for owner in distributions.get(name, [name])}
            assert owners & declared, f"{dotted(module)} imports {name}, which pyproject.toml does not declare"


def test_every_requirement_is_pinned_to_the_set_that_is_tested():
    pinned = {
        plain(line.split("==")[0]) for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line
    }
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    named = {plain(re.split(r"[\[<>=~! ]", line)[0]) for group in groups for line in group}
    assert named - pinned == {"nvflare-fm"}


def plain(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()
