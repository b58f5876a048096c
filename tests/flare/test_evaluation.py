"""An evaluation asks for what the adapter was trained with, but for what the job says, and trains nothing."""

from pathlib import Path

from nvflare_fm.config import TaskPlan
from nvflare_fm.errors import ConfigError, ModelError
from nvflare_fm.flare.locator import AdapterLocator, Measurement
from nvflare_fm.flare.recipe import EvaluateAdapterRecipe
from nvflare_fm.site.offer.policy import fit
from nvflare_fm.site.offer.site_config import Limits, SiteConfig
from tests.codes import refused

TRAINED = TaskPlan.read(
    {
        "task": "sequence_classification",
        "labels": ["a", "b"],
        "data": "notes",
        "max_length": 99,
        "peft": {"method": "lora", "rank": 16},
        "training": {"local_steps": 400, "batch_size": 64},
    },
    "test",
)


def test_what_is_not_said_is_as_it_was_in_training() -> None:
    asked = Measurement.read({"data": "letters", "max_examples": 5}, "test").applied(TRAINED)
    assert (asked.task, asked.labels, asked.max_length, asked.peft) == (
        TRAINED.task,
        TRAINED.labels,
        TRAINED.max_length,
        TRAINED.peft,
    )
    assert (asked.data, asked.evaluation.max_examples, asked.template) == ("letters", 5, "")


def test_a_site_that_may_train_little_may_still_measure() -> None:
    limits = Limits(max_rank=4, max_batch_size=2, max_steps_per_round=10)
    models, data = {"base": {"path": "model"}}, {"notes": {"train": "rows.jsonl"}}
    site = SiteConfig.read({"models": models, "data": data, "limits": limits.model_dump()}, "test")
    assert len(fit(TRAINED, site).refused) == 3
    decision = fit(Measurement().applied(TRAINED), site, trains=False)
    assert (decision.refused, decision.lowered) == ((), ("rank to 4",))


def test_an_adapter_that_does_not_say_how_it_was_trained_is_refused() -> None:
    with refused("adapter_without_plan", ConfigError):
        Measurement().applied(None)


def test_a_setting_nobody_knows_or_an_adapter_that_is_none_is_refused_while_the_job_is_made(tmp_path: Path) -> None:
    with refused("wrong_setting", ConfigError, '"max_length"'):
        AdapterLocator(measurement={"max_lenght": 8})
    with refused("wrong_setting", ConfigError, "oak", "rnk"):
        EvaluateAdapterRecipe("job", tmp_path, sites={"oak": {"rnk": 2}})
    with refused("adapter_unreadable", ModelError):
        EvaluateAdapterRecipe("job", tmp_path)
