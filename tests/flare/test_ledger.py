"""The account of a round says what each site did, in numbers."""

from dataclasses import replace

from nvflare_fm.adapter import Adapter
from nvflare_fm.aggregation.combine import combine
from nvflare_fm.config import Aggregation
from nvflare_fm.flare.ledger import Ledger
from tests.flare import messages


def test_a_round_s_account_holds_each_site_s_weight_speed_and_bytes():
    first, second = messages.update("alder", 0, examples=10), messages.update("birch", 1, examples=30)
    first = replace(first, report=replace(first.report, tokens=300, seconds=2.0))
    ledger = Ledger(0, 1, ["alder", "birch"], 0)
    ledger.close(
        combine(Adapter(), None, [first, second], Aggregation(weigh=["examples"]), 8), {"alder": first, "birch": second}
    )
    assert (ledger.sites["alder"]["weight"], ledger.sites["birch"]["weight"]) == (0.25, 0.75)
    assert ledger.sites["alder"]["tokens_per_s"] == 150.0
    assert ledger.sites["alder"]["bytes_up"] == sum(t.numel() * 4 for t in first.adapter.tensors().values())
