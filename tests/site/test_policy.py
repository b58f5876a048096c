"""A site's word on a job: accepted, lowered where the plan says so, refused otherwise, always with the reason."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nvflare_fm.adapter import RoundTask
from nvflare_fm.combination import settle
from nvflare_fm.config import Aggregation, RoundPlan
from nvflare_fm.errors import ConfigError, PolicyError
from nvflare_fm.site.policy import Submitter, accept, check_examples, check_label_statistics, decide, fit
from nvflare_fm.site.site_config import FILE_NAME, SiteConfig, held_in, load_site
from nvflare_fm.site.worker import Worker
from tests.site import tiny

OFFER = {"models": {"base": {"path": "m"}}, "data": {"notes": {"train": "notes.jsonl"}}}
WHO = Submitter("lead@clinic.org", "clinic")


def site(**more: Any) -> SiteConfig:
    return SiteConfig.read(OFFER | more, FILE_NAME)


def plan(**more: Any) -> RoundPlan:
    return RoundPlan.read(more, "plan")


def refusal(asked: RoundPlan, config: SiteConfig, who: Submitter = WHO) -> str:
    with pytest.raises(PolicyError) as refused:
        accept(decide(asked, config, who))
    return refused.value.message


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
    assert f"is {said}" in refusal(plan(**{kind: name}), site())


@given(name=st.text(max_size=80))
def test_no_name_but_an_offered_alias_is_ever_accepted(name: str):
    decision = decide(plan(data=name), site(), WHO)
    assert bool(decision.refused) == (name != "notes")


def test_an_unknown_alias_is_answered_with_the_nearest():
    assert refusal(plan(data="note"), site()) == (
        "this site offers no data set 'note'; did you mean \"notes\"? ask its admin to add it to fm_site.yaml"
    )


@pytest.mark.parametrize(
    ("asked", "limits", "lowered"),
    [
        ({"peft": {"method": "lora", "rank": 16}}, {"max_rank": 8}, "rank 16 → 8"),
        ({"training": {"local_steps": 50}}, {"max_steps_per_round": 20}, "local_steps 50 → 20"),
        ({"training": {"batch_size": 12}}, {"max_batch_size": 5}, "batch_size 12 → 4"),
    ],
)
def test_a_site_lowers_what_is_negotiable_and_refuses_it_otherwise(asked: Any, limits: Any, lowered: str):
    config, setting = site(limits=limits), lowered.split()[0]
    assert f"{setting} " in refusal(plan(**asked), config)
    assert "ask for less, or list" in refusal(plan(**asked), config)
    decision = decide(plan(**asked, negotiable=[setting]), config, WHO)
    assert str(decision) == f"lowered: {lowered}"
    assert decide(decision.plan, config, WHO).lowered == ()


@given(asked=st.integers(1, 64), most=st.integers(1, 64), accumulation=st.integers(1, 4))
def test_a_lower_batch_still_sees_as_many_examples_a_step(asked: int, most: int, accumulation: int):
    training = {"batch_size": asked, "gradient_accumulation_steps": accumulation}
    given_plan = fit(plan(training=training, negotiable="batch_size"), site(limits={"max_batch_size": most})).plan
    settings = given_plan.training
    assert settings.batch_size <= most
    assert settings.batch_size * settings.gradient_accumulation_steps == asked * accumulation


def test_the_default_rank_of_a_method_counts_too():
    assert "rank 8 is more than the 2" in refusal(plan(peft={"method": "lora"}), site(limits={"max_rank": 2}))


def test_every_reason_is_named_at_once():
    asked = plan(model="other", quantization="fp16", peft={"method": "lora", "rank": 99})
    message = refusal(asked, site(limits={"quantizations": ["nf4"], "max_rank": 8}))
    assert all(part in message for part in ("'other'", "'fp16' is not among ['nf4']", "rank 99"))


def test_a_models_own_quantizations_win_over_the_limits():
    models = {"base": {"path": "m", "quantizations": ["nf4", "int8"]}}
    assert "'bf16' is not among ['nf4', 'int8']" in refusal(plan(quantization="bf16"), site(models=models))
    config = site(models=models, limits={"quantizations": ["bf16"]})
    assert str(decide(plan(quantization="int8"), config, WHO)) == "accepted"


def test_where_only_pinned_models_are_used_an_unpinned_one_is_refused():
    assert "model 'base' is not pinned" in refusal(plan(), site(limits={"pinned_only": True}))
    pinned = site(limits={"pinned_only": True}, models={"base": {"path": "m", "fingerprint": "abc"}})
    assert str(decide(plan(), pinned, WHO)) == "accepted"


@pytest.mark.parametrize(
    ("welcome", "said"),
    [
        ({"submitters": ["head@clinic.org"]}, "submitter 'lead@clinic.org'"),
        ({"orgs": "company"}, "organisation 'clinic'"),
        ({"templates": ["lora_text_classification"]}, "job template 'lora_instruction_tuning'"),
        ({"tasks": []}, "task 'causal_lm'"),
    ],
)
def test_only_whom_and_what_the_site_welcomes_is_accepted(welcome: Any, said: str):
    asked = plan(template="lora_instruction_tuning")
    assert f"{said} is not welcome at this site" in refusal(asked, site(welcome=welcome))
    everyone = {"submitters": WHO.name, "orgs": WHO.org, "templates": asked.template, "tasks": asked.task}
    assert str(decide(asked, site(welcome=everyone), WHO)) == "accepted"


def test_a_submitter_nobody_vouches_for_is_refused_where_the_site_names_its_own():
    assert "submitter 'unknown'" in refusal(plan(), site(welcome={"submitters": ["lead@clinic.org"]}), Submitter())


def test_the_floor_of_examples_is_told_and_the_count_is_not():
    config = site(privacy={"min_examples": 100})
    check_examples(100, config)
    with pytest.raises(PolicyError, match="no fewer than 100 examples") as refused:
        check_examples(37, config)
    assert "37" not in str(refused.value)


@pytest.mark.parametrize("protection", ["clip", "noise", "encryption"])
def test_a_site_that_requires_a_protection_refuses_while_no_job_can_give_it(protection: str):
    message = refusal(plan(), site(privacy={"required_protection": protection}))
    assert f"this site lets no update leave without {protection}" in message
    with pytest.raises(ConfigError, match="required_protection"):
        site(privacy={"required_protection": "good will"})


def test_a_worker_asks_for_the_required_protection_too(tmp_path: Path):
    worker = hired(tmp_path, privacy={"required_protection": ["noise"]})
    for work in (worker.train, worker.validate):
        with pytest.raises(PolicyError, match="no update leave without noise"):
            work(RoundTask(tiny.plan()))


def test_no_label_statistics_leave_unless_the_site_names_them():
    check_label_statistics([], site())
    with pytest.raises(PolicyError, match="tells no histogram and no skew of its labels"):
        check_label_statistics(["skew", "histogram"], site())
    some = site(privacy={"label_statistics": "skew"})
    check_label_statistics(["skew"], some)
    with pytest.raises(PolicyError, match="tells no histogram of its labels"):
        check_label_statistics(["skew", "histogram"], some)


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
        with pytest.raises(PolicyError, match="leads out of its data folder") as refused:
            held_in(data / outside, str(data))
        assert str(tmp_path) not in refused.value.message
        assert str(tmp_path) in str(refused.value)
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


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("data: {a/b: {train: x}}", "data.a/b"),
        ("limits: {max_rnak: 4}", 'did you mean "max_rank"'),
        ("models: {base: {trust_remote_code: true}}", "unknown setting 'models.base.trust_remote_code'"),
        ("[1, 2]", "holds a list"),
        ("models: [", "cannot be read"),
    ],
)
def test_a_site_file_nobody_can_read_is_refused(tmp_path: Path, text: str, said: str):
    (tmp_path / FILE_NAME).write_text(text)
    with pytest.raises(ConfigError, match=said.replace("(", r"\(").replace("[", r"\[")):
        load_site(tmp_path / FILE_NAME)


def test_remote_code_cannot_even_be_asked_for():
    with pytest.raises(ConfigError, match="unknown setting 'trust_remote_code'"):
        plan(trust_remote_code=True)


def test_a_lowered_rank_trains_at_the_scale_that_goes_with_it():
    asked = plan(peft={"method": "lora", "rank": 16, "lora_alpha": 32}, negotiable="rank")
    given = fit(asked, site(limits={"max_rank": 4})).plan.peft
    assert (given["rank"], given["lora_alpha"]) == (4, 16)


def test_a_rank_is_negotiable_only_where_ranks_may_differ():
    with pytest.raises(ConfigError, match="one rank; take rank out of negotiable"):
        settle(plan(negotiable="rank"), Aggregation(merge="factor_mean"))
    assert settle(plan(negotiable="rank"), Aggregation()).negotiable == ("rank",)


def test_a_worker_trains_with_what_its_site_gives_and_says_so(tmp_path: Path):
    limits = {"max_rank": 2, "max_batch_size": 2, "max_steps_per_round": 2, "threads": 1}
    worker = hired(tmp_path, limits=limits)
    asked = tiny.plan(negotiable=["rank", "batch_size", "local_steps"])
    update = worker.train(RoundTask(asked))
    assert update.report.lowered == ("rank 4 → 2", "batch_size 4 → 2", "local_steps 3 → 2")
    assert (update.report.rank, update.report.steps) == (2, 2)
    with pytest.raises(PolicyError, match="rank 4 is more than the 2"):
        worker.train(RoundTask(tiny.plan()))


def test_a_worker_stops_when_its_time_is_up_or_its_data_are_too_few(tmp_path: Path):
    slow = hired(tmp_path, limits={"max_seconds_per_round": 1e-9})
    with pytest.raises(PolicyError, match="longer than the 1e-09 s a round this site gives"):
        slow.train(RoundTask(tiny.plan()))
    small = hired(tmp_path, privacy={"min_examples": 1000})
    for work in (small.train, small.validate):
        with pytest.raises(PolicyError, match="no fewer than 1000 examples"):
            work(RoundTask(tiny.plan()))


def test_a_wrong_value_in_the_site_file_is_named_in_the_site_s_log_only(tmp_path: Path):
    (tmp_path / FILE_NAME).write_text("models: {base: {pth: /srv/secret/model}}\n")
    with pytest.raises(ConfigError) as wrong:
        load_site(tmp_path / FILE_NAME)
    assert "models.base.pth" in str(wrong.value)
    assert "pth" not in wrong.value.message
    (tmp_path / FILE_NAME).write_text("limits: {max_rank: /srv/secret/model}\n")
    with pytest.raises(ConfigError) as wrong:
        load_site(tmp_path / FILE_NAME)
    assert "secret" in str(wrong.value)
    assert "secret" not in wrong.value.message
