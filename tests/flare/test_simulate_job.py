"""Any job folder on one machine: what each site is given, and what is refused before anything starts."""

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from nvflare_fm.cli import app
from nvflare_fm.errors import ConfigError
from nvflare_fm.flare.jobs.simulate_job import prepare_simulation
from nvflare_fm.site.offer.site_config import load_site


def typed(*words: Any) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A job for any sites, one for two that are named, files and a model's folder."""
    (tmp_path / "model").mkdir()
    for name in ("north", "south", "held"):
        (tmp_path / name).write_text("")
    assert typed("new", "lora_instruction_tuning", "-o", tmp_path / "any").exit_code == 0
    asked = ("sites.north.model=small", "sites.south.data=letters")
    assert typed("new", "lora_mixed_hardware", "-o", tmp_path / "named", *asked).exit_code == 0
    return tmp_path


def files(place: Path, *sites: str) -> dict[str, Path]:
    return {site: place / site for site in sites}


def test_the_model_and_files_stand_for_the_aliases_of_each_site(place: Path) -> None:
    both = files(place, "north", "south")
    job, run = prepare_simulation(place / "named", place / "model", both, {"south": place / "held"}, place / "runs")
    north, south = (load_site(run.workspace / "local" / f"{site}.fm_site.yaml") for site in run.sites)
    assert (job.name, list(run.sites)) == ("named", ["north", "south"])
    assert {alias: source.path for alias, source in north.models.items()} == {"small": str(place / "model")}
    assert (list(south.models), list(south.data)) == (["base"], ["letters"])
    assert south.data["letters"].train == str(place / "south")
    assert south.data["letters"].validation == str(place / "held")
    assert north.data["notes"].validation == ""


@pytest.mark.parametrize(
    ("job", "sites", "said", "code"),
    [
        ("any", ("north",), "needs 2 sites and --data names 1", "too_few_sites"),
        ("any", (), "name each site with its file", "no_data"),
        ("any", ("north", "server"), "cannot be a site", "site_name"),
        ("any", ("north", "a,b"), "cannot be a site", "site_name"),
        ("named", ("north",), "no file is named for site 'south': add --data south=FILE", "no_data"),
        ("named", ("north", "south", "sout"), "no site 'sout'; did you mean \"south\"", "unknown_site"),
        ("any", ("north", "gone"), "there is no ", "no_such_file"),
    ],
)
def test_what_cannot_run_is_refused_before_it_starts(
    place: Path, job: str, sites: tuple[str, ...], said: str, code: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        prepare_simulation(place / job, place / "model", files(place, *sites), {}, place / "runs")
    assert caught.value.code == code
    assert said in str(caught.value)
    assert not (place / "runs").exists()


def test_a_folder_that_is_no_simulation_is_never_emptied(place: Path) -> None:
    """NVFlare's simulator empties its workspace: `-o .` beside the job would name the job itself."""
    data = [f"--data={site}={place / site}" for site in ("north", "south")]
    refused = typed("simulate", place / "any", "--model", place / "model", "-o", place, *data)
    assert "[not_a_simulation]" in str(refused.exception)
    assert (place / "any" / "meta.conf").exists()


def test_a_site_is_named_once_with_a_file(place: Path) -> None:
    for data, said in ((["north"], "names no file"), (["north=a", "north=b"], "two files for site 'north'")):
        options = [f"--data={text}" for text in data]
        refused = typed("simulate", place / "any", "--model", place / "model", *options)
        assert said in str(refused.exception)
