"""What is done for a task follows from its promises: no name of a task is compared outside the tasks' own files."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from nvflare_fm.job.tasks import TASKS

PACKAGE = Path(__file__).parents[1] / "nvflare_fm"
OWN = [PACKAGE / "job" / "tasks.py", *(PACKAGE / "site" / "tasks").glob("*.py")]
MODULES = sorted({*PACKAGE.rglob("*.py")} - {*OWN})


def decided_by_name(tree: ast.AST) -> Iterator[str]:
    """Names of tasks in comparisons, in cases of a match, and as keys of a table."""
    for node in ast.walk(tree):
        parts: list[ast.AST | None] = []
        if isinstance(node, ast.Compare):
            parts = [node.left, *node.comparators]
        elif isinstance(node, ast.match_case):
            parts = [node.pattern]
        elif isinstance(node, ast.Dict):
            parts = [*node.keys]
        elif isinstance(node, ast.Subscript):
            parts = [node.slice]
        constants = [each for part in parts if part is not None for each in ast.walk(part)]
        yield from (c.value for c in constants if isinstance(c, ast.Constant) and c.value in TASKS)


@pytest.mark.parametrize("module", MODULES, ids=lambda module: str(module.relative_to(PACKAGE)))
def test_no_task_is_told_by_its_name(module: Path) -> None:
    assert not [*decided_by_name(ast.parse(module.read_text()))]


@pytest.mark.parametrize(
    "code",
    [
        'plan.task == "causal_lm"',
        'x not in ("a", "regression")',
        'd = {"multi_label": 1}',
        'd["preference"]',
        'match t:\n    case "causal_lm":\n        pass',
    ],
)
def test_a_name_that_decides_is_found(code: str) -> None:
    assert [*decided_by_name(ast.parse(code))]
