"""The docs are true: links lead somewhere, commands exist, tables are up to date, and every block of Python runs."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from nvflare_fm.adapter import Adapter, AdapterUpdate, LoraPair, Manifest, Report
from nvflare_fm.aggregation import merge, weigh
from nvflare_fm.aggregation.cohort import Cohort
from nvflare_fm.algebra.lora import fresh_rows, zero
from nvflare_fm.config import Aggregation, RoundPlan
from nvflare_fm.errors import ConfigError
from nvflare_fm.job.settle import settle
from tests import pages
from tests.pages import blocks

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
TUTORIAL = ROOT / "docs" / "tutorials" / "first_federation.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
LONGEST = 110  # characters of a line of prose


def anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        found = (page.parent / file).resolve() if file else page
        assert found.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(found), f"{page.name} links to {target}"


def test_every_page_is_on_the_map() -> None:
    mapped = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    for page in (ROOT / "docs").rglob("*.md"):
        name = page.relative_to(ROOT / "docs").as_posix()
        assert name == "index.md" or f"({name})" in mapped, f"{name} is not in docs/index.md"


def test_every_page_is_in_the_navigation_of_the_site_once() -> None:
    _, nav = (ROOT / ".mkdocs.yml").read_text(encoding="utf-8").split("\nnav:\n")
    listed = re.findall(r"([\w/]+\.md)$", nav, re.MULTILINE)
    assert sorted(listed) == sorted(
        page.relative_to(ROOT / "docs").as_posix() for page in (ROOT / "docs").rglob("*.md")
    )


def prose(page: Path) -> Iterator[tuple[int, str]]:
    """The numbered lines of a page that are neither code nor rows of a table."""
    fenced = False
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        fence = line.lstrip().startswith("```")
        if not (fenced or fence or line.startswith(("    ", "|"))):
            yield number, line
        fenced ^= fence
    assert not fenced, f"{page.name} ends within a block of code"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_line_of_prose_fits_on_a_screen(page: Path) -> None:
    assert [f"{page.name}:{number}" for number, line in prose(page) if len(line) > LONGEST] == []


@pytest.mark.parametrize("page", ["settings.md", "rules.md", "errors.md"])
def test_the_reference_is_what_the_code_says(page: str, writer: ModuleType) -> None:
    written = (ROOT / "docs" / "reference" / page).read_text(encoding="utf-8")
    assert written == writer.PAGES[page](), "run: python docs/reference/write.py"


def test_every_test_that_the_threat_model_names_exists() -> None:
    text = (ROOT / "docs" / "explanation" / "threat_model.md").read_text(encoding="utf-8")
    named = re.findall(r"`((?:\w+/)*test_\w+\.py)(?:::(\w+))?`", text)
    assert len(named) > 30
    for file, test in named:
        source = (ROOT / "tests" / file).read_text(encoding="utf-8")
        assert not test or f"def {test}(" in source, f"{file}::{test}"


def test_every_make_target_in_the_docs_exists() -> None:
    rules = set(re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        named = set(re.findall(r"^make (\w+)|`make (\w+)", text, re.MULTILINE))
        assert {a or b for a, b in named} <= rules, page.name


def test_every_script_in_the_docs_exists() -> None:
    for page in PAGES:
        for script in re.findall(r"python ((?:docs|tests)/[\w/]+\.py)", page.read_text(encoding="utf-8")):
            assert (ROOT / script).is_file(), f"{page.name} runs {script}"


@pytest.fixture
def pasted() -> Iterator[None]:
    """The how-to's rules in their registries."""
    with pages.pasted():
        yield


@pytest.mark.usefixtures("pasted")
def test_the_merge_rule_of_the_how_to_is_one_that_a_job_can_ask_for_with_its_setting() -> None:
    """tests/test_merge.py holds it to its promises."""
    ranks = (1, 2)
    pairs = [LoraPair(fresh_rows("a", 5, range(r), seed=r), fresh_rows("b", 4, range(r), seed=r).T) for r in ranks]
    for power, share in ((1.0, 0.25), (2.0, 0.1)):
        rule = merge.choose({"rule": "sharpened", "power": power})
        expected = share * pairs[0].delta() + (1 - share) * pairs[1].delta()
        assert torch.allclose(rule.merge(zero(4, 5), pairs, [0.25, 0.75]).delta(), expected)
    with pytest.raises(ConfigError) as refused:
        merge.choose({"rule": "sharpened", "power": 0})
    assert refused.value.code == "wrong_setting"
    settle(RoundPlan(), Aggregation(merge={"rule": "sharpened", "power": 3.0}))


@pytest.mark.usefixtures("pasted")
def test_the_weight_of_the_how_to_is_one_that_a_job_can_ask_for_with_its_setting() -> None:
    reports = {"a": Report(seconds=90.0), "b": Report(seconds=20.0)}
    manifest = Manifest("base", "causal_lm", "lora")
    updates = [AdapterUpdate(site, Adapter(), manifest, report) for site, report in reports.items()]
    shares = weigh.weigh([{"rule": "slow", "seconds": 30}], Cohort(updates)).shares
    assert shares == pytest.approx({"a": 0.25, "b": 0.75})


RUNS = 'recipe.run(SimEnv(sites, workspace_root="runs"))'


def test_the_python_of_the_readme_makes_a_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run it is by `make test-all`."""
    (first,) = blocks(README, "python")
    assert first.count(RUNS) == 1
    monkeypatch.chdir(tmp_path)
    exec(first.replace(RUNS, 'SimEnv(sites, workspace_root="runs"); recipe.export("jobs")'), {})
    assert list((tmp_path / "jobs" / "first").rglob("config_fed_server.json"))


@pytest.mark.slow
def test_the_python_of_the_readme_and_the_tutorial_runs(tmp_path: Path) -> None:
    """As a reader would: the README's block first, the tutorial's after it, in an empty folder."""
    (first,) = blocks(README, "python")
    script = tmp_path / "reader.py"
    script.write_text(first + "".join(blocks(TUTORIAL, "python")), encoding="utf-8")
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    for job in ("first", "second"):
        assert (tmp_path / "runs" / job / "server" / "simulate_job" / "adapters" / "last").is_dir()
    exported = {file.name for file in (tmp_path / "jobs" / "second").rglob("*") if file.is_file()}
    assert "config_fed_server.json" in exported
    assert not any(name.endswith(".py") for name in exported)
