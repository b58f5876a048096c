"""What a job left, made into a job that goes on after its last round."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from nvflare_fm.cli import app
from nvflare_fm.errors import FmError
from nvflare_fm.export import folder as export
from nvflare_fm.flare.jobs.job import read_job
from nvflare_fm.flare.jobs.new_job import write_job
from nvflare_fm.flare.jobs.resume import write_resumed
from nvflare_fm.flare.recipe import FedPEFTRecipe
from nvflare_fm.job import templates
from tests.flare.messages import MANIFEST, adapter, same

ROUNDS, LAST = 8, 2


def left_by(submitted: Path, result: Path, last: int | None = LAST) -> Path:
    """What `nvflare job download` writes of a job whose last round was `last`."""
    shutil.copytree(submitted, result / "job" / submitted.name)
    (result / "job" / submitted.name / ".__nvfl_sig.json").write_text("{}")
    (result / "workspace").mkdir()
    if last is not None:
        folder = result / "workspace" / "adapters" / "last"
        export.write_adapter(folder, export.Saved(adapter(last), MANIFEST, last))
    return result


def templated(folder: Path) -> Path:
    write_job(folder / "mine", templates.load("lora_mixed_hardware"), {"num_rounds": str(ROUNDS)})
    return folder / "mine"


def exported(folder: Path) -> Path:
    FedPEFTRecipe("mine", num_rounds=ROUNDS, sites={"north": {"rank": 4}}).export(str(folder))
    return folder / "mine"


@pytest.mark.parametrize("made", [templated, exported], ids=["of a template", "of a recipe"])
def test_the_new_job_is_the_old_one_from_its_last_adapter_on(tmp_path: Path, made: Any) -> None:
    submitted = made(tmp_path / "submitted")
    asked = read_job(submitted)
    job = write_resumed(left_by(submitted, tmp_path / "result"), tmp_path / "more")
    assert job.rounds == range(LAST + 1, ROUNDS)
    assert (job.name, job.sites.keys()) == (asked.name, asked.sites.keys())
    assert job.settled
    assert asked.settled
    for part in ("plan", "aggregation", "sites", "global_rank"):
        assert getattr(job.settled, part) == getattr(asked.settled, part), part
    assert {site: executor.overrides for site, executor in job.sites.items()} == {
        site: executor.overrides for site, executor in asked.sites.items()
    }
    assert job.adapter
    assert same(job.adapter, adapter(LAST))
    assert not list((tmp_path / "more").rglob(".__nvfl*"))


def test_a_resumed_job_can_be_resumed_again(tmp_path: Path) -> None:
    submitted = templated(tmp_path / "submitted")
    write_resumed(left_by(submitted, tmp_path / "first"), tmp_path / "once")
    job = write_resumed(left_by(tmp_path / "once", tmp_path / "second", last=5), tmp_path / "twice")
    assert job.rounds == range(6, ROUNDS)
    assert job.adapter
    assert same(job.adapter, adapter(5))


def test_a_save_that_was_killed_between_its_renames_is_resumed_from_the_older_adapter(tmp_path: Path) -> None:
    result = left_by(templated(tmp_path / "submitted"), tmp_path / "result")
    last = result / "workspace" / "adapters" / "last"
    last.rename(last.with_name(".last.old"))
    assert write_resumed(result, tmp_path / "more").rounds.start == LAST + 1


def refused(result: Path, folder: Path) -> str:
    before = sorted(result.parent.rglob("*"))
    with pytest.raises(FmError) as caught:
        write_resumed(result, folder)
    assert sorted(result.parent.rglob("*")) == before
    assert str(result.parent) not in caught.value.message
    return caught.value.code


def test_what_cannot_go_on_is_refused_and_nothing_is_left_behind(tmp_path: Path) -> None:
    submitted = templated(tmp_path / "submitted")
    assert refused(left_by(submitted, tmp_path / "none", last=None), tmp_path / "more") == "nothing_to_resume"
    assert refused(tmp_path / "submitted", tmp_path / "more") == "no_job_result"
    result = left_by(submitted, tmp_path / "result")
    assert refused(result, submitted) == "output_exists"
    weights = result / "workspace" / "adapters" / "last" / export.WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-1] + b"\xff")
    assert refused(result, tmp_path / "more") == "adapter_damaged"
    finished = left_by(submitted, tmp_path / "finished", last=ROUNDS - 1)
    assert refused(finished, tmp_path / "more") == "no_round_left"
    (finished / "job" / "mine" / "app_server" / "config" / "config_fed_server.conf").write_text("{}")
    assert refused(finished, tmp_path / "more") == "not_one_component"


def typed(*words: Any) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, ["resume", *(str(word) for word in words)])


def test_the_command_writes_the_job_and_says_with_which_round_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = left_by(templated(tmp_path / "submitted"), tmp_path / "result")
    done = typed("result")
    assert done.exit_code == 0, done.output
    assert f"goes on with round {LAST + 1} of rounds 0 to {ROUNDS - 1}" in done.output
    assert read_job(tmp_path / "mine_resumed").rounds.start == LAST + 1
    for words, code in [
        ((result,), "output_exists"),
        (("no-folder",), "no_kit"),
        (("no-folder", "--kit", tmp_path), "no_such_result"),
        (("3f1c2b7e-6f0e-4a53-9d2c-0a3d4c5b6a79", "--kit", tmp_path), "no_admin_kit"),
        ((result, "-o", tmp_path / "more", "--kit", tmp_path), "no_admin_kit"),
    ]:
        done = typed(*words)
        assert done.exit_code == 1
        assert f"[{code}]" in done.output
        assert "Traceback" not in done.output
