"""A round that has enough answers waits a while for the others, and no longer."""

import pytest

from nvflare_fm.flare.recipe import FedPEFTRecipe
from tests.site import tiny

from .federation import PLAN, Federation, offers

GRACE_S = 8.0


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Federation:
    """One round without a deadline; dawdle would train for hours, alder and birch are held to a few steps."""
    folder = tmp_path_factory.mktemp("grace")
    sites = offers(folder, tiny.save(folder / "model"), ["alder", "birch", "dawdle"])
    for name in ("alder", "birch"):
        limits = sites[name].limits.model_copy(update={"max_steps_per_round": 4})
        sites[name] = sites[name].model_copy(update={"limits": limits})
    plan = PLAN | {"training": PLAN["training"] | {"local_steps": 100_000}, "negotiable": ["local_steps"]}
    recipe = FedPEFTRecipe("grace", num_rounds=1, min_sites=1, grace_s=GRACE_S, key_metric="", **plan)
    return Federation(recipe, sites, folder / "runs").run()


def test_who_answers_within_the_grace_time_counts_and_who_does_not_is_left_behind(federation: Federation) -> None:
    assert federation.error is None
    (only,) = federation.rounds()
    assert set(only["sites"]) == {"alder", "birch"}
    assert only["out"] == {"dawdle": "silent: no answer before the round ended"}


def test_the_round_waits_for_the_whole_grace_time_and_not_much_longer(federation: Federation) -> None:
    (only,) = federation.rounds()
    log = federation.log("server").splitlines()
    (first,) = [line for line in log if "answered, 1 of 3" in line]
    (end,) = [line for line in log if "round 0: weights alder" in line]
    assert GRACE_S <= seconds(end) - seconds(first) < GRACE_S + 8
    assert only["seconds"] > GRACE_S


def seconds(line: str) -> float:
    """The time of day that a line of the log bears."""
    hours, minutes, rest = line.split()[1].split(":")
    return int(hours) * 3600 + int(minutes) * 60 + float(rest.replace(",", "."))
