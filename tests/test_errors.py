"""Every error has a code that a user can look up, and keeps it on its way."""

import ast
import copy
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from nvflare_fm import errors
from nvflare_fm.errors import FmError, PolicyError
from nvflare_fm.privacy import egress

ROOT = Path(__file__).parents[1]
KINDS = {name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, FmError)}
CODE = re.compile(r"[a-z0-9]+(_[a-z0-9]+)*")


def calls(folder: str) -> Iterator[tuple[str, str, dict[str | None, ast.expr]]]:
    """Where, the name that is called, and the arguments given by name."""
    for file in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func).rpartition(".")[2]
                where = f"{file.relative_to(ROOT)}:{node.lineno}"
                yield where, name, {each.arg: each.value for each in node.keywords}


def test_every_error_is_raised_with_a_code_that_stands_there() -> None:
    """Or with that of the error that it passes on."""
    raised = [(where, given.get("code")) for where, name, given in calls("nvflare_fm") if name in {*KINDS, "BadRow"}]
    assert len(raised) > 200
    for where, code in raised:
        choices = [code.body, code.orelse] if isinstance(code, ast.IfExp) else [code]
        literal = all(isinstance(one, ast.Constant) and CODE.fullmatch(str(one.value)) for one in choices)
        passed_on = isinstance(code, ast.Attribute) and code.attr == "code"
        of_a_process = code is not None and ast.unparse(code).startswith("_CODES.get(")  # what its exit status means
        assert literal or passed_on or of_a_process, where


def test_the_codes_that_may_leave_a_site_under_a_floor_are_codes_of_errors() -> None:
    others = [file for file in (ROOT / "nvflare_fm").rglob("*.py") if file != Path(egress.__file__)]
    source = "\n".join(file.read_text(encoding="utf-8") for file in others)
    given = {*re.findall(r'"(\w+)"', source), *re.findall(r"\[(\w+)\]", source)}
    own = {*re.findall(r'code="(\w+)"', Path(egress.__file__).read_text(encoding="utf-8"))}
    assert egress.TOLD - given - own == set()


def test_no_test_matches_the_wording_of_an_error() -> None:
    assert [where for where, name, given in calls("tests") if name == "raises" and "match" in given] == []


@pytest.mark.parametrize("local", ["", "/data/notes.jsonl"])
def test_an_error_stays_what_it_is_on_its_way_to_another_process(local: str) -> None:
    error = PolicyError("raise max_rank", local, code="above_limit")
    again = copy.copy(error)
    assert type(again) is PolicyError
    assert (again.text, again.message, again.local, again.code) == (
        "raise max_rank", "raise max_rank [above_limit]", local, "above_limit",
    )  # fmt: skip
    assert str(again) == str(error)
