"""A site's word on a job: accepted, lowered where the plan says so, refused otherwise, always with the reason."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nvflare_fm.adapter import RoundTask
from nvflare_fm.config import Aggregation, EvaluationSettings, TaskPlan, TrainingSettings
from nvflare_fm.errors import ConfigError, PolicyError
from nvflare_fm.job import peft as peft_methods
from nvflare_fm.job.cost import AdapterShape, BaseShape
from nvflare_fm.job.settle import settle
from nvflare_fm.privacy.egress import NO_METRICS
from nvflare_fm.site.offer.policy import BOUNDS, Submitter, accept, check_shapes, decide, fit
from nvflare_fm.site.offer.site_config import FILE_NAME, SiteConfig, held_in, load_site
from nvflare_fm.site.worker import Worker
from tests.codes import refused
from tests.site import tiny

OFFER = {
    "models": {"base": {"path": "m"}},
    "data": {"notes": {"train": "notes.jsonl"}},
    "welcome": {"submitters": "*"},
}
WHO = Submitter("lead@clinic.org", "clinic")


def site(**more: Any) -> SiteConfig:
    return SiteConfig.read(OFFER | more, FILE_NAME)


def plan(**more: Any) -> TaskPlan:
    return TaskPlan.read(more, "plan")


def refusal(asked: TaskPlan, config: SiteConfig, who: Submitter = WHO, **more: Any) -> str:
    with pytest.raises(PolicyError) as refused:
        accept(decide(asked, config, who, **more))
    return refused.value.message


def codes(asked: TaskPlan, config: SiteConfig, who: Submitter = WHO, **more: Any) -> list[str]:
    return [reason.code for reason in decide(asked, config, who, **more).refused]


def hired(folder: Path, **more: Any) -> Worker:
    """A worker of a site with a tiny model and these settings."""
    rows = tiny.jsonl(folder / "rows.jsonl", tiny.rows("causal_lm"))
    return Worker("site-1", tiny.site(tiny.save(folder / "m"), rows, **more))


def test_a_job_within_the_limits_is_accepted_as_it_is():
    decision = decide(plan(peft={"method": "lora", "rank": 4}), site(), WHO)
    assert str(decision) == "accepted"
    assert decision.plan.peft["rank"] == 4


@pytest.mark.parametrize("kind", ["model", "data"])
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("/srv/models/llama", "a path"),
        ("models/llama/weights", "a path"),
        ("~/llama", "a path"),
        ("notes.jsonl", "a path"),
        ("C:\\models\\llama", "a path"),
        ("meta-llama/Llama-3-8B", "a hub id"),
        ("../other", "a way out of a folder"),
        ("notes/../../other", "a way out of a folder"),
        ("..", "a way out of a folder"),
        ("https://example.org/model", "a URL"),
        ("file:///etc/passwd", "a URL"),
        ("os.system", "a class path"),
        ("package.module:function", "a class path"),
        ("__import__('os')", "code"),
        ("${secret:TOKEN}", "code"),
        ("", "code or not a name"),
    ],
)
def test_what_is_no_alias_is_refused_by_what_it_is(kind: str, name: str, said: str):
    message = refusal(plan(**{kind: name}), site())
    assert message.startswith(f"{kind} is {said}")
    assert codes(plan(**{kind: name}), site()) == ["not_an_alias"]
    assert len(name) < 3 or name not in message


@given(name=st.text(max_size=80))
def test_no_name_but_an_offered_alias_is_ever_accepted(name: str):
    decision = decide(plan(data=name), site(), WHO)
    assert bool(decision.refused) == (name != "notes")


def test_an_unknown_alias_is_answered_with_the_nearest():
    assert 'no data set of that name; did you mean "notes"?' in refusal(plan(data="note"), site())


@pytest.mark.parametrize(
    ("asked", "limits", "lowered"),
    [
        ({"peft": {"method": "lora", "rank": 16}}, {"max_rank": 8}, "rank to 8"),
        ({"training": {"local_steps": 50}}, {"max_steps_per_round": 20}, "local_steps to 20"),
        ({"training": {"batch_size": 12}}, {"max_batch_size": 5}, "batch_size to 4"),
    ],
)
def test_a_site_lowers_what_is_negotiable_and_refuses_it_otherwise(asked: Any, limits: Any, lowered: str):
    config, setting = site(limits=limits), lowered.split()[0]
    assert f"ask for less, or list {setting} as negotiable" in refusal(plan(**asked), config)
    assert codes(plan(**asked), config) == ["above_limit"]
    decision = decide(plan(**asked, negotiable=[setting]), config, WHO)
    assert str(decision) == f"lowered: {lowered}"
    assert decide(decision.plan, config, WHO).lowered == ()


SIZES = st.integers(1, 12)


@given(
    training=st.fixed_dictionaries({"batch_size": SIZES, "gradient_accumulation_steps": SIZES, "local_steps": SIZES}),
    peft=st.fixed_dictionaries({"method": st.just("lora"), "rank": SIZES, "use_rslora": st.booleans()}),
    limits=st.fixed_dictionaries(
        {"max_rank": SIZES, "max_batch_size": SIZES, "max_steps_per_round": SIZES, "max_rows_per_step": SIZES}
    ),
    negotiable=st.lists(st.sampled_from(["rank", "batch_size", "local_steps"]), unique=True),
    trains=st.booleans(),
)
def test_a_plan_that_was_fitted_to_a_site_is_left_as_it_is(training, peft, limits, negotiable, trains):
    asked, config = plan(training=training, peft=peft, negotiable=negotiable), site(limits=limits)
    once = fit(asked, config, trains=trains)
    again = fit(TaskPlan.read(once.plan.model_dump(mode="json"), "the site's gate"), config, trains=trains)
    assert (again.plan, again.lowered) == (once.plan, ())
    assert [reason.message for reason in again.refused] == [reason.message for reason in once.refused]


@given(asked=st.integers(1, 64), most=st.integers(1, 64), accumulation=st.integers(1, 4))
def test_a_lower_batch_still_sees_as_many_examples_a_step(asked: int, most: int, accumulation: int):
    training = {"batch_size": asked, "gradient_accumulation_steps": accumulation}
    given_plan = fit(plan(training=training, negotiable="batch_size"), site(limits={"max_batch_size": most})).plan
    settings = given_plan.training
    assert settings.batch_size <= most
    assert settings.batch_size * settings.gradient_accumulation_steps == asked * accumulation


def test_the_default_rank_of_a_method_counts_too():
    assert "peft.rank is more than the 2" in refusal(plan(peft={"method": "lora"}), site(limits={"max_rank": 2}))


def test_every_reason_is_named_at_once():
    asked = plan(model="other", quantization="fp16", peft={"method": "lora", "rank": 99})
    config = site(limits={"quantizations": ["nf4"], "max_rank": 8})
    assert codes(asked, config) == ["above_limit", "not_offered", "not_offered"]
    message = refusal(asked, config)
    assert all(part in message for part in ("no model of that name", "is not among ['nf4']", "peft.rank is more than"))


def test_a_models_own_quantizations_win_over_the_limits():
    models = {"base": {"path": "m", "quantizations": ["nf4", "int8"]}}
    assert "quantization is not among ['nf4', 'int8']" in refusal(plan(quantization="bf16"), site(models=models))
    config = site(models=models, limits={"quantizations": ["bf16"]})
    assert str(decide(plan(quantization="int8"), config, WHO)) == "accepted"


def test_where_only_pinned_models_are_used_an_unpinned_one_is_refused():
    assert codes(plan(), site(limits={"pinned_only": True})) == ["not_pinned"]
    pinned = site(limits={"pinned_only": True}, models={"base": {"path": "m", "fingerprint": "abc"}})
    assert str(decide(plan(), pinned, WHO)) == "accepted"


@pytest.mark.parametrize(
    ("welcome", "said"),
    [
        ({"submitters": ["head@clinic.org"]}, "the job's submitter"),
        ({"orgs": "company"}, "the submitter's organisation"),
        ({"orgs": "*", "templates": ["lora_text_classification"]}, "the job's template"),
        ({"submitters": "*", "tasks": []}, "the job's task"),
        ({"submitters": [], "orgs": "*"}, "the job's submitter"),
        ({"submitters": "*", "orgs": None}, "the submitter's organisation"),
        ({}, "works for nobody yet"),
        ({"tasks": ["causal_lm"]}, "works for nobody yet"),
    ],
)
def test_only_whom_and_what_the_site_welcomes_is_accepted(welcome: Any, said: str):
    asked = plan(template="lora_instruction_tuning")
    assert said in refusal(asked, site(welcome=welcome))
    assert set(codes(asked, site(welcome=welcome))) == {"not_welcome"}
    everyone = {"submitters": WHO.name, "orgs": WHO.org, "templates": asked.template, "tasks": asked.task}
    assert str(decide(asked, site(welcome=everyone), WHO)) == "accepted"


@pytest.mark.parametrize("who", [WHO, Submitter(), Submitter("stranger@elsewhere", "elsewhere")])
def test_anyone_is_welcome_only_where_the_site_says_so(who: Submitter):
    for anyone in ({"submitters": "*"}, {"orgs": ["*"]}, {"submitters": "*", "orgs": "*", "tasks": "*"}):
        assert str(decide(plan(), site(welcome=anyone), who)) == "accepted"
    assert codes(plan(), site(welcome={}), who) == ["not_welcome"]


listed = st.sampled_from([None, [], ["*"], [WHO.name], [WHO.org], ["other"]])


@given(welcome=st.dictionaries(st.sampled_from(["submitters", "orgs", "templates", "tasks"]), listed))
def test_who_is_welcome_in_words_is_who_is_let_in(welcome: dict[str, Any]):
    config = site(welcome=welcome)
    accepted = [
        not decide(plan(template=template), config, Submitter(name, org)).refused
        for name in (WHO.name, "x")
        for org in (WHO.org, "x")
        for template in ("other", "x")
    ]
    assert config.welcome.nobody <= (not any(accepted))
    assert ("nobody" in str(config.welcome)) == config.welcome.nobody
    if all(accepted):
        assert str(config.welcome) == "anyone"


def test_a_submitter_nobody_vouches_for_is_refused_where_the_site_names_its_own():
    assert codes(plan(), site(welcome={"submitters": ["lead@clinic.org"]}), Submitter()) == ["not_welcome"]


@pytest.mark.parametrize(
    ("asked", "limits"),
    [
        ({"peft": {"method": "lora", "rank": 9}}, {"max_rank": 8}),
        ({"peft": {"method": "vera", "r": 9}}, {"max_vera_rank": 8}),
        ({"peft": {"method": "prefix_tuning", "num_virtual_tokens": 9}}, {"max_virtual_tokens": 8}),
        ({"peft": {"method": "prompt_tuning", "num_virtual_tokens": 9}}, {"max_virtual_tokens": 8}),
        ({"labels": ["a", "b", "c"]}, {"max_labels": 2}),
        ({"max_length": 9}, {"max_length": 8}),
        ({"training": {"batch_size": 9}}, {"max_batch_size": 8, "max_rows_per_step": 100}),
        ({"training": {"batch_size": 3, "gradient_accumulation_steps": 3}}, {"max_rows_per_step": 8}),
        ({"training": {"local_steps": 9}}, {"max_steps_per_round": 8}),
    ],
)
def test_each_limit_refuses_what_is_above_it_and_takes_what_is_not(asked: Any, limits: Any):
    most = {name: value + 1 for name, value in limits.items()}
    assert codes(plan(**asked), site(limits=limits)) == ["above_limit"]
    assert codes(plan(**asked), site(limits=most)) == []


def test_measuring_in_smaller_batches_gives_the_same_so_a_site_may_always_do_so():
    decision = fit(plan(evaluation={"batch_size": 60}), site(limits={"max_batch_size": 9}))
    assert (str(decision), decision.plan.evaluation.batch_size) == ("accepted", 9)


def test_every_number_that_a_plan_asks_for_has_a_limit_or_costs_nothing():
    groups = {"": TaskPlan, "training.": TrainingSettings, "evaluation.": EvaluationSettings}
    groups |= {f"peft.{name}": peft_methods.registry[name] for name in peft_methods.registry}
    numbers = {
        f"{where.split('.')[0]}.{name}".lstrip(".")
        for where, group in groups.items()
        for name, field in group.model_fields.items()
        if int in (field.annotation, *get_args(field.annotation))
    }
    limited = {part for bound in BOUNDS for part in re.findall(r"[a-z._]+", bound.setting)}
    limited |= {"training.gradient_accumulation_steps"}  # its bound is on a product
    free = {"seed", "evaluation.max_examples"}  # a site measures no more rows than it has
    assert numbers - limited == free | {"padded_to", "votes"}  # max_adapter_mib and synthetic.max_rows limit them


def test_what_is_padded_to_be_added_unread_is_limited_as_it_leaves():
    shape, base = AdapterShape({"l": (2**10, 2**10)}), BaseShape(1, 1, 1, 1, 1, 1, 1, 1)
    config = site(limits={"max_adapter_mib": 1})
    check_shapes(base, shape, plan(padded_to=64), config, 1, True)
    with pytest.raises(PolicyError) as refused:
        check_shapes(base, shape, plan(padded_to=2**12), config, 1, True)
    assert refused.value.code == "above_limit"
    assert "max_adapter_mib" in refused.value.message


def test_processes_count_for_the_rows_of_a_step_and_have_a_limit_of_their_own():
    asked, config = plan(training={"batch_size": 4}), site(limits={"max_rows_per_step": 8, "max_processes": 2})
    assert codes(asked, config, processes=2) == []
    assert codes(asked, config, processes=3) == ["above_limit", "above_limit"]


@given(
    rank=st.integers(1, 64),
    batch=st.integers(1, 64),
    accumulation=st.integers(1, 8),
    steps=st.integers(0, 64),
    limits=st.fixed_dictionaries(
        {
            name: st.integers(1, 64)
            for name in ("max_rank", "max_batch_size", "max_steps_per_round", "max_rows_per_step")
        }
    ),
    negotiable=st.lists(st.sampled_from(["rank", "batch_size", "local_steps"]), unique=True),
)
def test_what_fits_once_fits_as_it_is(
    rank: int, batch: int, accumulation: int, steps: int, limits: dict[str, int], negotiable: list[str]
):
    training = {"batch_size": batch, "gradient_accumulation_steps": accumulation, "local_steps": steps}
    asked = plan(peft={"method": "lora", "rank": rank}, training=training, negotiable=negotiable)
    once = fit(asked, site(limits=limits))
    again = fit(once.plan, site(limits=limits))
    assert again.plan == once.plan
    assert again.lowered == ()
    assert [reason.message for reason in again.refused] == [reason.message for reason in once.refused]


def test_a_task_that_only_measures_is_held_to_what_measuring_takes():
    idle = plan(training={"batch_size": 1, "local_steps": 1, "gradient_accumulation_steps": 8})
    tight = site(limits={"max_rows_per_step": 2, "max_batch_size": 16})
    assert codes(idle, tight) == ["above_limit", "few_rows"]
    assert codes(idle, tight, trains=False) == []


@pytest.mark.parametrize(
    ("asked", "privacy", "refused"),
    [
        ({"training": {"batch_size": 1, "local_steps": 9}}, {}, ["few_rows"]),
        ({"training": {"batch_size": 1, "local_steps": 10}}, {}, []),
        ({"training": {"batch_size": 1, "local_steps": 1, "gradient_accumulation_steps": 9}}, {}, ["few_rows"]),
        ({"training": {"batch_size": 1, "local_steps": 1}}, {"min_update_rows": 1}, []),
        ({"training": {"batch_size": 1, "local_steps": 0}}, {}, []),  # of epochs, the worker tells
        ({"evaluation": {"max_examples": 9}}, {}, ["few_rows"]),
        ({"evaluation": {"max_examples": 10}}, {}, []),
        ({"evaluation": {"max_examples": 0}}, {"min_metric_rows": 99}, []),
        ({"counts": ["examples"]}, {}, ["kept_here"]),
        ({"counts": ["examples"]}, {"counts": "examples"}, []),
        ({"counts": ["examples", "steps"]}, {"counts": "examples"}, ["kept_here"]),
        ({"label_statistics": "skew"}, {}, ["kept_here"]),
        ({"label_statistics": "skew"}, {"label_statistics": "skew"}, []),
    ],
)
def test_few_rows_and_what_is_kept_at_home_are_refused_by_the_plan_alone(asked: Any, privacy: Any, refused: list[str]):
    assert codes(plan(**asked), site(privacy=privacy)) == refused


EIGHT = {"max_epsilon": 8.0}
ASKED = {"epsilon": 3.0}


@pytest.mark.parametrize(
    ("privacy", "asked", "said"),
    [
        ({"required_protection": "clip"}, {}, ["unprotected"]),
        ({"required_protection": "noise"}, {}, ["unprotected"]),
        ({"required_protection": "encryption"}, {}, ["unprotected"]),
        ({"required_protection": ["noise", "encryption"]}, {}, ["unprotected", "unprotected"]),
        ({"required_protection": ["clip", "noise"]}, ASKED, []),
        ({"required_protection": ["noise"]}, {"noise_multiplier": 1.0}, []),
        ({"required_protection": ["noise", "encryption"]}, ASKED, ["unprotected"]),
        (EIGHT, {}, ["unprotected"]),
        (EIGHT, ASKED, []),
        (EIGHT, {"epsilon": 8.0}, []),
        (EIGHT, {"epsilon": 8.1}, ["epsilon_above_budget"]),
        (EIGHT, {"noise_multiplier": 0.1}, []),  # the worker tells, and the egress
        (EIGHT | {"unit": "patient_id"}, ASKED, ["weak_unit"]),
        (EIGHT | {"unit": "patient_id"}, ASKED | {"unit": "patient_id"}, []),
        (EIGHT, ASKED | {"unit": "patient_id"}, []),  # who protects a patient protects each row
        (EIGHT | {"delta": 1e-6}, ASKED, ["weak_delta"]),
        (EIGHT | {"delta": 1e-6}, ASKED | {"delta": 1e-6}, []),
        ({"unit": "patient_id", "delta": 1e-9}, ASKED, []),  # without a floor a job may do as it likes
    ],
)
def test_a_plan_that_protects_less_than_the_site_demands_is_refused(privacy: Any, asked: Any, said: list[str]):
    assert codes(plan(privacy=asked), site(privacy=privacy)) == said
    for reason in decide(plan(privacy=asked), site(privacy=privacy), WHO).refused:
        assert not {str(value) for value in asked.values()} & {*reason.message.split()}


def test_under_a_floor_the_number_of_steps_must_not_follow_from_the_rows():
    epochs = plan(privacy=ASKED, training={"local_steps": 0})
    assert codes(epochs, site(privacy=EIGHT)) == ["counts_rows"]
    assert codes(epochs, site()) == []


def test_under_a_floor_a_site_measures_nothing_and_tells_no_counts_whatever_its_file_lets_out():
    config = site(privacy=EIGHT | {"counts": ["examples"], "label_statistics": "skew"})
    decision = decide(plan(privacy=ASKED), config, WHO)
    assert not {decision.plan.evaluation.before, decision.plan.evaluation.after} - {False}
    assert decision.lowered == (NO_METRICS,)
    assert decide(decision.plan, config, WHO) == replace(decision, lowered=())
    assert codes(plan(privacy=ASKED), config, trains=False) == ["metrics_withheld"]
    assert codes(plan(privacy=ASKED, counts=["examples"]), config) == ["kept_here"]
    assert codes(plan(privacy=ASKED, label_statistics="skew"), config) == ["kept_here"]


def test_an_unknown_protection_cannot_be_required():
    with refused("wrong_setting", ConfigError, "required_protection"):
        site(privacy={"required_protection": "good will"})


@pytest.mark.parametrize("delta", ["1e-5", "1.5E-7", 1e-5])
def test_delta_may_be_written_as_people_write_it(delta: Any):
    assert site(privacy={"delta": delta}).privacy.delta == float(delta)
    for wrong in ("much", "0.1", "nan", "1e-5 "):
        with refused("wrong_setting", ConfigError):
            site(privacy={"delta": wrong})


def test_a_worker_asks_for_the_required_protection_too(tmp_path: Path):
    worker = hired(tmp_path, privacy={"required_protection": ["noise"]})
    for work, code in ((worker.train, "unprotected"), (worker.validate, "metrics_withheld")):
        with refused(code, PolicyError):
            work(RoundTask(tiny.plan()))


def test_a_link_out_of_the_data_folder_is_refused_and_its_target_stays_local(tmp_path: Path):
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "other.jsonl").write_text("{}")
    data = tmp_path / "data"
    (data / "sub").mkdir(parents=True)
    (data / "notes.jsonl").write_text("{}")
    (data / "same.jsonl").symlink_to(data / "notes.jsonl")
    (data / "out.jsonl").symlink_to("../secret/other.jsonl")
    (data / "door").symlink_to(tmp_path / "secret")
    (data / "sub" / "out.arrow").symlink_to(tmp_path / "secret" / "other.jsonl")
    for inside in ("notes.jsonl", "same.jsonl"):
        assert held_in(data / inside, str(data)) == data / inside
    for outside in ("out.jsonl", "door/other.jsonl", "sub", "../secret/other.jsonl"):
        with refused("outside_data_folder", PolicyError) as caught:
            held_in(data / outside, str(data))
        assert str(tmp_path) not in caught.value.message
        assert str(tmp_path) in str(caught.value)
    with pytest.raises(PolicyError):  # no folder named: the one the file is in
        held_in(data / "out.jsonl", "")


def test_paths_are_taken_from_the_data_folder_or_from_the_site_file(tmp_path: Path):
    (tmp_path / FILE_NAME).write_text(
        "models: {base: {path: models/m}}\n"
        "data:\n"
        "  here: {train: a.jsonl}\n"
        "  there: {folder: records, train: a.jsonl, validation: b.jsonl}\n"
        f"  elsewhere: {{folder: {tmp_path}, train: /data/a.jsonl}}\n"
    )
    config = load_site(tmp_path / FILE_NAME)
    assert config.models["base"].path == str(tmp_path / "models/m")
    assert config.data["here"].train == str(tmp_path / "a.jsonl")
    assert (config.data["here"].folder, config.data["here"].validation) == ("", "")
    assert config.data["there"].validation == str(tmp_path / "records/b.jsonl")
    assert config.data["there"].folder == str(tmp_path / "records")
    assert config.data["elsewhere"].train == "/data/a.jsonl"


def test_remote_code_cannot_even_be_asked_for():
    with refused("wrong_setting", ConfigError, "trust_remote_code"):
        plan(trust_remote_code=True)


def test_a_lowered_rank_trains_at_the_scale_that_goes_with_it():
    asked = plan(peft={"method": "lora", "rank": 16, "lora_alpha": 32}, negotiable="rank")
    given = fit(asked, site(limits={"max_rank": 4})).plan.peft
    assert (given["rank"], given["lora_alpha"]) == (4, 16)


def test_a_rank_is_negotiable_only_where_ranks_may_differ():
    with refused("rank_is_fixed", ConfigError, "negotiable"):
        settle(plan(negotiable="rank"), Aggregation(merge="factor_mean"))
    assert settle(plan(negotiable="rank"), Aggregation()).plan.negotiable == ("rank",)


def test_a_worker_trains_with_what_its_site_gives_and_says_so(tmp_path: Path):
    limits = {"max_rank": 2, "max_batch_size": 2, "max_steps_per_round": 2, "threads": 1}
    worker = hired(tmp_path, limits=limits)
    asked = tiny.plan(negotiable=["rank", "batch_size", "local_steps"])
    update = worker.train(RoundTask(asked))
    assert update.report.lowered == ("rank to 2", "batch_size to 2", "local_steps to 2")
    assert (update.report.rank, update.report.steps) == (2, 2)
    with refused("refused", PolicyError, "peft.rank", "2", "[above_limit]"):
        worker.train(RoundTask(tiny.plan()))


def test_a_worker_stops_when_its_time_is_up_or_its_data_are_too_few(tmp_path: Path):
    slow = hired(tmp_path, limits={"max_seconds_per_round": 1e-9})
    for work in (slow.train, slow.validate):
        with refused("too_slow", PolicyError, "1e-09 s") as caught:
            work(RoundTask(tiny.plan()))
        assert caught.value.code == "too_slow"
    small = hired(tmp_path, privacy={"min_examples": 1000})
    for work in (small.train, small.validate):
        with refused("few_rows", PolicyError, "1000") as caught:
            work(RoundTask(tiny.plan()))
        assert caught.value.code == "few_rows"
