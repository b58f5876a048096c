"""What the operating system does to one federation: a trainer is killed, one stands still, in the end too few work."""

import re
from pathlib import Path
from typing import Any

import psutil
import pytest

from nvflare_fm.export import folder as export
from nvflare_fm.flare.recipe import FedPEFTRecipe
from tests.site import tiny

from .federation import PLAN, Federation, kill, offers

GRACE_S = 4.0
STALENESS = 2
STEPS = 60  # of those who are interrupted: their rounds last for many times as long as
AT_WORK_S = 0.1  # of processor time after which a trainer is in the midst of a round


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Federation:
    """Rounds that two of three sites can carry on.

    In round 1 the trainer of cedar is killed. dawdle's stands still in round 2 until round 3 is over, and in a later
    one until its answer would no longer count. In the end whatever trains for cedar and dawdle is killed.
    """
    folder = tmp_path_factory.mktemp("interrupted")
    sites = offers(folder, tiny.save(folder / "model"), ["alder", "cedar", "dawdle"])
    settings: dict[str, Any] = {"min_sites": 2, "grace_s": GRACE_S, "max_staleness": STALENESS, "weigh": ["staleness"]}
    steps = {"alder": {}, "cedar": {"local_steps": STEPS}, "dawdle": {"local_steps": STEPS}}
    recipe = FedPEFTRecipe("interrupted", num_rounds=100, keep_rounds=True, sites=steps, **settings, **PLAN)
    run = Federation(recipe, sites, folder / "runs")

    def over(number: int) -> bool:
        return len(run.rounds()) > number

    def at_work(site: str, number: int) -> psutil.Process:
        """The trainer of a site as it trains in round `number`, which is the next."""
        tasks = sum(site in line["asked"] for line in run.rounds()[:number]) + 1
        run.until(lambda: run.log(site).count("waiting for result from external trainer") >= tasks, within_s=60)
        (trainer,) = run.trainers(site)
        before = _worked_s(trainer)
        run.until(lambda: _worked_s(trainer) > before + AT_WORK_S, within_s=60)
        return trainer

    def in_time(after: int) -> bool:
        """Whether an answer of dawdle to the very round has counted in a round after this one."""
        answers = [line["sites"].get("dawdle", {}) for line in run.rounds()[after + 1 :]]
        return any(answer.get("staleness") == 0 for answer in answers)

    with run.running():
        run.until(lambda: over(0), within_s=150)
        kill(at_work("cedar", 1))
        run.until(lambda: over(1), within_s=60)
        slow = at_work("dawdle", 2)
        slow.suspend()
        run.until(lambda: over(3), within_s=90)
        slow.resume()
        run.until(lambda: in_time(after=3), within_s=90)
        number = len(run.rounds())
        slow = at_work("dawdle", number)
        slow.suspend()
        run.until(lambda: over(number + STALENESS), within_s=90)
        slow.resume()
        run.until(lambda: "dawdle" in run.rounds()[-1]["asked"], within_s=90)
        run.until(lambda: run.error or _killed(*run.trainers("cedar"), *run.trainers("dawdle")), within_s=90)
    return run


def _worked_s(trainer: psutil.Process) -> float:
    used = trainer.cpu_times()
    return float(used.user + used.system)


def _killed(*trainers: psutil.Process) -> None:
    for trainer in trainers:
        kill(trainer)


def test_the_federation_goes_on_without_a_killed_trainer(federation: Federation) -> None:
    second = federation.rounds()[1]
    assert set(second["sites"]) == {"alder", "dawdle"}
    assert second["out"]["cedar"]["kind"] == "stopped"


def test_a_site_whose_trainer_was_killed_is_back_in_the_next_round(federation: Federation) -> None:
    assert {"alder", "cedar"} <= set(federation.rounds()[2]["sites"])


def test_who_answers_within_the_grace_time_counts_and_who_does_not_trains_on(federation: Federation) -> None:
    _, _, second, third, *_ = federation.rounds()
    for line in (second, third):
        assert set(line["sites"]) == {"alder", "cedar"}
        assert set(line["out"]) == {"dawdle"}
        assert line["out"]["dawdle"]["kind"] == "late"


def test_the_round_waits_for_the_whole_grace_time(federation: Federation) -> None:
    """And no longer: it is over while dawdle still stands still."""
    assert federation.rounds()[2]["seconds"] >= GRACE_S


def test_nobody_waits_for_who_was_not_asked(federation: Federation) -> None:
    third = federation.rounds()[3]
    assert third["asked"] == ["alder", "cedar"]
    assert third["seconds"] - max(site["seconds"] for site in third["sites"].values()) < GRACE_S


def test_a_late_answer_counts_once_by_its_age_and_its_site_is_asked_again(federation: Federation) -> None:
    ages = {r["round"]: r["sites"]["dawdle"]["staleness"] for r in federation.rounds() if "dawdle" in r["sites"]}
    (came,) = [number for number, age in ages.items() if age]
    assert ages[came] == came - 2
    fresh = len(federation.rounds()[came]["sites"]) - 1
    weight = (1 + ages[came]) ** -0.5
    assert federation.rounds()[came]["sites"]["dawdle"]["weight"] == pytest.approx(weight / (fresh + weight))
    assert ages[came + 1] == 0


def test_who_is_too_late_to_count_is_told_to_stop_does_and_is_asked_again(federation: Federation) -> None:
    assert "[stopped]" in federation.log("dawdle")
    *_, called_off, again = (line["round"] for line in federation.rounds() if "dawdle" in line["asked"])
    assert again - called_off == STALENESS + 1
    assert not any("dawdle" in line["sites"] for line in federation.rounds()[called_off:again])


def test_a_job_with_too_few_answers_stops_and_says_what_each_site_answered(federation: Federation) -> None:
    last = federation.rounds()[-1]
    assert last["out"]["cedar"]["kind"] == "stopped"
    said = rf"round {last['round']}: 1 of \d sites gave a usable update and min_responses is 2\. cedar: stopped"
    assert re.search(said, federation.log("server"))
    assert federation.error is not None


def test_no_trainer_outlives_its_job(federation: Federation) -> None:
    assert not [trainer for site in ("alder", "cedar", "dawdle") for trainer in federation.trainers(site)]


def test_the_rounds_before_are_kept(federation: Federation) -> None:
    done = len(federation.rounds()) - 1
    assert export.read_adapter(federation.server / "adapters" / "last").round == done - 1
    assert len(list(Path(federation.server / "adapters").glob("round-*"))) == done
