"""The aggregator adds nothing to the mathematics and lets nothing unsound in."""

from dataclasses import replace
from inspect import signature
from itertools import permutations
from typing import Any

import pytest
import torch
from nvflare.apis.fl_context import FLContext
from nvflare.app_common.abstract.fl_model import FLModel

from nvflare_fm import transforms
from nvflare_fm.adapter import Adapter, AdapterUpdate, RoundTask
from nvflare_fm.config import Aggregation, SiteOverrides, TaskPlan
from nvflare_fm.errors import ConfigError, FmError, WireError
from nvflare_fm.flare import wire
from nvflare_fm.flare.aggregator import AdapterAggregator
from nvflare_fm.flare.controller import FedPEFT
from nvflare_fm.flare.ledger import Ledger
from nvflare_fm.flare.recipe import FedPEFTRecipe
from nvflare_fm.job.settle import settle
from nvflare_fm.transforms.packed import pack
from tests.codes import refused

from .messages import MANIFEST, PLAN, SETTLED, adapter, same, update


def opened(
    task: RoundTask | None = None, sites: dict[str, SiteOverrides] | None = None, **settings: Any
) -> AdapterAggregator:
    aggregator = AdapterAggregator(settings)
    settled = replace(settle(PLAN, Aggregation(), sites), aggregation=aggregator.aggregation)  # some suit another task
    aggregator.begin(task or RoundTask(PLAN), settled)
    return aggregator


def arrival(sent: AdapterUpdate) -> FLModel:
    model = wire.write_update(sent)
    model.meta["client_name"] = sent.site
    return model


def test_the_result_is_the_same_bits_for_every_order_of_arrival() -> None:
    updates = [update(f"site-{i}", seed=i, examples=3 + 7 * i, scale=1.0 + i) for i in range(4)]
    sites = {f"site-{i}": SiteOverrides(lora_alpha=3.0 * (1 + i)) for i in range(4)}
    results = []
    for order in permutations(updates):
        aggregator = opened(RoundTask(PLAN, adapter(9), MANIFEST, 1, 2), sites, weigh=["examples"])
        for one in order:
            aggregator.accept_model(arrival(one))
        model = aggregator.aggregate_model()
        results.append((wire.read_saved(model.params, model.meta, "test").adapter, model.metrics))
    assert all(same(a, results[0][0]) and m == results[0][1] for a, m in results)


@pytest.mark.parametrize("kind", [AdapterAggregator, FedPEFTRecipe])
def test_what_a_job_leaves_out_is_what_the_settings_say(kind: type) -> None:
    said, usual = signature(kind).parameters, Aggregation().model_dump()
    assert {name: said[name].default for name in usual if name in said} == {n: usual[n] for n in usual if n in said}


INT8 = TaskPlan.read(PLAN.model_dump() | {"uplink": ["int8"], "downlink": ["int8"]}, "plan")


def encoded_round(whole: Adapter) -> tuple[AdapterAggregator, RoundTask]:
    """A round whose task travels in int8, as the sites read it."""
    chain = transforms.read(INT8.downlink, "downlink")
    task = RoundTask(INT8, pack(whole, chain, "the server").adapter(), MANIFEST, 1, 2)
    aggregator = AdapterAggregator()
    aggregator.begin(task, replace(settle(PLAN, Aggregation()), aggregation=aggregator.aggregation), whole)
    return aggregator, task


def encoded_arrival(sent: AdapterUpdate) -> FLModel:
    model = wire.write_update(sent, pack(sent.adapter, transforms.read(INT8.uplink, "uplink"), sent.site))
    model.meta["client_name"] = sent.site
    return model


def test_what_a_site_changed_of_the_rounded_adapter_is_added_to_the_exact_one() -> None:
    """A site that changed nothing changes nothing, and what the encoding rounded away is not lost."""
    whole = adapter(9)
    aggregator, task = encoded_round(whole)
    received = Adapter({n: p.rescaled(4.0) for n, p in task.adapter.lora.items()}, dict(task.adapter.dense))
    aggregator.accept_model(encoded_arrival(replace(update("alder", 0), adapter=received)))
    aggregator.aggregate_model()
    assert aggregator.combined
    for layer, pair in aggregator.combined.adapter.lora.items():
        torch.testing.assert_close(pair.delta(), whole.lora[layer].delta(), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(received.lora[layer].delta(), whole.lora[layer].delta(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(aggregator.combined.adapter.dense, dict(whole.dense))


def test_where_nothing_can_be_merged_the_exact_adapter_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = adapter(9)
    aggregator, _ = encoded_round(whole)
    aggregator.accept_model(encoded_arrival(update("alder", 0)))
    monkeypatch.setattr("nvflare_fm.flare.aggregator.combine", lambda *_: 1 / 0)
    model = aggregator.aggregate_model()
    assert same(wire.read_saved(model.params, model.meta, "test").adapter, whole)


def test_an_update_that_is_not_encoded_as_the_plan_asks_does_not_count() -> None:
    aggregator, _ = encoded_round(adapter(9))
    with pytest.raises(WireError) as refused:
        aggregator.accept_model(arrival(update("alder", 0)))
    assert refused.value.code == "other_encoding"
    assert not aggregator.updates


def test_metrics_are_means_by_the_weights_of_the_merge() -> None:
    aggregator = opened(weigh=["examples"])
    for one in (update("alder", 0, examples=30), update("birch", 1, examples=10)):
        aggregator.accept_model(arrival(one))
    assert aggregator.aggregate_model().metrics == {"loss": pytest.approx(0.75 * 3 + 0.25 * 4)}


def test_a_late_answer_counts_by_its_age_and_says_nothing_about_this_rounds_adapter() -> None:
    began, now = (RoundTask(PLAN, adapter(seed), MANIFEST, seed, 9) for seed in (3, 6))
    aggregator, ledger = opened(now, weigh=["staleness"], max_staleness=3), Ledger(6, 9, ["birch"], 0)
    aggregator.accept_model(arrival(update("alder", 0)), began)
    aggregator.accept_model(arrival(update("birch", 1)))
    assert aggregator.aggregate_model().metrics == {"loss": 4.0}
    assert aggregator.combined
    ledger.close(aggregator.combined, aggregator.updates)
    assert ledger.line.metrics == {"loss": 4.0}
    sites = ledger.line.sites
    assert [(s.staleness, s.weight) for s in sites.values()] == [
        (3, pytest.approx(1 / 3)),
        (0, pytest.approx(2 / 3)),
    ]
    assert sites["alder"].bytes_up == sites["birch"].bytes_up


def test_the_description_of_the_adapter_is_attached_every_round() -> None:
    aggregator = opened()
    aggregator.accept_model(arrival(update("alder", 0)))
    model = aggregator.aggregate_model()
    assert wire.read_saved(model.params, model.meta, "test").manifest == MANIFEST


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_rejected_by_site_and_tensor(poison: float) -> None:
    model = arrival(update("alder", 0))
    model.params["head"] = torch.tensor([1.0, poison])
    with refused("not_finite", WireError, "alder", "'head'"):
        opened().accept_model(model)


def test_a_round_starts_without_the_updates_of_the_last() -> None:
    aggregator = opened()
    aggregator.accept_model(arrival(update("alder", 0)))
    aggregator.begin(RoundTask(PLAN), SETTLED)
    aggregator.accept_model(arrival(update("birch", 1)))
    aggregator.aggregate_model()
    assert aggregator.combined
    assert set(aggregator.combined.weights) == {"birch"}


@pytest.mark.parametrize("settings", [{"merge": "exakt"}, {"weigh": ["example"]}, {"sigma": "C"}, {"max_rank": -1}])
def test_an_unknown_rule_is_refused_while_the_job_loads(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        FedPEFT(plan={}, aggregator=AdapterAggregator(settings))


def test_nobody_can_be_late_where_a_round_waits_for_all() -> None:
    how = AdapterAggregator({"max_staleness": 1})
    with refused("nobody_late", ConfigError, "grace_s"):
        FedPEFT(plan={}, aggregator=how)
    FedPEFT(plan={}, aggregator=how, deadline_s=9)


@pytest.mark.parametrize(
    ("sent_in", "now", "counts"), [(1, 2, True), (1, 3, True), (1, 4, False), (0, 1, False), (4, 5, False)]
)
def test_an_answer_counts_while_it_is_not_too_old_there_was_an_adapter_and_a_round_to_come(
    sent_in: int, now: int, counts: bool
) -> None:
    """Five rounds, two of which an answer may be late; with the sixth number the last adapter is only measured."""
    controller = FedPEFT(num_rounds=5, aggregator=AdapterAggregator({"max_staleness": 2}), grace_s=1)
    began = RoundTask(PLAN, adapter(1) if sent_in else Adapter(), MANIFEST, sent_in, 5)
    controller.fl_ctx = FLContext()
    controller.aggregator.begin(
        RoundTask(PLAN, adapter(2), MANIFEST, now, 5), settle(PLAN, controller.aggregator.aggregation)
    )
    controller.ledger = Ledger(now, 5, ["birch"], 0)
    assert controller._take(arrival(update("alder", 0)), began) is counts
    assert controller.ledger.late == ([] if counts else ["alder"])
    assert [*controller.aggregator.updates] == (["alder"] if counts else [])


@pytest.mark.parametrize(
    ("settings", "report", "code"),
    [
        ({"weigh": ["loss"]}, {"before": {}}, "no_loss"),
        ({"weigh": ["examples", "skew"]}, {}, "no_label_skew"),
        ({"weigh": ["skew"]}, {"label_skew": float("nan")}, "wrong_type"),
        ({"normalize_steps": True}, {"steps": 0}, "steps_not_in_plan"),
        ({"normalize_steps": True}, {"steps": None}, "steps_not_in_plan"),
        ({"weigh": ["examples"]}, {"examples": None}, "no_count"),
        ({}, {"max_weight": 0.0}, "wrong_type"),
        ({}, {"max_weight": float("nan")}, "wrong_type"),
    ],
)
def test_a_site_that_cannot_be_weighed_is_left_out_and_does_not_stop_the_round(
    settings: dict[str, Any], report: dict[str, Any], code: str
) -> None:
    aggregator, faulty, sound = opened(**settings), update("alder", 0), update("birch", 1)
    sound = replace(sound, report=replace(sound.report, label_skew=0.2, steps=PLAN.training.local_steps))
    with refused(code, FmError, "alder"):
        aggregator.accept_model(arrival(replace(faulty, report=replace(faulty.report, **report))))
    aggregator.accept_model(arrival(sound))
    aggregator.aggregate_model()
    assert aggregator.combined
    assert dict(aggregator.combined.weights) == {"birch": 1.0}
