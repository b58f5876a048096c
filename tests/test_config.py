"""Settings: an unread key is an error, and the error says which key and what is near."""

import pydantic
import pytest

from nvflare_fm.config import Aggregation, EvaluationSettings, RoundPlan, SiteOverrides, TrainingSettings
from nvflare_fm.errors import ConfigError
from nvflare_fm.site import peft_methods
from nvflare_fm.site.site_config import SiteConfig

ALL = [TrainingSettings, EvaluationSettings, RoundPlan, Aggregation, SiteOverrides, SiteConfig]


@pytest.mark.parametrize("settings", ALL)
def test_every_default_is_itself_valid_and_survives_a_round_trip(settings):
    default = settings()
    assert settings.read(default.model_dump(mode="json"), "plan") == default


@pytest.mark.parametrize("settings", ALL)
def test_an_unknown_key_is_refused_with_where_it_stood(settings):
    with pytest.raises(ConfigError, match=r"the plan: unknown setting 'no_such_key'; known: "):
        settings.read({"no_such_key": 1}, "the plan")


@pytest.mark.parametrize(
    ("settings", "values", "said"),
    [
        (RoundPlan, {"quantisation": "nf4"}, r"'quantisation'; did you mean \"quantization\"\?"),
        (RoundPlan, {"training": {"learningrate": 1}}, r"'training\.learningrate'; did you mean \"learning_rate\"\?"),
        (SiteConfig, {"models": {"base": {"pth": "x"}}}, r"'models\.base\.pth'; did you mean \"path\"\?"),
        (SiteConfig, {"limits": {"max_rnk": 2}}, r"'limits\.max_rnk'; did you mean \"max_rank\"\?"),
    ],
)
def test_a_misspelt_key_is_answered_with_the_nearest_of_its_own_group(settings, values, said):
    with pytest.raises(ConfigError, match=said):
        settings.read(values, "the plan")


@pytest.mark.parametrize(
    ("settings", "values", "said"),
    [
        (TrainingSettings, {"learning_rate": 0}, r"learning_rate: .*greater than 0.*got 0"),
        (TrainingSettings, {"learning_rate": float("nan")}, "learning_rate: .*finite"),
        (TrainingSettings, {"proximal_mu": -1}, "proximal_mu: "),
        (TrainingSettings, {"batch_size": 0}, "batch_size: "),
        (RoundPlan, {"training": {"local_steps": -1}}, r"training\.local_steps: "),
        (RoundPlan, {"quantization": "nf5"}, "quantization: .*'nf4'.*got 'nf5'"),
        (RoundPlan, {"max_length": 4}, "max_length: "),
        (Aggregation, {"sigma": "C"}, "sigma: "),
        (SiteOverrides, {"rank": 0}, "rank: "),
    ],
)
def test_a_value_out_of_range_is_refused_with_its_key_and_the_value(settings, values, said):
    with pytest.raises(ConfigError, match=said):
        settings.read(values, "the plan")


def test_several_mistakes_are_told_at_once():
    with pytest.raises(ConfigError, match=r"batch_size.*; learning_rate"):
        TrainingSettings.read({"learning_rate": -1, "batch_size": 0}, "the plan")


def test_a_missing_key_is_told_without_what_stands_beside_it():
    with pytest.raises(ConfigError, match=r"data\.notes\.train: ") as told:
        SiteConfig.read({"data": {"notes": {"validation": "/secret/place.jsonl"}}}, "fm_site.yaml")
    assert "/secret" not in told.value.message


def test_settings_are_frozen():
    with pytest.raises(pydantic.ValidationError):
        RoundPlan().seed = 3


def test_one_name_stands_for_a_list_of_one():
    assert Aggregation.read({"weigh": "uniform"}, "x").weigh == ("uniform",)
    assert RoundPlan.read({"labels": ["yes", "no"]}, "x").labels == ("yes", "no")


def test_overrides_change_what_they_name_and_nothing_else():
    plan = RoundPlan.read({"peft": {"method": "lora", "rank": 16, "lora_alpha": 32}, "seed": 7}, "x")
    assert SiteOverrides().applied(plan) == plan
    own = SiteOverrides(rank=4, batch_size=2, quantization="int8", data="letters").applied(plan)
    assert own.peft == {"method": "lora", "rank": 4, "lora_alpha": 16}
    assert own.training == plan.training.model_copy(update={"batch_size": 2})
    assert (own.quantization, own.data, own.model, own.seed) == ("int8", "letters", plan.model, 7)
    assert plan.peft["rank"] == 16


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("rank", [1, 4, 64])
def test_the_scale_of_a_site_of_another_rank_changes_with_the_root_of_it(use_rslora: bool, rank: int) -> None:
    peft = {"method": "lora", "rank": 16, "lora_alpha": 32, "use_rslora": use_rslora}
    own = SiteOverrides(rank=rank).applied(RoundPlan(peft=peft)).peft
    assert peft_methods.read(own).scale == pytest.approx(peft_methods.read(peft).scale * (16 / rank) ** 0.5)
    assert SiteOverrides(rank=rank, lora_alpha=3).applied(RoundPlan(peft=peft)).peft["lora_alpha"] == 3
    assert SiteOverrides(rank=rank).applied(RoundPlan(peft={"method": "ia3"})).peft == {"method": "ia3", "rank": rank}
