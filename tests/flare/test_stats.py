"""What `nvflare job monitor` and `nvflare job stats` are told of a round, and when."""

import threading
import time

import pytest
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext, FLContextManager
from nvflare.tool.job.job_cli import _build_monitor_key_aliases, _extract_monitor_metrics
from nvflare.widgets.info_collector import GroupInfoCollector, InfoCollector

from nvflare_fm.flare.ledger import Ledger
from nvflare_fm.flare.stats import PROGRESS, TOLD, RoundStats, let_be_seen
from nvflare_fm.record.reason import Reason


def told(ledger: Ledger | None, event: str = InfoCollector.EVENT_TYPE_GET_STATS) -> dict:
    collector, fl_ctx = GroupInfoCollector(), FLContext()
    fl_ctx.set_prop(InfoCollector.CTX_KEY_STATS_COLLECTOR, collector, private=True, sticky=False)
    if ledger:
        fl_ctx.set_prop(PROGRESS, ledger.progress({"loss": 1.5, "accuracy": 0.75}), private=True, sticky=False)
    RoundStats().handle_event(event, fl_ctx)
    return collector.info


def a_round() -> Ledger:
    ledger = Ledger(1, 5, ["alder", "birch", "cedar"], 0, answered=["birch", "alder"], late=["dogwood"])
    ledger.out["cedar"] = Reason("refused", "rank 99 is more than the 8 this site allows")
    return ledger


def test_the_round_the_metrics_and_who_is_in_or_out_and_why_are_told():
    assert told(a_round()) == {
        "nvflare_fm": {
            "round": 1,
            "num_rounds": 5,
            "loss": 1.5,
            "accuracy": 0.75,
            "sites_in": "alder, birch",
            "sites_out": "cedar: refused: rank 99 is more than the 8 this site allows",
            "late": "dogwood",
        }
    }


def test_nvflares_monitor_finds_round_and_metrics_by_itself_and_the_sites_when_asked():
    found = _extract_monitor_metrics({"server": told(a_round())}, _build_monitor_key_aliases(["sites_in"]))
    assert found == {"round": 1, "loss": 1.5, "accuracy": 0.75, "sites_in": "alder, birch"}


def test_a_site_that_answered_and_was_rejected_after_is_not_in():
    ledger = a_round()
    ledger.out["birch"] = Reason("rejected", "layers differ")
    assert told(ledger)["nvflare_fm"]["sites_in"] == "alder"


def test_nothing_is_told_before_the_first_round_or_unasked():
    assert told(None) == {}
    assert told(a_round(), EventType.START_RUN) == {}


def kept_s(manager: FLContextManager, failed: bool = False) -> float:
    """How long a job is kept before it ends."""
    started = time.monotonic()
    let_be_seen(manager.new_context(), lambda: time.monotonic() > started + 1, failed)
    return time.monotonic() - started


def asked(manager: FLContextManager, ago_s: float = 0) -> None:
    RoundStats().handle_event(InfoCollector.EVENT_TYPE_GET_STATS, fl_ctx := manager.new_context())
    fl_ctx.set_prop(TOLD, time.monotonic() - ago_s, private=True, sticky=True)


def test_a_job_that_is_watched_ends_once_its_last_account_was_told():
    manager = FLContextManager()
    asked(manager, ago_s=8)
    threading.Timer(0.3, asked, [manager]).start()
    assert 0.3 <= kept_s(manager) < 0.8


@pytest.mark.parametrize(("ago_s", "least", "most"), [(None, 0, 0.1), (60, 0, 0.1), (5, 0.9, 1.3)])
def test_a_job_that_nobody_watches_ends_at_once(ago_s: float | None, least: float, most: float):
    manager = FLContextManager()
    if ago_s is not None:
        asked(manager, ago_s)
    assert least <= kept_s(manager) < most


def test_a_job_that_fails_at_once_is_kept_a_moment_for_who_submitted_it_but_not_in_a_simulation():
    manager = FLContextManager()
    assert 0.9 <= kept_s(manager, failed=True) < 1.3  # until it is told to stop
    manager.new_context().set_prop(FLContextKey.SIMULATE_MODE, True, private=True, sticky=True)
    assert kept_s(manager, failed=True) < 0.1
