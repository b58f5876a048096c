"""The account of a round says what each site did, in numbers."""

from dataclasses import replace
from pathlib import Path

import pytest

from nvflare_fm.adapter import Adapter
from nvflare_fm.aggregation.combine import combine
from nvflare_fm.config import Aggregation
from nvflare_fm.errors import ModelError
from nvflare_fm.flare.ledger import Ledger
from nvflare_fm.record.round import FILE_NAME
from tests.flare import messages


def test_a_round_s_account_holds_each_site_s_weight_speed_and_bytes():
    first, second = messages.update("alder", 0, examples=10), messages.update("birch", 1, examples=30)
    first = replace(first, report=replace(first.report, tokens=300, seconds=2.0))
    ledger = Ledger(0, 1, ["alder", "birch"], 0)
    ledger.close(
        combine(Adapter(), None, [first, second], Aggregation(weigh=["examples"]), 8), {"alder": first, "birch": second}
    )
    sites = ledger.line.sites
    assert (sites["alder"].weight, sites["birch"].weight) == (0.25, 0.75)
    assert sites["alder"].tokens_per_s == 150.0
    assert sites["alder"].bytes_up == sum(t.numel() * 4 for t in first.adapter.tensors().values())


def test_an_account_that_cannot_be_written_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).mkdir()
    with pytest.raises(ModelError) as raised:
        Ledger(0, 1, ["alder"], 0).write(tmp_path)
    assert raised.value.code == "rounds_not_written"
