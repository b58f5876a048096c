"""No mistake of a user ends in a traceback: every command there is, with whatever an argument can be."""

import ast
import json
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.core import TyperCommand, TyperGroup
from typer.testing import CliRunner, Result

from nvflare_fm.cli import app
from nvflare_fm.cli.terminal import console, plain
from nvflare_fm.config import RoundPlan
from nvflare_fm.export.folder import Saved, write_adapter
from nvflare_fm.site.check import checkup
from tests.flare.messages import MANIFEST, adapter

PACKAGE = Path(__file__).parents[1] / "nvflare_fm"


def typed(*words: Any, **environment: str) -> Result:
    return CliRunner(env={"COLUMNS": "60", **environment}).invoke(app, [str(word) for word in words])


def commands(command: TyperCommand | TyperGroup, *path: str) -> Iterator[tuple[tuple[str, ...], TyperCommand]]:
    """Every command that can be typed, with the words that name it."""
    if isinstance(command, TyperGroup):
        for name, inner in command.commands.items():
            yield from commands(inner, *path, name)
    else:
        yield path, command


ALL = dict(commands(typer.main.get_command(app)))


def ends_well(done: Result) -> bool:
    """With an exit status of its own, and one line at most where something is wrong."""
    if done.exception is None or isinstance(done.exception, SystemExit):
        return done.exit_code in (0, 1, 2) and "Traceback" not in done.output
    return False


def why(words: tuple[Any, ...], done: Result) -> str:
    trace = "".join(traceback.format_exception(done.exception)) if done.exception else ""
    return f"nvflare-fm {' '.join(map(repr, map(str, words)))}\n{done.output[-500:]}\n{trace[-2000:]}"


@pytest.fixture
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files and folders of every kind that is not what was meant, and one of each kind that is."""
    root = tmp_path_factory.mktemp("place")
    (root / "file").write_text("text")
    (root / "notes.jsonl").write_text('{"text": "a", "label": "b"}\n')
    (root / "empty").mkdir()
    (root / "request.yaml").write_text("about: notes\nlabels: [a]\n")
    (root / "set.jsonl").write_text('{"candidates": 1, "provenance": {}}\n{"text": "so it goes", "label": "a"}\n')
    (root / "binary").write_bytes(bytes(range(256)))
    (root / "[/x]").mkdir(parents=True)
    (root / "[bold]x[red]").write_text("[/nothing]")
    (root / "loop").symlink_to("loop")
    for folder in ("startup", "local"):
        (root / "kit" / folder).mkdir(parents=True)
    (root / "kit" / "startup" / "fed_client.json").write_text("{}")
    (root / "kit" / "local" / "fm_site.yaml").write_text("models: {base: {path: '[/srv/gone]'}}\n")
    for name, content in broken().items():
        job = root / "jobs" / name
        (job / "app" / "config").mkdir(parents=True)
        (job / "meta.conf").write_bytes(content)
        (job / "app" / "config" / "config_fed_server.conf").write_bytes(content)
        local = root / "kits" / name / "local"
        local.mkdir(parents=True)
        (root / "kits" / name / "startup").mkdir()
        for file in (local / "fm_site.yaml", local / "resources.json", local.parent / "startup" / "fed_client.json"):
            file.write_bytes(content)
        saved = root / "adapters" / name
        saved.mkdir(parents=True)
        for file in ("adapter_config.json", "adapter_model.safetensors", "provenance.json"):
            (saved / file).write_bytes(content)
        sealed = root / "sealed" / name
        sealed.mkdir(parents=True)
        for file in ("sealed.json", "ciphertexts.safetensors", "SHA256SUMS"):
            (sealed / file).write_bytes(content)
        (root / "results" / name).mkdir(parents=True)
        (root / "results" / name / "rounds.jsonl").write_bytes(content + b"\n")
        (root / "models" / name).mkdir(parents=True)
        (root / "models" / name / "config.json").write_bytes(content)
    plan = RoundPlan.read({"peft": {"method": "lora", "rank": 3}}, "test")
    write_adapter(root / "adapter", Saved(adapter(1), MANIFEST, 1, plan))
    done = typed("new", "lora_text_classification", "-o", root / "job", "labels=a,b")
    assert done.exit_code == 0, done.output
    return root


def broken() -> dict[str, bytes]:
    """Contents that are no configuration, however they are read."""
    deep = "[" * 50_000
    return {
        "binary": bytes(range(256)),
        "deep": deep.encode(),
        "list": b"[1]",
        "text": b'"[/x]"',
        "null": b"null",
        "latin": "models: {bäse: 1}".encode("latin-1"),
        "numbers": b'{"deploy_map": 1, "models": 2, "base": 3, "task": [4], "hidden_size": "x", "r": -1}',
        "apps": b'{"deploy_map": {"app": ["server", 7]}, "workflows": [1], "components": "x", "executors": {"a": 1}}',
    }


def hostile(place: Path) -> list[str]:
    paths = [place / name for name in ("none", "file", "empty", "[/x]", "[bold]x[red]", "loop", "file/inside")]
    texts = ["", "[/x]", "\udcff\udcfe", "\x1b[2J", "x" * 5000, "a=b=c", "labels=\udcff", "${HOME}"]
    numbers = ["-1", "nan", "9" * 5000, "x=1e999"]
    return [*map(str, paths), "/dev/null", *texts, *numbers]


def good(place: Path, words: tuple[str, ...]) -> list[str]:
    """What makes a command go as far as it can, in little time."""
    return {
        ("templates",): [],
        ("new",): ["lora_text_classification", "-o", str(place / "made")],
        ("plan",): [str(place / "job")],
        ("simulate",): [str(place / "job"), f"--data=n={place / 'file'}", "--model", str(place / "no model")],
        ("resume",): [str(place / "empty")],
        ("explain",): [str(place / "empty")],
        ("export",): [str(place / "adapter"), "-o", str(place / "exported")],
        ("decrypt",): [str(place / "adapter"), "-o", str(place / "decrypted"), "--kit", str(place / "kit")],
        ("audit",): [str(place / "adapter"), "--kit", str(place / "kit"), "-o", str(place / "audit.html")],
        ("data", "check"): [str(place / "notes.jsonl"), "--task", "sequence_classification"],
        ("compare", "run"): ["clinics", "--folder", str(place / "empty")],
        ("compare", "report"): ["clinics", "--folder", str(place / "empty")],
        ("compare", "grid"): [],
        ("compare", "parts"): [],
        ("compare", "overview"): [],
        ("compare", "robustness"): ["clinics", "--folder", str(place / "empty")],
        ("models", "get"): ["smollm2", "--library", str(place / "models")],
        ("models", "add"): [str(place / "notes.jsonl"), "--library", str(place / "models")],
        ("models", "list"): ["--library", str(place / "models")],
        ("synth", "generate"): [str(place / "request.yaml"), "--model", str(place / "models" / "empty")],
        ("synth", "vary"): [
            *(str(place / "set.jsonl"), "--request", str(place / "request.yaml")),
            *("--model", str(place / "models" / "empty")),
        ],
        ("synth", "look"): [str(place / "set.jsonl"), "--data", "notes", "--kit", str(place / "kit")],
        ("synth", "measure"): [str(place / "set.jsonl")],
        ("compare", "data"): ["medquad-lm", str(place / "sets")],
        ("site", "budget"): ["--kit", str(place / "kit")],
        ("site", "allow"): ["--kit", str(place / "kit")],
        ("site", "canaries"): ["--data", "notes", "--task", "causal_lm", "--kit", str(place / "kit")],
        ("site", "check"): ["--kit", str(place / "kit")],
    }[words]


@pytest.mark.parametrize("words", ALL, ids=" ".join)
def test_no_argument_of_any_command_ends_in_a_traceback(
    words: tuple[str, ...], place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NVFLARE_FM_SHARED", str(place / "empty"))  # the comparison of the docs would run for hours
    options = [max(p.opts, key=len) for p in ALL[words].params if p.opts[0].startswith("-") and not p.is_flag]
    for bad in hostile(place):
        tries = [[*words, bad], [*words, bad, *good(place, words)], [*words, *good(place, words), bad]]
        tries += [[*words, *good(place, words), option, bad] for option in options]
        for line in tries:
            done = typed(*line)
            assert ends_well(done), why(tuple(line), done)


@pytest.mark.parametrize("name", broken())
def test_no_file_ends_in_a_traceback_whatever_is_in_it(name: str, place: Path) -> None:
    job, kit, saved, model = (place / kind / name for kind in ("jobs", "kits", "adapters", "models"))
    for line in (
        ["plan", job],
        ["plan", place / "job", "--model", model],
        ["simulate", job, "--data", f"n={place / 'file'}", "--model", model],
        ["new", "evaluate_adapter", "-o", place / "made", f"adapter={saved}"],
        ["new", "continue_from_adapter", "-o", place / "made", f"adapter={saved}"],
        ["export", saved, "-o", place / "made"],
        ["export", place / "adapter", "-o", place / "made", "--merge", "--base", model],
        ["export", place / "sealed" / name, "-o", place / "made"],
        ["decrypt", place / "sealed" / name, "-o", place / "made", "--kit", place / "kit"],
        ["audit", saved, "--kit", place / "kit", "-o", place / "report"],
        ["audit", place / "adapter", "--kit", kit, "-o", place / "report"],
        ["site", "canaries", "--data", "notes", "--task", "causal_lm", "--kit", kit],
        ["explain", place / "results" / name],
        ["resume", place / "results" / name],
        ["site", "check", "--kit", kit],
        ["site", "allow", "--kit", kit],
        ["site", "allow", "--remove", "--kit", kit],
    ):
        done = typed(*line)
        assert ends_well(done), why(tuple(line), done)
        assert done.exit_code != 0 or "allow" in line, f"{line} took {name} for good"


def test_a_path_is_shown_as_it_is_and_the_detail_with_it(place: Path) -> None:
    done = typed("site", "check", "--kit", place / "kit")
    (line,) = [line for line in done.stdout.splitlines() if "model base" in line]
    assert line.startswith("✗")
    assert "[/srv/gone]" in line


def test_a_kit_that_is_not_there_is_said_to_be_missing(place: Path) -> None:
    for kit, text in (("none", "there is no folder"), ("empty", "no folder startup and no folder local")):
        done = typed("site", "check", "--kit", place / kit, "--json")
        (found,) = json.loads(done.stdout)
        assert (done.exit_code, found["what"]) == (1, "kit")
        assert text in found["text"]
        assert kit in found["text"]


def test_what_a_library_raises_in_a_trial_is_a_finding_that_says_where() -> None:
    found = checkup._tried("data notes", lambda: {}["modules_to_save"])  # type: ignore[return-value]
    assert not found.good
    assert "please report it: KeyError at " in found.text
    assert "modules_to_save" in found.text


def test_a_message_cannot_steer_the_terminal() -> None:
    screen = console(width=80)
    with screen.capture() as shown:
        screen.print(plain("[red]a\x1b[2J\x07b[/red] :smile:"))
    assert shown.get() == "[red]a\\x1b[2J\\x07b[/red] :smile:\n"
    assert "\x1b" not in typed("new", "\x1b[2J", "-o", "x").output


def test_nothing_is_printed_by_a_console_that_parses_markup() -> None:
    """rich reads `[/x]` in any text as markup unless told not to; `cli_terminal` is where it is told."""
    for file in PACKAGE.rglob("*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        imported = [f"{n.module}.{a.name}" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) for a in n.names]
        forbidden = {"rich.print", "rich.console.Console", "rich.markup", "rich.prompt.Prompt"}
        assert file.name == "terminal.py" or not forbidden & {*imported}, file


def test_what_a_package_would_be_needed_for_is_said(monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    monkeypatch.setitem(__import__("sys").modules, "nvflare_fm.flare.jobs.forecast", None)
    done = typed("plan", place / "job")
    assert done.exit_code == 1
    assert 'pip install "nvflare_fm[site]"' in str(done.exception)
