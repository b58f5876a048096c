"""Reading is not free: in a round each tensor of a site is fetched three times at most, whatever rules are asked for.

Once to be admitted, once to be measured against the others, once to be merged.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from nvflare.app_common.abstract.fl_model import FLModel
from nvflare.app_opt.pt.lazy_tensor_dict import _LazyRef

from nvflare_fm.adapter import LORA_A, Adapter, AdapterUpdate, RoundTask
from nvflare_fm.aggregation import guard, merge, step, weigh
from nvflare_fm.aggregation.needed import needed
from nvflare_fm.config import Aggregation, RoundPlan
from nvflare_fm.flare import wire
from nvflare_fm.flare.aggregator import AdapterAggregator
from nvflare_fm.flare.ledger import Ledger
from nvflare_fm.job.settle import settle

from . import messages
from .messages import adapter, update
from .test_wire import on_disk

SITES = ("alder", "birch", "cedar", "dogwood")
LABELS = ("calm", "ill")
MANIFEST = replace(messages.MANIFEST, task="sequence_classification", labels=LABELS)
ASKED = RoundPlan(task="sequence_classification", labels=LABELS, peft={"method": "lora", "rank": 3, "lora_alpha": 12})


@pytest.fixture(scope="module")
def waiting(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[FLModel]]:
    """What four sites send, left on disk: whole pairs, or A alone. One site goes far, so that a guard has work."""
    sent: dict[str, list[FLModel]] = {"AB": [], "A": []}
    for seed, site in enumerate(SITES):
        one = update(site, seed)
        report = replace(one.report, label_skew=0.2, steps=ASKED.training.local_steps)
        far = {n: replace(p, B=(1 + 40 * (site == "dogwood")) * p.B) for n, p in one.adapter.lora.items()}
        dense = {**one.adapter.dense, **{n + LORA_A: p.A for n, p in one.adapter.lora.items()}}
        for shares, its in (("AB", Adapter(far, one.adapter.dense)), ("A", Adapter({}, dense))):
            message = on_disk(
                wire.write_update(AdapterUpdate(site, its, MANIFEST, report)), tmp_path_factory.mktemp(site)
            )
            message.meta["client_name"] = site
            sent[shares].append(message)
    return sent


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[str, str]]:
    """How often each tensor is read from disk, by the file it lies in and its name."""
    read, times = _LazyRef.materialize, Counter[tuple[str, str]]()

    def counted(ref: _LazyRef) -> torch.Tensor:
        times[ref.file_path, ref.key] += 1
        return read(ref)

    monkeypatch.setattr(_LazyRef, "materialize", counted)
    return times


def a_round(sent: Mapping[str, list[FLModel]], when: str, **settings: Any) -> AdapterAggregator:
    """A whole round at the server, to the line that it writes about it."""
    rule = merge.registry[settings.get("merge", "exact")]
    how = Aggregation.read({"max_staleness": 1 if when == "late" else 0, **settings}, "aggregator")
    settled = settle(ASKED, how)
    whole, began = adapter(9), adapter(8)
    if rule.shares == "A":
        whole = Adapter({}, {**whole.dense, **{n + LORA_A: p.A for n, p in whole.lora.items()}})
    aggregator = AdapterAggregator(how.model_dump())
    start = (Adapter(), None) if when == "first" else (whole, MANIFEST)
    aggregator.begin(RoundTask(settled.plan, *start, 5, 9), settled)
    for place, message in enumerate(sent[rule.shares]):
        is_late = when == "late" and place == 0
        aggregator.accept_model(message, RoundTask(settled.plan, began, MANIFEST, 4, 9) if is_late else None)
    aggregator.aggregate_model()
    assert aggregator.combined
    assert not aggregator.combined.failed
    Ledger(5, 9, [*SITES], 0).close(aggregator.combined, aggregator.updates)
    return aggregator


def whens(rule: str) -> list[str]:
    return ["first", "later", *(["late"] if merge.registry[rule].delta else [])]


def together(rule: str) -> dict[str, Any]:
    """Every weight factor and guard that goes with a rule, and the step that looks at the sites' changes if one may."""
    promises, pairs = merge.registry[rule], merge.registry[rule].shares == "AB"
    names = [n for n in weigh.registry if n not in (("staleness",) if pairs else ("staleness", "agreement", "norm"))]
    steps = {"step": "fedexp"} if promises.canonical else {}
    guards = [n for n in guard.registry if promises.sums or not (pairs and guard.registry.needs([n]).sums)]
    return {"merge": rule, "guard": guards, "weigh": names, **steps}


TOGETHER = [(together(rule), when) for rule in merge.registry for when in whens(rule)]
ALONE = [({"weigh": [name]}, "later") for name in weigh.registry if name != "staleness"]
ALONE += [({"step": name, "guard": []}, "later") for name in step.registry]
ALONE += [({"guard": [name]}, when) for name in guard.registry for when in ("first", "late")]
ALONE += [({"step": name, "weigh": ["staleness", "agreement"]}, "late") for name in step.registry]


@pytest.mark.usefixtures("malformed_allowed")  # the checks of a test run would fetch values to look at them
@pytest.mark.parametrize(("settings", "when"), TOGETHER + ALONE, ids=str)
def test_each_tensor_of_a_site_is_fetched_three_times_at_most(
    waiting: Mapping[str, list[FLModel]], fetched: Counter[tuple[str, str]], settings: dict[str, Any], when: str
) -> None:
    settled = a_round(waiting, when, **settings).settled
    assert len(fetched) == 4 * 5 - 4 * 2 * (settings.get("merge") == "share_a")
    assert max(fetched.values()) == 2 + bool(needed(settled.aggregation).reads), fetched.most_common(3)
