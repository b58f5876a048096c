"""`nvflare-fm` as a site's IT types it."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from nvflare_fm.cli import app
from nvflare_fm.site.fingerprint import fingerprint
from nvflare_fm.site.site_file import render
from tests.site import tiny


def typed(*words: Any) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def checked(kit: Path, *words: Any) -> tuple[int, dict[str, dict[str, Any]]]:
    done = typed("site", "check", "--kit", kit, "--quantization", "fp32", "--max-length", 48, "--json", *words)
    return done.exit_code, {finding["what"]: finding for finding in json.loads(done.stdout)}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture
def kit(tmp_path: Path, base: Path) -> Path:
    """A client's startup kit whose site file is ready for a job."""
    for folder in ("startup", "local"):
        (tmp_path / folder).mkdir()
    (tmp_path / "startup" / "fed_client.json").write_text("{}")
    offer(tmp_path, {"path": str(base), "fingerprint": fingerprint(base)}, tiny.rows("causal_lm"))
    assert typed("site", "allow", "--kit", tmp_path).exit_code == 0
    return tmp_path


def offer(kit: Path, model: dict[str, str], rows: list[dict[str, Any]]) -> None:
    file = tiny.jsonl(kit / "notes.jsonl", rows)
    said = {"models": {"base": model}, "data": {"notes": {"train": str(file)}}, "limits": {"threads": 1}}
    (kit / "local" / "fm_site.yaml").write_text(render(said))


def test_a_site_that_is_ready_is_told_so_with_what_a_step_costs(kit: Path):
    status, found = checked(kit)
    assert status == 0, found
    assert "holds the weights" in found["model base"]["said"]
    assert found["data notes"]["said"].startswith("22 rows to train on; ")
    assert "MiB at its peak" in found["data notes"]["said"]


def test_whatever_is_wrong_is_marked_with_its_remedy(kit: Path, base: Path):
    offer(kit, {"path": str(base), "fingerprint": "0" * 64}, [{"prompt": "only"}])
    (kit / "local" / "resources.json").write_text('{"class_allow_list": []}')
    status, found = checked(kit)
    assert status == 1
    assert found["allow list"]["said"] == "run nvflare-fm site allow"
    assert f"its fingerprint is {fingerprint(base)}" in found["model base"]["said"]
    assert "pins" in found["data notes"]["said"]
    assert [found[what]["good"] for what in ("allow list", "model base", "data notes")] == [False] * 3


def test_an_unpinned_model_is_fine_and_its_fingerprint_is_shown(kit: Path, base: Path):
    offer(kit, {"path": str(base)}, tiny.rows("causal_lm"))
    status, found = checked(kit, "--rank", 2)
    assert status == 0
    assert found["model base"]["said"] == f"not pinned; to pin it, add fingerprint: {fingerprint(base)}"


def test_error_logs_stay_at_the_site_and_the_check_says_when_they_do_not(kit: Path):
    (kit / "local" / "fm_site.yaml").write_text("limits: {max_rnak: 2}\n")
    assert checked(kit)[1]["error logs"]["said"] == "stay here"
    own = kit / "local" / "resources.json"
    own.write_text(own.read_text().replace('"allow_log_streaming": false', '"allow_log_streaming": true'))
    assert checked(kit)[1]["error logs"]["said"].startswith("go to the server")


def test_a_package_that_fetches_code_is_found_before_it_can(kit: Path, monkeypatch: pytest.MonkeyPatch):
    (kit / "kernels.py").write_text("raise SystemExit('fetched')")
    monkeypatch.syspath_prepend(kit)
    status, found = checked(kit)
    assert status == 1
    assert "pip uninstall kernels" in found["package kernels"]["said"]
    assert "data notes" not in found  # bitsandbytes was not imported


def test_a_fingerprint_can_be_copied_from_the_table(kit: Path, base: Path):
    offer(kit, {"path": str(base)}, [])
    shown = "".join(line.split("│")[-1].strip() for line in typed("site", "check", "--kit", kit).stdout.splitlines())
    assert fingerprint(base) in shown


def test_the_table_is_for_people_and_a_site_file_with_a_typo_is_named(kit: Path):
    (kit / "local" / "fm_site.yaml").write_text("limits: {max_rnak: 2}\n")
    done = typed("site", "check", "--kit", kit)
    assert done.exit_code == 1
    assert "✗" in done.stdout
    assert "max_rank" in done.stdout


def test_permission_is_taken_out_again(kit: Path):
    assert "fm_site.yaml.removed" in typed("site", "allow", "--kit", kit, "--remove").stdout
    assert "nothing to take out" in typed("site", "allow", "--kit", kit, "--remove").stdout
    refused = typed("site", "allow", "--kit", kit / "local")
    assert refused.exit_code == 1
    assert "no startup kit" in str(refused.exception)


def test_what_cannot_be_asked_is_refused_before_anything_is_loaded(kit: Path):
    refused = typed("site", "check", "--kit", kit, "--quantization", "nf3")
    assert "quantization" in str(refused.exception)
