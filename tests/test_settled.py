"""What follows from a job's choices is decided once, and no rank that a site trains at is cut unasked."""

import json
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from nvflare_fm.adapter import Adapter
from nvflare_fm.aggregation import merge
from nvflare_fm.aggregation.combine import combine
from nvflare_fm.config import Aggregation, RoundPlan, SiteOverrides, TaskPlan
from nvflare_fm.errors import ConfigError
from nvflare_fm.flare.controller import FedPEFT
from nvflare_fm.job.peft import registry as methods
from nvflare_fm.job.settle import SettledPlan, settle
from tests.strategies import SINGLE, close, make_pair, update

FOLLOWS = TaskPlan.model_fields.keys() - RoundPlan.model_fields.keys()
BEFORE = """{
    "task": "sequence_classification", "model": "base", "data": "notes", "fingerprint": "", "quantization": "nf4",
    "double_quant": true, "compute_dtype": "auto", "peft": {"method": "lora", "rank": 4, "lora_alpha": 16.0,
    "lora_dropout": 0.0, "use_rslora": false, "use_dora": false, "target_modules": "all-linear", "modules_to_save":
    ["pooler"]}, "labels": ["calm", "ill"], "max_length": 512, "rest": "none", "factors": "A", "shares": "AB",
    "label_statistics": ["skew"], "counts": ["examples"], "training": {"local_steps": 20, "local_epochs": 1.0,
    "batch_size": 8, "gradient_accumulation_steps": 1, "gradient_checkpointing": false, "learning_rate": 0.001,
    "lr_scheduler_type": "constant", "warmup_ratio": 0.0, "optim": "adamw_torch", "weight_decay": 0.0, "max_grad_norm":
    1.0, "head_lr_ratio": 8.0, "proximal_mu": 0.0, "restricted_softmax": 1.0, "logit_calibration": 0.0,
    "logit_adjustment": 0.0}, "evaluation": {"before": true, "after": true, "batch_size": 16, "max_examples": 0},
    "seed": 0, "negotiable": [], "template": ""
}"""  # a plan beside an adapter that was saved when a plan held what follows from it


@st.composite
def jobs(draw: st.DrawFn) -> tuple[RoundPlan, Aggregation]:
    """Choices that go together."""
    task = draw(st.sampled_from(["causal_lm", "sequence_classification", "token_classification"]))
    peft = {"method": draw(st.just("lora") | st.sampled_from(list(methods)))}  # most others go with few rules
    peft |= draw(st.sampled_from([{}, {"rank": 3}, {"use_dora": True}])) if peft["method"] == "lora" else {}
    peft |= {"modules_to_save": ["lm_head"]} if peft["method"] == "head" else {}
    training = {
        "head_lr_ratio": draw(st.sampled_from([None, 0.0, 2.0])),
        "optim": draw(st.sampled_from(["adamw_torch", "sgd"])),
        "local_steps": draw(st.integers(0, 3)),
    }
    plan = RoundPlan.read({"task": task, "labels": ["a", "b"], "peft": peft, "training": training}, "test")
    how = {
        "merge": draw(st.sampled_from(list(merge.registry))),
        "weigh": draw(st.sampled_from([["uniform"], ["examples"], ["examples", "skew"]])),
        "step": draw(st.sampled_from([None, "plain", "fedexp", {"rule": "momentum", "beta": 0.5}])),
        "normalize_steps": draw(st.booleans()),
    }
    return plan, Aggregation.read(how, "test")


@given(job=jobs(), number=st.integers(0, 5))
def test_what_is_settled_stays_as_it_is_if_it_is_settled_again(job: tuple[RoundPlan, Aggregation], number: int):
    try:
        once = settle(*job)
    except ConfigError:
        assume(False)
    sent = once.of_round(number)
    again = settle(sent, once.aggregation)
    assert again.of_round(number) == sent
    assert (again.aggregation, again.global_rank) == (once.aggregation, once.global_rank)
    assert once.aggregation.step is not None
    assert sent.training.head_lr_ratio is not None
    assert not issubclass(SettledPlan, RoundPlan)


@pytest.mark.parametrize("name", sorted(FOLLOWS))
def test_a_job_cannot_write_what_follows_from_it(name: str):
    usual = TaskPlan().model_dump(mode="json")[name]
    assert name not in RoundPlan.model_fields
    with pytest.raises(ConfigError) as refused:
        FedPEFT(plan={name: usual})
    assert refused.value.code == "wrong_setting"


@pytest.mark.parametrize(
    ("asked", "how", "start"),
    [
        ({"task": "sequence_classification"}, {}, "features"),
        ({"task": "sequence_classification", "head_start": "random"}, {}, "random"),
        ({"task": "sequence_classification", "privacy": {"epsilon": 3.0}}, {}, "random"),
        ({"task": "sequence_classification", "uplink": ["ckks"]}, {"merge": "freeze_a"}, "random"),
        ({"task": "token_classification"}, {}, "random"),
        ({"task": "multi_label"}, {}, "random"),
        ({"task": "causal_lm", "labels": ()}, {}, "random"),
    ],
)
def test_a_head_starts_from_features_where_it_may_and_a_job_can_say_otherwise(asked: Any, how: Any, start: str):
    plan = RoundPlan.read({"labels": ["a", "b"], **asked}, "test")
    assert settle(plan, Aggregation.read(how, "test")).plan.head_start == start


def test_a_plan_that_held_what_follows_from_it_is_still_read():
    plan = TaskPlan.read(json.loads(BEFORE), "test")
    assert (plan.rest, plan.factors, plan.label_statistics, plan.counts) == ("none", "A", ("skew",), ("examples",))
    how = Aggregation(merge="alternate", weigh=["examples", "skew"])
    asked = {name: value for name, value in json.loads(BEFORE).items() if name not in FOLLOWS}
    again = settle(RoundPlan.read({**asked, "head_start": "random"}, "test"), how).of_round(1)
    assert again == plan.model_copy(update={"head_start": "random"})  # there was no other start


RANKS = st.integers(1, 9)


@given(rank=RANKS, sites=st.dictionaries(st.sampled_from("abc"), st.none() | RANKS), most=st.just(0) | RANKS)
def test_the_global_rank_is_the_largest_that_is_asked_or_a_site_above_it_is_refused(rank, sites, most):
    ranks = [rank, *filter(None, sites.values())]
    plan, how = RoundPlan(peft={"method": "lora", "rank": rank}), Aggregation(max_rank=most)
    overrides = {site: SiteOverrides(rank=own) for site, own in sites.items()}
    if most and max(ranks) > most:
        with pytest.raises(ConfigError) as refused:
            settle(plan, how, overrides)
        error, above = refused.value, {"peft": rank, **{site: own for site, own in sites.items() if own}}
        assert error.code == "rank_above_global"
        assert any(error.message.startswith(f"{where}: ") for where, own in above.items() if own == max(ranks))
        assert all(word in error.message for word in ("rank", "max_rank", "raise"))
        return
    settled = settle(plan, how, overrides)
    assert settled.global_rank == (most or max(ranks))
    assert max(ranks) <= settled.global_rank
    for site, own in sites.items():
        assert [*settled.terms(site).ranks] == [own or rank]
    assert [*settled.terms("not listed").ranks] == [*range(1, settled.global_rank + 1)]


@given(rank=RANKS, own=RANKS)
def test_nothing_of_what_the_widest_site_trains_is_cut(rank: int, own: int):
    settled = settle(RoundPlan(peft={"method": "lora", "rank": rank}), Aggregation(), {"a": SiteOverrides(rank=own)})
    pair = make_pair(12, 11, own, seed=1).to(SINGLE)
    found = combine(
        Adapter(), None, [update("a", Adapter({"q": pair}))], settled.aggregation, settled.global_rank
    ).adapter.lora["q"]
    close(found.delta(), pair.delta(), 1e-5)
    assert found.rank == settled.merged_rank([own]) == max(rank, own)


@pytest.mark.parametrize(("merges", "merged"), [("exact", 8), ("svd", 8), ("zero_pad", 5), ("rank_partition", 8)])
def test_rules_that_keep_raw_factors_keep_the_rank_of_the_widest_site(merges: str, merged: int):
    settled = settle(RoundPlan(peft={"method": "lora", "rank": 2}), Aggregation(merge=merges, max_rank=8))
    assert settled.merged_rank([2, 5]) == merged


def test_a_method_without_factors_has_no_rank():
    assert settle(RoundPlan(peft={"method": "ia3"}), Aggregation(max_rank=3)).global_rank == 0
