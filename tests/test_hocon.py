"""Our part of HOCON: what it accepts means the same to pyhocon, and pyhocon then reads nothing but the text."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from nvflare.fuel.utils.config import ConfigFormat
from nvflare.fuel.utils.config_factory import ConfigFactory

from nvflare_fm.errors import ConfigError
from nvflare_fm.job import hocon, templates
from tests.codes import refused
from tests.texts import texts, written

SECRET = "hf_CANARY"
PYHOCON = ConfigFactory.get_config_loader(ConfigFormat.PYHOCON)


@pytest.fixture(scope="module", autouse=True)
def canaries(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A file beside the job, and a variable, that nobody may read."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "canary.conf").write_text(f'told = "{SECRET}"\n')
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("FM_CANARY", SECRET)
        yield


def ours(text: str) -> dict[str, Any] | None:
    try:
        return hocon.parse(text)
    except ConfigError:
        return None


def theirs(text: str) -> Any:
    return PYHOCON.load_config_from_str(text).to_dict()


@given(texts)
def test_what_we_accept_reads_no_file_and_no_variable(text: str) -> None:
    if (said := ours(text)) is not None:
        assert theirs(text) == said
        assert SECRET not in str(theirs(text))


@given(written())
@example(({"a": [[1]]}, "a = [[1]]"))
def test_what_we_accept_means_what_was_written_and_the_same_to_pyhocon(case: tuple[dict[str, Any], str]) -> None:
    value, text = case
    if (said := ours(text)) is not None:
        assert said == value
        assert theirs(text) == value


def test_most_of_what_can_be_written_is_accepted() -> None:
    """Else the law above would say little."""
    plain = {"a": 1, "b": -0.5, "c": ["x", "y z"], "d": {"e": True, "f": None, "g": {}}, "é": 'ü\n\t\\"'}
    text = 'a = 1\nb: -0.5, c = ["x"\n "y z"] # c\nd { e = TRUE\n f = null, g {} } // c\n"é" = "ü\\n\\t\\\\\\""\n'
    assert ours(text) == ours(f"\n{{ {text}}}\n# end") == theirs(text) == plain
    assert ours("a = exact") == {"a": "exact"}


READS = {
    "include": 'include "canary.conf"',
    "a file": 'include file("canary.conf")',
    "an address": 'include url("file:///etc/hostname")',
    "a package": 'include package("nvflare:x.conf")',
    "required": 'include required(file("canary.conf"))',
    "a pattern": 'include "*.conf"',
    "in capitals": 'INCLUDE "canary.conf"',
    "after a comment": 'a = 1 # c\r include "canary.conf"',
    "after an unseen end of line": 'a = 1 # c\u2028\n\x85include "canary.conf"',
    "inside a block": 'a { include "canary.conf" }',
    "in a value": 'a = include "canary.conf"',
    "in a list": 'a = [ include "canary.conf" ]',
    "a variable": "a = ${FM_CANARY}",
    "a variable that may be missing": "a = ${?FM_CANARY}",
    "a variable after a text": 'a = "x" ${FM_CANARY}',
    "a variable as a key": "${FM_CANARY} = 1",
    "a sum, which starts from the variable": 'FM_CANARY += "x"',
    "a sum of lists": 'FM_CANARY += [ "x" ]',
    "a text of several lines": 'a = """\n${FM_CANARY}"""',
}


@pytest.mark.parametrize("text", READS.values(), ids=list(READS))
def test_whatever_takes_a_value_from_elsewhere_is_refused(text: str) -> None:
    assert ours(text) is None


UNCLEAR = (
    *("a = 1\na = 2", "a { b = 1 }\na { c = 2 }", "a.b = 1", "a = 10 s", "a = 10s", "a = x y", 'a = "x" "y"'),
    *("a = [1] [2]", "a = {b = 1} {c = 2}", 'a = "\\u0041"', 'a = "\\/"', 'a = [""]', "a = [null]", "a = 007"),
    *("a = 1e999", f"a = {'9' * 33}", "a", "= 1", "a = ", "a = ,", "a = [1,,2]", "[1]", "a = 1 }", "{ a = 1"),
    *("a = [1", '"" = 1', "a = 'x'", "a = x/y", "a = -", 'a = "x', 'a = "x\ny"', 'a = "x\ty"', "a = x\\\ny"),
    *("a = \x00", "\ufeffa = 1", "a = \u202e1", "é = 1", "a = `x`", "a ! b"),
)  # fmt: skip


@pytest.mark.parametrize("text", UNCLEAR)
def test_what_two_readers_could_take_differently_is_refused(text: str) -> None:
    assert ours(text) is None


def test_a_refusal_names_the_line_and_the_remedy() -> None:
    with refused("not_plain_hocon", ConfigError, "config_fed_client.conf, line 3") as error:
        hocon.parse("a = 1\n# c\nb = ${HOME}\n", "config_fed_client.conf")
    assert error.value.code == "not_plain_hocon"
    with refused("not_plain_hocon", ConfigError, "line 1"):
        hocon.parse('Include "other.conf"')


@pytest.mark.parametrize("mark", ["{ a = ", "["])
def test_depth_is_bounded(mark: str) -> None:
    close = {"{ a = ": "}", "[": "]"}[mark]
    deepest = hocon.MAX_DEPTH
    assert ours(f"a = {mark * deepest}1{close * deepest}") is not None
    assert ours(f"a = {mark * (deepest + 1)}1{close * (deepest + 1)}") is None
    assert ours(f"a = {mark * 100_000}") is None


@pytest.mark.parametrize("file", sorted(templates.folder().rglob("*.conf")), ids=lambda f: "/".join(f.parts[-4:]))
def test_every_template_is_written_in_it(file: Path) -> None:
    assert ours(file.read_text("utf-8")) == theirs(file.read_text("utf-8"))


LEAKS = (
    *("include", "a file", "required", "a pattern", "in capitals", "after a comment", "inside a block", "in a list"),
    *("a variable", "a variable that may be missing", "a variable after a text"),
    "a sum, which starts from the variable",
)


@pytest.mark.parametrize("name", LEAKS)
def test_pyhocon_would_read_them(name: str) -> None:
    """Else the laws above would say little. `+=` reads the environment, and a carriage return ends a comment."""
    assert SECRET in str(theirs(READS[name]))
