"""What the network and the operating system do to a federation: trainers killed, sites too slow, jobs restarted."""

import time
from pathlib import Path

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM

from nvflare_fm import export
from nvflare_fm.flare.recipe import FedPEFTRecipe
from tests.site import tiny

from .federation import PLAN, Federation, kill, offers

STEPS_OF_A_ROUND = 30  # long enough to be interrupted, a few seconds


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Federation:
    """Three rounds; in the second the trainer of cedar gets SIGKILL while it trains."""
    folder = tmp_path_factory.mktemp("killed")
    training = PLAN["training"] | {"local_steps": STEPS_OF_A_ROUND}
    recipe = FedPEFTRecipe("killed", num_rounds=3, keep_rounds=True, **PLAN | {"training": training})
    run = Federation(recipe, offers(folder, model, ["alder", "cedar"]), folder / "runs")
    with run.running():
        run.until(lambda: len(run.rounds()) == 1, within_s=150)
        run.until(lambda: run.log("cedar").count("waiting for result from external trainer") == 2, within_s=20)
        time.sleep(0.5)
        (trainer,) = run.trainers("cedar")
        kill(trainer)
    return run


def test_the_federation_goes_on_without_a_killed_trainer(killed: Federation) -> None:
    _, second, *_ = killed.rounds()
    assert killed.error is None
    assert set(second["sites"]) == {"alder"}
    assert second["out"]["cedar"]["kind"] == "stopped"


def test_a_site_whose_trainer_was_killed_is_back_in_the_next_round(killed: Federation) -> None:
    _, _, third, last = killed.rounds()
    assert set(third["sites"]) == {"alder", "cedar"}
    assert set(last["sites"]) == {"alder", "cedar"}


def test_no_trainer_outlives_its_job(killed: Federation) -> None:
    assert not killed.trainers("alder")
    assert not killed.trainers("cedar")


def test_a_job_restarts_from_a_saved_round_and_two_processes_of_a_site_train_as_one(
    killed: Federation, tmp_path: Path, model: Path
) -> None:
    saved = killed.server / "adapters" / "round-001"
    recipe = FedPEFTRecipe("again", num_rounds=3, initial_adapter=saved, resume=True, processes=2, **PLAN)
    run = Federation(recipe, offers(tmp_path, model, ["alder"]), tmp_path / "runs").run()
    assert run.error is None
    resumed, last = run.rounds()
    assert (resumed["round"], resumed["total_rounds"], last["round"]) == (2, 3, 3)
    assert resumed["bytes_down"] > 0
    assert resumed["sites"]["alder"]["steps"] == PLAN["training"]["local_steps"]
    assert export.read_adapter(run.server / "adapters" / "last")[2].round == 2
    assert len(run.trainers("alder")) == 0
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), str(run.server / "adapters" / "last"))


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory, model: Path) -> tuple[Federation, float]:
    """One round; dawdle would train for an hour, alder is held to a few steps by its own limits."""
    folder = tmp_path_factory.mktemp("slow")
    sites = offers(folder, model, ["alder", "dawdle"])
    sites["alder"] = sites["alder"].model_copy(
        update={"limits": sites["alder"].limits.model_copy(update={"max_steps_per_round": 4})}
    )
    plan = PLAN | {"training": PLAN["training"] | {"local_steps": 10_000}, "negotiable": ["local_steps"]}
    run = Federation(FedPEFTRecipe("slow", num_rounds=1, deadline_s=30, **plan), sites, folder / "runs")
    with run.running():
        run.until(lambda: run.trainers("dawdle"), within_s=60)
        (trainer,) = run.trainers("dawdle")
        run.until(lambda: len(run.rounds()) == 1, within_s=150)
        took = run.until(lambda: not trainer.is_running() or trainer.status() == "zombie", within_s=20)
    return run, took


def test_a_round_ends_at_its_deadline_without_the_slow_site(slow: tuple[Federation, float]) -> None:
    run, _ = slow
    first = run.rounds()[0]
    assert run.error is None
    assert set(first["sites"]) == {"alder"}
    assert first["out"]["dawdle"]["kind"] == "silent"
    assert first["sites"]["alder"]["steps"] == 4


def test_a_trainer_that_is_told_to_stop_is_gone_within_a_step(slow: tuple[Federation, float]) -> None:
    """A step takes a tenth of a second here; NVFlare's part is half a second for the client to see it, and as much for
    the trainer to end its session."""
    run, took = slow
    assert took < 10
    assert "stopped while training, as told" in run.log("dawdle")


def test_a_site_that_missed_the_deadline_is_asked_again_and_answers(slow: tuple[Federation, float]) -> None:
    run, _ = slow
    assert "dawdle" in run.rounds()[1]["sites"]


def test_a_job_with_too_few_answers_stops_and_says_what_each_site_answered(tmp_path: Path, model: Path) -> None:
    sites = offers(tmp_path, model, ["alder", "birch"])
    recipe = FedPEFTRecipe("few", num_rounds=1, min_sites=2, sites={"alder": {}, "birch": {"rank": 65}}, **PLAN)
    run = Federation(recipe, sites, tmp_path / "runs").run()
    assert run.error is not None
    assert run.rounds()[0]["out"]["birch"]["kind"] == "refused"
    assert "1 of 2 sites gave a usable update and min_responses is 2. birch: refused" in run.log("server")
