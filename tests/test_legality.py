"""Choices that do not go together are refused while a job loads, each for its own reason."""

import ast
import inspect

import pytest

from nvflare_fm.aggregation import guard, merge, step, weigh
from nvflare_fm.config import Aggregation, RoundPlan, TrainingSettings
from nvflare_fm.errors import ConfigError
from nvflare_fm.job import legality
from nvflare_fm.job import settle as combination
from nvflare_fm.job.legality import CLASHES
from nvflare_fm.job.settle import settle

CLASSIFY = {"task": "sequence_classification", "labels": ["a", "b"]}
DORA = {"method": "lora", "use_dora": True}
PRIVATE = {"epsilon": 8.0}
FROZEN = {"merge": "freeze_a"}
NOISED = FROZEN | {"client_privacy": {"epsilon": 8.0, "expected_sites": 50}}
REFUSED = [
    ("rank_is_fixed", {"negotiable": "rank"}, {"merge": "factor_mean"}),
    ("rank_is_fixed", {"negotiable": "rank", "peft": DORA}, {}),
    ("dora_max_rank", {"peft": DORA}, {"max_rank": 64}),
    ("needs_plain_lora", {"peft": {"method": "ia3"}}, {"merge": "freeze_a"}),
    ("needs_plain_lora", {"peft": {"method": "ia3"}}, {"merge": "share_a"}),
    ("needs_plain_lora", {"peft": DORA}, {"merge": {"rule": "stack"}}),
    ("step_needs_canonical", {}, {"merge": "factor_mean", "step": "adam"}),
    ("step_needs_canonical", {}, {"merge": "factor_mean", "step": {"rule": "plain", "learning_rate": 0.5}}),
    ("steps_need_delta", {}, {"merge": "svd", "normalize_steps": True}),
    ("late_needs_delta", {}, {"merge": "svd", "max_staleness": 1}),
    ("late_needs_delta", {"peft": DORA}, {"max_staleness": 1}),
    ("nothing_late", {}, {"weigh": ["uniform", {"rule": "staleness", "a": 1}]}),
    ("energy_needs_canonical", {}, {"merge": "zero_pad", "keep_energy": 0.9}),
    ("no_products", {"peft": {"method": "ia3"}}, {"weigh": ["agreement"]}),
    ("no_products", {}, {"merge": "share_a", "weigh": [{"rule": "norm"}]}),
    ("no_products", {"peft": {"method": "prompt_tuning"}}, {"step": {"rule": "fedexp"}}),
    ("guard_needs_sum", {}, {"merge": "factor_mean", "guard": ["geometric_median"]}),
    ("guard_needs_sum", {}, {"merge": "rank_partition", "guard": [{"rule": "multi_krum", "f": 1, "mix": "nnm"}]}),
    ("guard_needs_sum", {}, {"merge": "median", "guard": ["clip_norm", "centered_clip"]}),
    ("no_label_per_row", {}, {"weigh": ["examples", "skew"]}),
    ("no_label_per_row", {"task": "multi_label", "labels": ["a", "b"]}, {"weigh": ["skew"]}),
    ("no_label_per_row", {"task": "token_classification", "labels": ["a", "b"]}, {"weigh": ["skew"]}),
    ("no_classes", {"training": {"restricted_softmax": 0.5}}, {}),
    ("no_classes", {"training": {"logit_calibration": 1.0}}, {}),
    ("no_classes", {"training": {"logit_adjustment": 1.0}}, {}),
    ("no_classes", {"task": "multi_label", "labels": ["a"], "training": {"logit_adjustment": 1.0}}, {}),
    ("head_needs_adam", {"training": {"head_lr_ratio": 2.0, "optim": "sgd"}}, {}),
    ("no_head", {"training": {"head_lr_ratio": 2.0}}, {}),
    ("no_head", {"task": "preference", "training": {"head_lr_ratio": 2.0}}, {}),
    ("nothing_trained", {"peft": {"method": "head"}}, {}),
    ("no_pairs", {"training": {"dpo_beta": 0.2}}, {}),
    ("private_steps", {"privacy": PRIVATE, "training": {"local_steps": 0}}, {}),
    ("private_checkpointing", {"privacy": PRIVATE, "training": {"gradient_checkpointing": True}}, {}),
    ("private_max_grad_norm", {"privacy": PRIVATE, "training": {"max_grad_norm": 0.5}}, {}),
    ("private_classes", {**CLASSIFY, "privacy": PRIVATE, "training": {"logit_adjustment": 1.0}}, {}),
    ("private_classes", {**CLASSIFY, "privacy": PRIVATE, "training": {"logit_calibration": 1.0}}, {}),
    ("private_classes", {**CLASSIFY, "privacy": PRIVATE, "training": {"restricted_softmax": 0.5}}, {}),
    ("private_counts", {"privacy": {"noise_multiplier": 1.0}}, {"weigh": ["examples"]}),
    ("private_counts", {**CLASSIFY, "privacy": PRIVATE}, {"weigh": ["skew"]}),
    ("private_own_half", {"privacy": PRIVATE}, {"merge": "share_a"}),
    ("private_synthetic", {"privacy": PRIVATE, "synthetic": {"digest": "ab"}}, {}),
    ("synthetic_task", {"task": "multi_label", "labels": ["a"], "synthetic": {"digest": "ab"}}, {}),
    ("synthetic_task", {"task": "preference", "synthetic": {"digest": "ab"}}, {}),
    ("private_loss", {"privacy": PRIVATE}, {"weigh": [{"rule": "loss", "q": 2}]}),
    ("needs_loss_before", {"evaluation": {"before": False}}, {"weigh": [{"rule": "loss", "q": 2}]}),
    ("no_linear_sum", {"uplink": "ckks"}, {}),
    *(("no_linear_sum", {"uplink": "ckks"}, {"merge": rule}) for rule in ("svd", "zero_pad", "alternate")),
    ("nothing_readable", {"uplink": "ckks"}, {"merge": "freeze_a", "guard": ["clip_norm"]}),
    ("nothing_readable", {"uplink": "ckks"}, {"merge": "freeze_a", "guard": ["geometric_median"]}),
    ("nothing_readable", {"uplink": "ckks"}, FROZEN | {"weigh": ["examples", "agreement"]}),
    ("nothing_readable", {"uplink": "ckks"}, FROZEN | {"weigh": ["norm"]}),
    ("nothing_readable", {"uplink": "ckks", "peft": {"method": "ia3"}}, {"guard": ["clip_norm"]}),
    ("step_needs_canonical", {"uplink": "ckks"}, FROZEN | {"step": "momentum"}),
    ("encrypted_changes", {"uplink": "ckks"}, FROZEN | {"normalize_steps": True}),
    ("encrypted_changes", {"uplink": "ckks"}, FROZEN | {"max_staleness": 1}),
    ("encrypted_downlink", {"uplink": "ckks", "downlink": "int8"}, FROZEN),
    ("uplink_only", {"downlink": "ckks"}, {}),
    *(
        ("client_not_linear", {}, NOISED | {"merge": rule})
        for rule in ("exact", "svd", "stack", "share_a", "alternate")
    ),
    ("client_guard", {}, NOISED | {"guard": ["clip_norm"]}),
    ("client_guard", {"peft": {"method": "ia3"}}, NOISED | {"guard": ["clip_norm"], "merge": "exact"}),
    ("client_weights", {}, NOISED | {"weigh": ["examples"]}),
    ("client_weights", {}, NOISED | {"weigh": ["uniform", "norm"]}),
    ("client_weights", {}, NOISED | {"weigh": ["agreement"]}),
    ("client_weights", {}, NOISED | {"weigh": ["loss"]}),
    ("client_weights", CLASSIFY, NOISED | {"weigh": ["skew"]}),
    ("client_changes", {"peft": {"method": "ia3"}}, NOISED | {"merge": "exact", "normalize_steps": True}),
    ("client_changes", {"peft": {"method": "ia3"}}, NOISED | {"merge": "exact", "max_staleness": 1}),
    ("client_encrypted", {"uplink": "ckks"}, NOISED),
    ("head_start_task", {"head_start": "features"}, {}),
    ("private_head_start", {**CLASSIFY, "head_start": "features", "privacy": PRIVATE}, {}),
    ("encrypted_head_start", {**CLASSIFY, "head_start": "features", "uplink": "ckks"}, {"merge": "freeze_a"}),
    ("client_head_start", {**CLASSIFY, "head_start": "features"}, NOISED),
]


@pytest.mark.parametrize(("code", "plan", "how"), REFUSED)
def test_a_clash_is_refused_with_a_code_of_its_own(code, plan, how):
    with pytest.raises(ConfigError) as refused:
        settle(RoundPlan(**plan), Aggregation(**how))
    assert refused.value.code == code


@pytest.mark.parametrize(
    ("code", "how"),
    [
        ("unknown_name", {"step": "adm"}),
        ("unknown_name", {"weigh": ["exmples"]}),
        ("unknown_name", {"merge": "exakt"}),
        ("unknown_name", {"merge": {"rule": "exakt", "power": 2}}),
        ("no_rule_name", {"merge": {"power": 2}}),
        ("wrong_setting", {"step": {"rule": "fedexp", "least": 1}}),
        ("wrong_setting", {"merge": {"rule": "exact", "power": 2}}),
    ],
)
def test_a_rule_or_setting_nobody_knows_is_refused_before_a_round_is_lost(code, how):
    with pytest.raises(ConfigError) as refused:
        settle(RoundPlan(), Aggregation(**how))
    assert refused.value.code == code


def test_every_clash_of_the_table_is_tried_here():
    assert {code for code, *_ in REFUSED} == {clash.code for clash in CLASHES}
    assert len({clash.code for clash in CLASHES}) == len(CLASHES)


@pytest.mark.parametrize("module", [legality, combination], ids=lambda module: module.__name__)
def test_what_goes_together_follows_from_promises_and_never_from_the_name_of_a_rule(module):
    """No text in the module is a rule's name, or has one as code."""
    names = {name for registry in (merge.registry, weigh.registry, step.registry, guard.registry) for name in registry}
    tree = ast.parse(inspect.getsource(module))
    texts = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    assert not names & set(texts)
    assert not [name for name in names for text in texts if f"`{name}`" in text or f"= {name}" in text]


@pytest.mark.parametrize(
    ("plan", "how"),
    [
        ({}, {"merge": "svd", "step": {"rule": "yogi"}, "weigh": ["examples", "agreement"]}),
        ({}, {"merge": "stack", "normalize_steps": True, "step": "fedexp"}),
        (CLASSIFY, {"weigh": ["examples", {"rule": "skew", "a": 1.0}]}),
        (CLASSIFY | {"training": {"restricted_softmax": 0.5, "logit_calibration": 1.0}}, {}),
        ({"peft": {"method": "ia3"}}, {"weigh": ["loss"]}),
        ({"peft": {"method": "ia3"}}, {"guard": ["geometric_median"]}),
        ({"peft": DORA}, {"guard": ["multi_krum"]}),
        *(({}, {"merge": rule, "guard": ["geometric_median"]}) for rule in ("stack", "svd", "freeze_a", "share_a")),
        ({"task": "preference", "training": {"dpo_beta": 0.2}}, {"step": "fedexp"}),
        ({"task": "regression", "labels": ["age"], "training": {"head_lr_ratio": 2.0}}, {}),
        ({"peft": {"method": "lora", "use_dora": True}}, {"merge": "exact"}),
        ({}, {"keep_energy": 0.9, "max_weight": 0.4}),
        ({}, {"merge": "factor_mean", "step": {"rule": "plain", "learning_rate": 1.0}}),
        ({"uplink": "ckks", "negotiable": "rank"}, FROZEN | {"weigh": ["examples", "loss"], "max_weight": 0.4}),
        ({"uplink": "ckks", "peft": {"method": "ia3"}}, {}),
        ({**CLASSIFY, "uplink": "ckks", "peft": {"method": "head"}}, {}),
        ({"peft": {"method": "head", "modules_to_save": ["lm_head"]}}, {}),
        ({"privacy": PRIVATE, "uplink": "int8", "downlink": "int8"}, NOISED),
        ({"peft": {"method": "ia3"}}, NOISED | {"merge": "exact", "step": {"rule": "momentum", "beta": 0.5}}),
    ],
)
def test_what_goes_together_is_let_through(plan, how):
    settle(RoundPlan(**plan), Aggregation(**how))


def test_a_weight_that_needs_a_label_statistic_asks_the_sites_for_it_and_no_other_does():
    assert settle(RoundPlan(**CLASSIFY), Aggregation(weigh=["examples", "skew"])).plan.label_statistics == ("skew",)
    assert settle(RoundPlan(**CLASSIFY), Aggregation(weigh=["skew"])).plan.counts == ("examples",)
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
    def settled(method: str = "lora", privacy: object = None, **training: object) -> TrainingSettings:
        peft = {"method": method} | ({"modules_to_save": ["lm_head"]} if method == "head" else {})
        plan = RoundPlan(task=task, labels=["a", "b", "c", "d"], peft=peft, training=training, privacy=privacy or {})
        return settle(plan, Aggregation()).plan.training

    assert settled().head_lr_ratio == ratio
    assert settled(optim="sgd").head_lr_ratio == 0
    assert settled("ia3").head_lr_ratio == 0
    assert settled("head").head_lr_ratio == ratio
    assert settled(privacy=PRIVATE).head_lr_ratio == ratio
    assert settled("head", privacy=PRIVATE).head_lr_ratio == 6 * ratio
    assert settled(head_lr_ratio=0.0).head_lr_ratio == 0
    few = RoundPlan(task=task, labels=["a", "b", "c"])
    assert settle(few, Aggregation()).plan.training.head_lr_ratio == (0 if task == "sequence_classification" else ratio)
    assert settled(head_lr_ratio=ratio / 4).head_lr_ratio == ratio / 4
