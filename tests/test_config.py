"""Settings: an unread key is an error, and the error says which key and what is near."""

from collections.abc import Iterator
from functools import cache
from importlib import import_module
from inspect import signature
from typing import Any, get_args

import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nvflare_fm import transforms
from nvflare_fm.aggregation import merge, step, weigh
from nvflare_fm.aggregation.asked import settings_of
from nvflare_fm.config import (
    Aggregation,
    EvaluationSettings,
    RoundPlan,
    RoundSettings,
    Settings,
    SiteOverrides,
    TrainingSettings,
    VoteSettings,
    summary,
)
from nvflare_fm.errors import ConfigError
from nvflare_fm.export.folder import ProvenanceFile
from nvflare_fm.flare import components
from nvflare_fm.flare.arguments import Arguments
from nvflare_fm.flare.locator import Measurement
from nvflare_fm.job import peft as peft_methods
from nvflare_fm.site.offer.site_config import SiteConfig
from nvflare_fm.transforms import Encryption, Transform
from nvflare_fm.transforms.compression import Compression
from tests.codes import refused

ALL = [TrainingSettings, EvaluationSettings, RoundPlan, RoundSettings, Aggregation, SiteOverrides, SiteConfig]
GROUPS: dict[str, type[Settings]] = {
    **{g.__name__: g for g in (RoundPlan, RoundSettings, VoteSettings, Aggregation, SiteOverrides)},
    **{g.__name__: g for g in (SiteConfig, Measurement, ProvenanceFile)},
    **{name: peft_methods.registry[name] for name in peft_methods.registry},
    **{f"merge {name}": settings_of(merge.registry[name].merge) for name in merge.registry},
    **{f"weight {name}": settings_of(weigh.registry[name]) for name in weigh.registry},
    **{f"step {name}": settings_of(step.registry[name]) for name in step.registry},
    **{f"transform {name}": transforms.registry[name] for name in transforms.registry},
}
METHODS = tuple(peft_methods.registry)
MARK = "x0hidden0x"


@cache
def leaves(group: type[Settings]) -> list[tuple[str, dict[str, Any]]]:
    """Every place of a group that holds a number, a text or a collection, as JSON Schema describes it."""
    schema = group.model_json_schema()

    def inside(place: str, part: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
        part = schema["$defs"][part["$ref"].rpartition("/")[2]] if "$ref" in part else part
        for choice in part.get("anyOf", []):
            yield from inside(place, choice)
        if "type" in part:
            yield place, part
        for name, each in part.get("properties", {}).items():
            yield from inside(f"{place}.{name}", each)
        if isinstance(items := part.get("items"), dict):
            yield from inside(f"{place}[]", items)
        if isinstance(values := part.get("additionalProperties"), dict):
            yield from inside(f"{place}.*", values)
            yield f"{place} keys", {"type": "string", **part.get("propertyNames", {})}

    return list(inside("", schema))


@pytest.mark.parametrize("name", GROUPS)
def test_every_setting_says_what_it_is_and_what_its_unit_is_in_a_line_of_a_template(name):
    """What a description says first stands beside the setting in a template; the reference has all of it."""
    for setting, field in GROUPS[name].model_fields.items():
        if name != "ProvenanceFile":  # written by us, read by us
            assert field.description, setting
            assert " " in field.description, setting
        if name in ("RoundPlan", "RoundSettings", "VoteSettings", "Aggregation", "SiteOverrides", *METHODS):
            assert len(summary(field)) <= 100, setting


def bounded(part: dict[str, Any]) -> bool:
    lower, upper = {"minimum", "exclusiveMinimum"} & {*part}, {"maximum", "exclusiveMaximum"} & {*part}
    return {
        "integer": bool(lower and upper),
        "number": bool(lower and upper),
        "string": bool({"maxLength", "enum", "const"} & {*part}),
        "array": "maxItems" in part,
        "object": "properties" in part or "maxProperties" in part,
    }.get(part["type"], part["type"] in ("boolean", "null"))


@pytest.mark.parametrize("name", GROUPS)
def test_every_number_text_and_collection_has_a_bound(name):
    unbounded = [place for place, part in leaves(GROUPS[name]) if not bounded(part)]
    assert not unbounded


def test_no_group_of_settings_is_left_out_of_that_law():
    def under(kind: type[Settings]) -> set[type[Settings]]:
        return {kind}.union(*map(under, kind.__subclasses__()))

    def within(kind: Any) -> set[Any]:
        parts = [f.annotation for f in kind.model_fields.values()] if kind in ours else get_args(kind)
        return {kind}.union(*map(within, parts))

    ours = {kind for kind in under(Settings) if kind.__module__.startswith("nvflare_fm.")}
    # no job names a peer; the canaries' record and files of candidates are fuzzed
    elsewhere = "nvflare_fm.compare.", "nvflare_fm.site.audit.", "nvflare_fm.synthesis."
    ours = {kind for kind in ours if not kind.__module__.startswith(elsewhere)}
    held = set().union(*map(within, GROUPS.values()))
    of_rules = {kind for kind in ours if kind.__name__ == "settings"}  # made anew whenever a rule is asked for
    arguments = {kind for kind in ours if issubclass(kind, Arguments)}
    assert ours - of_rules - held - arguments == {Settings, peft_methods.PeftMethod, Transform, Compression, Encryption}


@pytest.mark.parametrize("name", components.OURS)
def test_every_argument_of_a_component_has_a_type_and_every_number_bounds(name):
    module = import_module(name.rpartition(".")[0])
    kind = getattr(module, "_Arguments", None)
    fields = kind.model_fields if kind else {}
    for argument, field in fields.items():
        if field.annotation in (int, float):
            limits = {type(each).__name__.lower() for each in field.metadata}
            assert limits & {"ge", "gt"}, argument
            assert limits & {"le", "lt"}, argument
    taken = set(signature(components.load(name)).parameters)
    settings = {*Aggregation.model_fields, *SiteOverrides.model_fields}
    assert taken <= {*fields} | settings


@pytest.mark.parametrize("name", GROUPS)
@given(data=st.data())
def test_no_number_beyond_its_bounds_and_nothing_of_another_type_is_taken(name, data):
    numbers = [(p, part) for p, part in leaves(GROUPS[name]) if part["type"] in ("integer", "number") and "*" not in p]
    if not numbers:
        return
    place, part = data.draw(st.sampled_from(numbers))
    most = part.get("maximum", part.get("exclusiveMaximum"))
    least = part.get("minimum", part.get("exclusiveMinimum"))
    beyond = st.one_of(
        st.integers(min_value=int(most) + 1),
        st.integers(max_value=int(least) - 1),
        st.sampled_from(
            [10**300, -(10**300), float("nan"), float("inf"), -float("inf"), True, "1", "9" * 5000, [1], {}]
        ),
    )
    value = data.draw(beyond)
    values: Any = value
    for key in reversed(place.split(".")[1:]):
        values = {key: values}
    with pytest.raises(ConfigError) as refused:
        GROUPS[name].read(values, "test")
    assert refused.value.code == "wrong_setting"
    assert len(str(refused.value)) < 5000


json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=8,
)


@pytest.mark.parametrize("name", GROUPS)
@given(data=st.data())
def test_whatever_a_setting_is_given_is_taken_or_refused_in_words(name, data):
    names = st.sampled_from([*GROUPS[name].model_fields, "no_such_setting"])
    values = data.draw(st.dictionaries(names, json, max_size=4) | json)
    assert refusal(name, values) in (None, "wrong_setting")


@pytest.mark.parametrize("name", GROUPS)
def test_no_message_repeats_what_a_setting_was_given(name):
    for given_value in (MARK * 30, [MARK * 30], {MARK: MARK}, {"rule": f"{MARK} {MARK}"}, [{MARK: [MARK]}]):
        for key in GROUPS[name].model_fields:
            assert MARK not in refusal(name, {key: given_value}, whole=True)
    with refused("wrong_setting", ConfigError, MARK) as told:  # the local log has it
        GROUPS[name].read({MARK: 1}, "test")
    assert MARK not in told.value.message


def refusal(name: str, values: Any, whole: bool = False) -> str | None:
    """The code, or the whole message, of the error that `values` are; nothing where they are taken."""
    try:
        GROUPS[name].read(values, "test")
    except ConfigError as error:
        return error.message if whole else error.code
    return "" if whole else None


@pytest.mark.parametrize("settings", ALL)
def test_every_default_is_itself_valid_and_survives_a_round_trip(settings):
    default = settings()
    assert settings.read(default.model_dump(mode="json", exclude_none=True), "plan") == default


@pytest.mark.parametrize("settings", ALL)
def test_an_unknown_key_is_refused_with_where_it_stood(settings):
    with refused("wrong_setting", ConfigError, "the plan", "no_such_key"):
        settings.read({"no_such_key": 1}, "the plan")


@pytest.mark.parametrize(
    ("settings", "values", "named"),
    [
        (RoundPlan, {"quantisation": "nf4"}, ['"quantization"', "quantisation"]),
        (RoundPlan, {"training": {"learningrate": 1}}, ["in training", '"learning_rate"']),
        (SiteConfig, {"models": {"base": {"pth": "x"}}}, ["in models.*", '"path"', "models.base.pth"]),
        (SiteConfig, {"limits": {"max_rnk": 2}}, ["in limits", '"max_rank"']),
    ],
)
def test_a_misspelt_key_is_answered_with_the_nearest_of_its_own_group(settings, values, named):
    with refused("wrong_setting", ConfigError, *named):
        settings.read(values, "the plan")


@pytest.mark.parametrize(
    ("settings", "values", "key", "found"),
    [
        (TrainingSettings, {"learning_rate": 0}, "learning_rate", "0"),
        (TrainingSettings, {"learning_rate": float("nan")}, "learning_rate", "nan"),
        (TrainingSettings, {"proximal_mu": -1}, "proximal_mu", "-1"),
        (TrainingSettings, {"batch_size": 0}, "batch_size", "0"),
        (RoundPlan, {"training": {"local_steps": -1}}, "training.local_steps", "-1"),
        (RoundPlan, {"quantization": "nf5"}, "quantization", "'nf5'"),
        (RoundPlan, {"max_length": 4}, "max_length", "4"),
        (Aggregation, {"sigma": "C"}, "sigma", "'C'"),
        (SiteOverrides, {"rank": 0}, "rank", "0"),
    ],
)
def test_a_value_out_of_range_is_refused_with_its_key_and_the_value(settings, values, key, found):
    with refused("wrong_setting", ConfigError, f"{key}: ", f"{key} = {found}"):
        settings.read(values, "the plan")


def test_several_mistakes_are_told_at_once():
    with refused("wrong_setting", ConfigError, "batch_size", "learning_rate"):
        TrainingSettings.read({"learning_rate": -1, "batch_size": 0}, "the plan")


def test_a_missing_key_is_told_without_what_stands_beside_it():
    with refused("wrong_setting", ConfigError, "data.*.train", "data.notes.train") as told:
        SiteConfig.read({"data": {"notes": {"validation": "/secret/place.jsonl"}}}, "fm_site.yaml")
    assert "/secret" not in str(told.value)


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
