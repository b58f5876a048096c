"""Which site a job is told to be gone, and how often."""

from dataclasses import dataclass, field
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import RunProcessKey
from nvflare.apis.fl_context import FLContext

from nvflare_fm.flare.restarted import RestartedSites, gone


@dataclass(frozen=True)
class Client:
    name: str


tokens = st.dictionaries(st.sampled_from("123456"), st.builds(Client, st.sampled_from("abc")), max_size=4)


@given(at_start=st.dictionaries(st.sampled_from(["j", "k"]), tokens), now=tokens)
def test_a_site_is_gone_where_it_is_here_under_another_token(at_start: dict[str, Any], now: dict[str, Client]) -> None:
    running = {job: {RunProcessKey.PARTICIPANTS: participants} for job, participants in at_start.items()}
    here = {client.name: token for token, client in now.items()}
    expected = {
        (job, client.name, here[client.name])
        for job, participants in at_start.items()
        for token, client in participants.items()
        if client.name in here and token not in now
    }
    assert set(gone(running, now)) == expected


def test_a_job_without_an_account_of_its_sites_has_none_that_is_gone() -> None:
    assert not list(gone({"j": {}, "k": {RunProcessKey.PARTICIPANTS: None}}, {"1": Client("a")}))


@dataclass
class Engine:
    """As much of NVFlare's as the component speaks with."""

    clients: dict[str, Client]
    run_processes: dict[str, Any]
    told: list[tuple[str, str]] = field(default_factory=list)
    resolved: list[tuple[str, str]] = field(default_factory=list)

    @property
    def client_manager(self) -> "Engine":
        return self

    @property
    def job_runner(self) -> "Engine":
        return self

    def notify_dead_job(self, job_id: str, site: str, reason: str) -> None:
        self.told.append((job_id, site))

    def resolve_client_outcome(self, job_id: str, site: str) -> None:
        self.resolved.append((job_id, site))


def test_a_job_is_told_once_for_each_time_that_a_site_is_started() -> None:
    engine = Engine({"1": Client("a"), "2": Client("b")}, {"j": {RunProcessKey.PARTICIPANTS: {"1": Client("a")}}})
    component, fl_ctx = RestartedSites(), FLContext()
    fl_ctx.get_engine = lambda: engine  # type: ignore[method-assign]

    def after(clients: dict[str, Client], event: str = EventType.CLIENT_REGISTER_PROCESSED) -> int:
        engine.clients = clients
        component.handle_event(event, fl_ctx)
        assert engine.told == engine.resolved == [("j", "a")] * len(engine.told)
        return len(engine.told)

    assert after({"1": Client("a"), "3": Client("b")}) == 0  # b is in no job
    assert after({"4": Client("a")}, EventType.CLIENT_HEARTBEAT_PROCESSED) == 0
    assert after({"4": Client("a")}) == 1
    assert after({"4": Client("a"), "5": Client("b")}) == 1  # another's registration
    assert after({"6": Client("a")}) == 2
