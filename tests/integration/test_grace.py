"""A round that has enough answers waits a while for the others and no longer; their work counts when it comes."""

import pytest

from nvflare_fm.flare.recipe import FedPEFTRecipe
from tests.site import tiny

from .federation import PLAN, Federation, offers

GRACE_S = 5.0


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Federation:
    """dawdle stands still from within the second round until three rounds are over."""
    folder = tmp_path_factory.mktemp("grace")
    plan = PLAN | {"training": PLAN["training"] | {"local_steps": 20}}
    sites = offers(folder, tiny.save(folder / "model"), ["alder", "dawdle"])
    late = {"weigh": ["staleness"], "max_staleness": 6, "grace_s": GRACE_S}
    run = Federation(FedPEFTRecipe("grace", num_rounds=7, key_metric="", **late, **plan), sites, folder / "runs")
    with run.running():
        run.until(lambda: len(run.rounds()) == 1, within_s=150)
        (trainer,) = run.trainers("dawdle")
        trainer.suspend()
        run.until(lambda: len(run.rounds()) == 3, within_s=60)
        trainer.resume()
    return run


def test_who_answers_within_the_grace_time_counts_and_who_does_not_trains_on(federation: Federation) -> None:
    assert federation.error is None
    _, second, third, *_ = federation.rounds()
    for line in (second, third):
        assert set(line["sites"]) == {"alder"}
        assert {site: why["kind"] for site, why in line["out"].items()} == {"dawdle": "late"}


def test_the_round_waits_for_the_whole_grace_time_and_not_much_longer(federation: Federation) -> None:
    log = federation.log("server").splitlines()
    (first,) = [line for line in log if "round 1: alder answered" in line]
    (end,) = [line for line in log if "round 1: weights alder" in line]
    assert GRACE_S <= seconds(end) - seconds(first) < GRACE_S + 8


def test_nobody_waits_for_who_was_not_asked(federation: Federation) -> None:
    third = federation.rounds()[2]
    assert third["asked"] == ["alder"]
    assert third["seconds"] < GRACE_S


def test_a_late_answer_counts_once_by_its_age_and_its_site_is_asked_again(federation: Federation) -> None:
    ages = {
        line["round"]: line["sites"]["dawdle"]["staleness"] for line in federation.rounds() if "dawdle" in line["sites"]
    }
    (came,) = [number for number, age in ages.items() if age]
    assert ages[came] == came - 1
    assert federation.rounds()[came]["sites"]["dawdle"]["weight"] == pytest.approx(came**-0.5 / (1 + came**-0.5))
    assert ages[came + 1] == 0


def seconds(line: str) -> float:
    """The time of day that a line of the log bears."""
    hours, minutes, rest = line.split()[1].split(":")
    return int(hours) * 3600 + int(minutes) * 60 + float(rest.replace(",", "."))
