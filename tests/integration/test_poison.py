"""A site sends poison for three rounds: it is named with the reason, and the result is as good as without it."""

import os
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from nvflare_fm.cli import app
from nvflare_fm.config import Aggregation, RoundPlan
from nvflare_fm.flare.recipe import FedPEFTRecipe
from nvflare_fm.simulate import federate
from nvflare_fm.site.worker import Worker
from tests.site import tiny

from .federation import PLAN, Federation, offers

HONEST, ROUNDS = ["alder", "birch", "cedar", "drift"], 4


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_who_sends_poison_is_named_and_the_result_is_as_good_as_without_it(tmp_path: Path) -> None:
    sites = offers(tmp_path, tiny.save(tmp_path / "model"), [*HONEST, "mallory"])
    recipe = FedPEFTRecipe("poisoned", num_rounds=ROUNDS, min_sites=4, **PLAN)
    run, here = Federation(recipe, sites, tmp_path / "runs"), Path(__file__).parent
    with pytest.MonkeyPatch.context() as patch:
        given = os.environ.get("PYTHONPATH", "")
        patch.setenv("PYTHONPATH", os.pathsep.join([str(here / "poison"), str(here.parents[1]), given]))
        run.run()
    assert run.error is None
    poisoned = run.rounds()[:3]
    assert [line["out"].get("mallory", {}).get("kind") for line in poisoned] == ["guard"] * 3
    assert not any({*HONEST} <= line["out"].keys() for line in poisoned)
    told = CliRunner().invoke(app, ["explain", str(run.root)]).stdout
    assert re.search(r"^mallory: counted in [01] of \d rounds\n  rounds? 0", told, re.MULTILINE), told
    workers = {name: Worker(name, sites[name]) for name in HONEST}
    plan = RoundPlan.read(PLAN, "test")
    *_, last = federate(workers, plan, Aggregation(guard=()), ROUNDS + 1)  # the last one measures
    alone = sum(report.before["loss"] for report in last.reports.values()) / len(HONEST)
    together = sum(run.rounds()[-1]["sites"][name]["before"]["loss"] for name in HONEST) / len(HONEST)
    assert together < alone + 0.1
