"""A round is called off by the server alone, and only the server gives a site work."""

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nvflare.apis.fl_constant import FLContextKey, ReservedTopic, ReturnCode
from nvflare.apis.fl_context import FLContextManager
from nvflare.apis.shareable import ReservedHeaderKey, Shareable, make_reply
from nvflare.apis.signal import Signal
from nvflare.app_common.app_constant import AppConstants
from nvflare.private.aux_runner import AuxRunner

from nvflare_fm.flare import wire
from nvflare_fm.flare.controller import FedPEFT
from nvflare_fm.flare.executor import PeftExecutor, serve_the_server_only

TASK, ROUND = "5f0c1e0e-3a52-4d5c-9d57-1f0a6c3f8f6e", 3
done: list[str] = []


class Site:
    """A site at a task, and NVFlare's part that hands it messages: they bear the word of their sender about itself."""

    def __init__(self) -> None:
        self.stop, self.messages = Signal(), AuxRunner(None)
        self.messages.register_aux_message_handler(ReservedTopic.DO_TASK, self._nvflares)
        self.executor = PeftExecutor()
        self.executor._gate = SimpleNamespace(decide=lambda *_: make_reply(ReturnCode.OK))
        serve_the_server_only(SimpleNamespace(aux_runner=self.messages))
        self.messages.register_aux_message_handler(wire.ROUND_OVER, self.executor._call_off)
        self.context = FLContextManager(None, "clinic", "job").new_context()
        self.context.set_prop(FLContextKey.TASK_ID, TASK, private=True, sticky=False)
        task = Shareable()
        task.set_header(AppConstants.CURRENT_ROUND, ROUND)
        self.executor.execute("train", task, self.context, self.stop)

    def _nvflares(self, topic: str, request: Shareable, fl_ctx: Any) -> Shareable:
        done.append(topic)
        return make_reply(ReturnCode.OK)

    def hear(self, topic: str, **headers: Any) -> Shareable:
        message = Shareable()
        for key, value in {ReservedHeaderKey.TASK_ID: None, AppConstants.CURRENT_ROUND: ROUND, **headers}.items():
            message.set_header(key, value)
        message.set_peer_props({"__identity_name__": "server", "__run_num__": "job"})  # whoever it is
        return self.messages.dispatch(topic, message, self.context)


def test_who_does_not_know_the_task_calls_nothing_off() -> None:
    site = Site()  # one for all names: NVFlare takes most of a second to make it

    @given(st.none() | st.text(max_size=40) | st.integers() | st.sampled_from([[TASK], TASK.upper(), TASK[:-1]]))
    def hears(name: Any) -> None:
        site.hear(wire.ROUND_OVER, **{ReservedHeaderKey.TASK_ID: name})
        assert not site.stop.triggered

    hears()


def test_who_sent_the_task_can_call_it_off() -> None:
    site = Site()
    site.hear(wire.ROUND_OVER, **{ReservedHeaderKey.TASK_ID: TASK})
    assert site.stop.triggered


def test_a_site_without_a_task_has_nothing_to_call_off() -> None:
    executor = PeftExecutor()
    executor._call_off(wire.ROUND_OVER, Shareable(), None)
    assert not executor._at[1].triggered


def test_no_other_site_can_give_a_site_a_task() -> None:
    done.clear()
    assert Site().hear(ReservedTopic.DO_TASK).get_return_code() == ReturnCode.TOPIC_UNKNOWN
    assert not done


def test_the_server_tells_each_site_the_name_of_its_own_task_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    controller, sent = FedPEFT(), {}
    names = {site: f"task of {site}" for site in ("alder", "birch", "cedar")}
    fetched = [
        SimpleNamespace(client=SimpleNamespace(name=site), id=name, result_received_time=site == "cedar")
        for site, name in names.items()
    ]
    asked = SimpleNamespace(completion_status=None, targets=[*names, "never came"], client_tasks=fetched)
    controller.engine = SimpleNamespace(
        multicast_aux_requests=lambda topic, messages, *_, **__: sent.update({topic: messages})
    )
    controller.fl_ctx, controller.abort_signal = None, Signal()
    monkeypatch.setattr(controller, "cancel_task", lambda *_, **__: None)
    controller._call_off(asked)
    told = {site: message.get_header(ReservedHeaderKey.TASK_ID) for site, message in sent[wire.ROUND_OVER].items()}
    assert told == {site: names[site] for site in ("alder", "birch")}
