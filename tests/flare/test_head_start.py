"""The start of a head at the server: what is no sums counts as none, and comes before any round."""

from collections.abc import Callable

import pytest
import torch
from nvflare.apis.fl_context import FLContext
from nvflare.app_common.abstract.fl_model import FLModel

from nvflare_fm.adapter import Adapter, AdapterUpdate, Manifest, Report, RoundTask
from nvflare_fm.flare import controller, wire
from nvflare_fm.flare.controller import FedPEFT
from nvflare_fm.flare.ledger import Ledger
from nvflare_fm.record.reason import Reason
from nvflare_fm.synthesis.features import COUNTS, NAMES, SQUARES, SUMS
from tests.strategies import identical
from tests.synthesis.test_features import rows, summed

PLAN = {"task": "sequence_classification", "labels": ["calm", "ill"], "head_start": "features"}
HONEST = summed(*rows(40, 3, 2, 0), 2).tensors()


def sums(site: str = "alder", task: str = PLAN["task"], **changed: torch.Tensor) -> FLModel:
    """A site's sums, as the server gets them."""
    names = dict(zip(("sums", "counts", "squares"), NAMES, strict=True))
    tensors = {**HONEST, **{names.get(name, name): value for name, value in changed.items()}}
    update = AdapterUpdate(site, Adapter(dense=tensors), Manifest("base-1", task, "lora"), Report())
    model = wire.write_update(update)
    model.meta["client_name"] = site
    return model


@pytest.fixture
def server() -> FedPEFT:
    made = FedPEFT(plan=PLAN)
    made.fl_ctx, made._open = FLContext(), RoundTask(made.settled.summing)
    made.ledger = Ledger(0, 1, ["alder", "birch"], 0)
    return made


def test_sums_are_kept_as_they_came(server: FedPEFT):
    assert server._came(server._open, sums())
    assert server.ledger.answered == ["alder"]
    assert all(torch.equal(server._sums["alder"].adapter.dense[name], HONEST[name]) for name in (SUMS, COUNTS, SQUARES))


@pytest.mark.parametrize(
    ("wrong", "code"),
    [
        (lambda: sums(more=torch.ones(2)), "other_layers"),
        (lambda: sums(counts=torch.ones(3)), "sums_shape"),
        (lambda: sums(squares=-HONEST[SQUARES]), "sums_impossible"),
        (lambda: sums(sums=HONEST[SUMS] * float("nan")), "not_finite"),
        (lambda: sums(squares=HONEST[SQUARES] * 1e12), "values_too_large"),
        (lambda: sums(task="regression"), "other_task"),
        (lambda: wire.write_metrics({"loss": 1.0}), "incomplete_message"),
    ],
)
def test_what_is_no_sums_counts_as_none(server: FedPEFT, wrong: Callable[[], FLModel], code: str):
    model = wrong()
    model.meta["client_name"] = "alder"
    assert not server._came(server._open, model)
    assert server.ledger.out["alder"].code == code
    assert not server._sums


def test_a_site_that_keeps_its_features_to_itself_is_no_reason_to_end_the_job(server: FedPEFT):
    refusal = wire.write_refusal("this site does not tell features [kept_here]")
    refusal.meta["client_name"] = "alder"
    assert not server._came(server._open, refusal)
    assert server.ledger.out["alder"].code == "kept_here"
    assert not server._sums


@pytest.mark.parametrize("failing", [None, RuntimeError("eigh did not converge")])
def test_sums_that_give_no_head_do_not_end_the_job(
    server: FedPEFT, monkeypatch: pytest.MonkeyPatch, failing: Exception | None
):
    said: list[str] = []
    monkeypatch.setattr(server, "warning", said.append)
    if failing:

        def fails(_: object) -> None:
            raise failing

        monkeypatch.setattr(controller, "head_start", fails)
    assert server._fitted([]) is None
    assert "no_head_start" in said[0] or "eigh" in said[0]


def test_late_sums_count_as_none(server: FedPEFT):
    asked, server._open = server._open, None
    server._came(asked, sums())
    server._count_late()
    assert not server._sums
    assert server.ledger.late == ["alder"]


def test_no_round_asks_a_site_whose_labels_mean_something_else(server: FedPEFT, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(server, "_free", lambda: {"alder", "birch", "cedar"})
    server._apart = {"birch": Reason("rejected", "its labels are others", "other_labels")}
    assert server._free_sites(3) == ["alder", "cedar"]


def test_what_is_sent_to_start_with_comes_back_as_it_was():
    start = Adapter(dense={"head_start.weight": torch.randn(2, 3)})
    manifest = Manifest("base-1", "sequence_classification", "lora")
    message = wire.write_task(RoundTask(FedPEFT(plan=PLAN).settled.plan, start, manifest))
    assert wire.bytes_of(message) == 24
    assert identical(wire.read_task(message).adapter, start)
