"""What `nvflare job monitor` and `nvflare job stats` are told of a round, and when."""

from nvflare.apis.event_type import EventType
from nvflare.apis.fl_context import FLContext
from nvflare.tool.job.job_cli import _build_monitor_key_aliases, _extract_monitor_metrics
from nvflare.widgets.info_collector import GroupInfoCollector, InfoCollector

from nvflare_fm.flare.ledger import Ledger
from nvflare_fm.flare.stats import PROGRESS, RoundStats


def told(ledger: Ledger | None, event: str = InfoCollector.EVENT_TYPE_GET_STATS) -> dict:
    collector, fl_ctx = GroupInfoCollector(), FLContext()
    fl_ctx.set_prop(InfoCollector.CTX_KEY_STATS_COLLECTOR, collector, private=True, sticky=False)
    if ledger:
        fl_ctx.set_prop(PROGRESS, ledger.progress({"loss": 1.5, "accuracy": 0.75}), private=True, sticky=False)
    RoundStats().handle_event(event, fl_ctx)
    return collector.info


def a_round() -> Ledger:
    ledger = Ledger(1, 5, ["alder", "birch", "cedar"], 0, answered=["birch", "alder"], late=["dogwood"])
    ledger.out["cedar"] = "refused: rank 99 is more than the 8 this site allows"
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
    ledger.out["birch"] = "rejected: layers differ"
    assert told(ledger)["nvflare_fm"]["sites_in"] == "alder"


def test_nothing_is_told_before_the_first_round_or_unasked():
    assert told(None) == {}
    assert told(a_round(), EventType.START_RUN) == {}
