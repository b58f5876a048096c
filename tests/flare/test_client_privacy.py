"""Client-level differential privacy at the server: what it refuses before a round, does in one, and writes down."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.app_common.abstract.fl_model import FLModel

from nvflare_fm.adapter import RoundTask
from nvflare_fm.errors import ConfigError
from nvflare_fm.export.folder import Saved
from nvflare_fm.flare import aggregator, wire
from nvflare_fm.flare.aggregator import AdapterAggregator
from nvflare_fm.flare.controller import FedPEFT
from nvflare_fm.flare.ledger import Ledger
from nvflare_fm.privacy import gaussian
from nvflare_fm.record.result import explanation, read_result
from nvflare_fm.record.round import read_line, written
from tests.codes import refused

from .messages import MANIFEST, PLAN, adapter, same, update

SITES, NORM = ("alder", "birch", "cedar"), 0.5
PRIVATE = {"noise_multiplier": 2.0, "max_norm": NORM, "expected_sites": 4}


def server(**more: Any) -> FedPEFT:
    how = {"merge": "freeze_a", "client_privacy": PRIVATE | more.pop("private", {})}
    given = {"num_rounds": 9, "plan": {"peft": dict(PLAN.peft)}, "key_metric": ""} | more
    made = FedPEFT(aggregator=AdapterAggregator(how), **given)
    made.fl_ctx = FLContext()
    made.fl_ctx.set_prop(FLContextKey.RUNNER, runner(made), private=True)
    return made


def runner(*controllers: Any) -> Any:
    """What a job's server runs, as NVFlare's runner holds it."""
    return SimpleNamespace(config=SimpleNamespace(workflows=[SimpleNamespace(controller=each) for each in controllers]))


def answered(made: FedPEFT, number: int = 3) -> FedPEFT:
    made.ledger = Ledger(number, 9, list(SITES), 0)
    made.aggregator.begin(RoundTask(made.settled.plan, adapter(9), MANIFEST, number, 9), made.settled)
    for seed, site in enumerate(SITES):
        model = wire.write_update(update(site, seed))
        model.meta["client_name"] = site
        assert made._take(model)
    return made


def kept(model: FLModel) -> Any:
    saved = wire.read_saved(model.params, model.meta, "test")
    assert saved
    return saved.adapter


def test_a_round_is_clipped_noised_and_written_down_with_what_it_has_cost(tmp_path: Path) -> None:
    made = answered(server())
    once, again = kept(made.aggregator.aggregate_model()), kept(made.aggregator.aggregate_model())
    assert not same(once, again)
    assert all(torch.equal(once.lora[name].A, adapter(9).lora[name].A) for name in once.lora)
    assert made.aggregator.combined.weights == dict.fromkeys(SITES, 0.25)
    made.ledger.close(made.aggregator.combined, made.aggregator.updates, made.settled.aggregation.model_dump())
    line = read_line(written(made.ledger.line))
    assert line.noised is not None
    assert (line.noised.clipped, line.noised.expected_sites, line.noised.max_norm) == (3, 4, NORM)
    assert line.noised.epsilon == pytest.approx(gaussian.epsilon(2.0, 4, 1e-5))
    assert {*line.scaled} == {*SITES}
    made.ledger.write(tmp_path)
    told = [*explanation(read_result(tmp_path))]
    assert any(text.startswith(f"ε of the job to each site as a whole: {line.noised.epsilon:.3g} ") for text in told)


def test_a_merge_that_fails_leaves_nobody_out_by_what_was_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(*_: Any) -> None:
        raise RuntimeError("nobody knows why")

    made = answered(server())
    monkeypatch.setattr(aggregator, "combine_noised", breaks)
    monkeypatch.setattr(aggregator, "without_the_largest", lambda *_: pytest.fail("a choice that no noise covers"))
    assert same(kept(made.aggregator.aggregate_model()), adapter(9))
    assert "nobody knows why" in made.aggregator.combined.failed


def test_a_best_round_is_refused_when_the_job_loads() -> None:
    with refused("client_best", ConfigError, "key_metric"):
        server(key_metric="loss")


def test_the_server_begins_no_job_without_an_adapter_beside_another_workflow_or_without_hope() -> None:
    started = wire.write_saved(Saved(adapter(1), MANIFEST))
    assert server()._first_round(started) == 0
    with refused("client_start", ConfigError, "initial_adapter"):
        server()._first_round(FLModel(params={}))
    with refused("client_noise_hopeless", ConfigError):
        server(private={"noise_multiplier": 1e3})._first_round(started)
    beside = server()
    beside.fl_ctx.set_prop(FLContextKey.RUNNER, runner(beside, object()), private=True)
    with refused("client_alone", ConfigError):
        beside._first_round(started)
