"""When a round is over: all have answered, the grace time after enough answers has passed, or the deadline."""

from types import SimpleNamespace

import pytest
from nvflare.apis.signal import Signal

from nvflare_fm.flare import rounds
from nvflare_fm.flare.controller import FedPEFT

NEVER = 1e9


def ends(monkeypatch: pytest.MonkeyPatch, enough: float, all_in: float, **settings: float) -> float:
    """Seconds until a round ends in which the second of three answers comes after `enough`, the last after `all_in`."""
    clock = [0.0]
    monkeypatch.setattr(
        rounds,
        "time",
        SimpleNamespace(monotonic=lambda: clock[0], sleep=lambda s: clock.__setitem__(0, clock[0] + s)),
    )
    flow = FedPEFT(min_responses=2, **settings)
    flow.abort_signal = Signal()
    flow.ledger = SimpleNamespace(usable=lambda: 1 + (clock[0] >= enough) + (clock[0] >= all_in))
    monkeypatch.setattr(flow.standing, "working", lambda: {"slow"} if clock[0] < all_in else set())

    class Asked:
        completion_status = property(lambda _: "done" if clock[0] >= all_in else None)

    flow._wait(Asked())
    return clock[0]


@pytest.mark.parametrize(
    ("enough", "all_in", "settings", "end"),
    [
        (3, 7, {}, 7),
        (3, 5000, {}, 5000),  # it waits for every site
        (3, NEVER, {"grace_s": 5}, 8),
        (3, 4, {"grace_s": 5}, 4),
        (3, NEVER, {"deadline_s": 30}, 30),  # enough are in, and the round goes on without the slow one
        (NEVER, NEVER, {"deadline_s": 30}, 30),
        (28, NEVER, {"grace_s": 5, "deadline_s": 30}, 30),
        (3, NEVER, {"grace_s": 5, "deadline_s": 30}, 8),
    ],
)
def test_a_round_ends(
    monkeypatch: pytest.MonkeyPatch, enough: float, all_in: float, settings: dict[str, float], end: float
) -> None:
    assert ends(monkeypatch, enough, all_in, **settings) == pytest.approx(end, abs=0.5)
