"""Choices that do not go together are refused while a job loads, each for its own reason."""

import pytest

from nvflare_fm.combination import settle
from nvflare_fm.config import Aggregation, RoundPlan, TrainingSettings
from nvflare_fm.errors import ConfigError
from nvflare_fm.legality import CLASHES

CLASSIFY = {"task": "sequence_classification", "labels": ["a", "b"]}
REFUSED = [
    ({"negotiable": "rank"}, {"merge": "factor_mean"}, "take rank out of negotiable"),
    ({"negotiable": "rank", "peft": {"method": "lora", "use_dora": True}}, {}, "take rank out of negotiable"),
    ({"peft": {"method": "lora", "use_dora": True}}, {"max_rank": 64}, "two DoRA adapters do not add"),
    ({"peft": {"method": "ia3"}}, {"merge": "freeze_a"}, "about the factors of plain LoRA"),
    ({"peft": {"method": "ia3"}}, {"merge": "share_a"}, "about the factors of plain LoRA"),
    ({"peft": {"method": "lora", "use_dora": True}}, {"merge": "stack"}, "about the factors of plain LoRA"),
    ({}, {"merge": "factor_mean", "step": "adam"}, "the step acts on ΔW"),
    ({}, {"merge": "svd", "normalize_steps": True}, "averages what they hold"),
    ({}, {"merge": "svd", "max_staleness": 1}, "counts by what it changed"),
    ({"peft": {"method": "lora", "use_dora": True}}, {"max_staleness": 1}, "counts by what it changed"),
    ({}, {"weigh": ["uniform", {"rule": "staleness", "a": 1}]}, "no update is older than its round"),
    ({}, {"merge": "zero_pad", "keep_energy": 0.9}, "counts singular values"),
    ({"peft": {"method": "ia3"}}, {"weigh": ["agreement"]}, "compare the products"),
    ({}, {"merge": "share_a", "weigh": [{"rule": "norm"}]}, "compare the products"),
    ({"peft": {"method": "prompt_tuning"}}, {"step": {"rule": "fedexp"}}, "acts on ΔW|compare the products"),
    ({}, {"weigh": ["examples", "skew"]}, "rows have no one label"),
    ({"task": "multi_label", "labels": ["a", "b"]}, {"weigh": ["skew"]}, "rows have no one label"),
    ({"task": "token_classification", "labels": ["a", "b"]}, {"weigh": ["skew"]}, "rows have no one label"),
    ({"training": {"restricted_softmax": 0.5}}, {}, "the task chooses none"),
    ({"training": {"logit_calibration": 1.0}}, {}, "the task chooses none"),
    ({"training": {"logit_adjustment": 1.0}}, {}, "the task chooses none"),
    ({"task": "multi_label", "labels": ["a"], "training": {"logit_adjustment": 1.0}}, {}, "the task chooses none"),
    ({"training": {"head_lr_ratio": 2.0, "optim": "sgd"}}, {}, "SGD keeps none"),
    ({"training": {"head_lr_ratio": 2.0}}, {}, "about a new head"),
    ({"task": "preference", "training": {"head_lr_ratio": 2.0}}, {}, "about a new head"),
    ({"training": {"dpo_beta": 0.2}}, {}, "about pairs of answers"),
    ({"evaluation": {"before": False}}, {"weigh": [{"rule": "loss", "q": 2}]}, "set evaluation.before"),
]


@pytest.mark.parametrize(("plan", "how", "why"), REFUSED)
def test_a_clash_is_refused_and_says_why(plan, how, why):
    with pytest.raises(ConfigError, match=why):
        settle(RoundPlan(**plan), Aggregation(**how))


@pytest.mark.parametrize("how", [{"step": "adm"}, {"step": {"rule": "fedexp", "least": 1}}, {"weigh": ["exmples"]}])
def test_a_rule_or_setting_nobody_knows_is_refused_before_a_round_is_lost(how):
    with pytest.raises(ConfigError, match=r"adm|least|exmples"):
        settle(RoundPlan(), Aggregation(**how))


def test_every_clash_of_the_table_is_tried_here():
    tried = {
        clash.why
        for clash in CLASHES
        for *_, why in REFUSED
        if any(w in clash.why + clash.remedy for w in why.split("|"))
    }
    assert tried == {clash.why for clash in CLASHES}


@pytest.mark.parametrize(
    ("plan", "how"),
    [
        ({}, {"merge": "svd", "step": {"rule": "yogi"}, "weigh": ["examples", "agreement"]}),
        ({}, {"merge": "stack", "normalize_steps": True, "step": "fedexp"}),
        (CLASSIFY, {"weigh": ["examples", {"rule": "skew", "a": 1.0}]}),
        (CLASSIFY | {"training": {"restricted_softmax": 0.5, "logit_calibration": 1.0}}, {}),
        ({"peft": {"method": "ia3"}}, {"weigh": ["loss"]}),
        ({"task": "preference", "training": {"dpo_beta": 0.2}}, {"step": "fedexp"}),
        ({"task": "regression", "labels": ["age"], "training": {"head_lr_ratio": 2.0}}, {}),
        ({"peft": {"method": "lora", "use_dora": True}}, {"merge": "exact"}),
        ({}, {"keep_energy": 0.9, "max_weight": 0.4}),
    ],
)
def test_what_goes_together_is_let_through(plan, how):
    settle(RoundPlan(**plan), Aggregation(**how))


def test_a_weight_that_needs_a_label_statistic_asks_the_sites_for_it_and_no_other_does():
    assert settle(RoundPlan(**CLASSIFY), Aggregation(weigh=["examples", "skew"])).plan.label_statistics == ("skew",)
    assert settle(RoundPlan(**CLASSIFY), Aggregation()).plan.label_statistics == ()


@pytest.mark.parametrize(
    ("task", "ratio"),
    [
        ("causal_lm", 0.0),
        ("preference", 0.0),
        ("regression", 0.0),
        ("multi_label", 8.0),
        ("sequence_classification", 8.0),
        ("token_classification", 8.0),
    ],
)
def test_what_a_job_leaves_open_follows_from_its_task(task, ratio):
    def settled(method: str = "lora", **training: object) -> TrainingSettings:
        plan = RoundPlan(task=task, labels=["a", "b"], peft={"method": method}, training=training)
        return settle(plan, Aggregation()).plan.training

    assert settled().head_lr_ratio == ratio
    assert settled(optim="sgd").head_lr_ratio == 0
    assert settled("ia3").head_lr_ratio == 0
    assert settled(head_lr_ratio=0.0).head_lr_ratio == 0
    assert settled(head_lr_ratio=ratio / 4).head_lr_ratio == ratio / 4
