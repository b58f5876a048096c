"""The last station of a message before it leaves a site: what may pass is decided in `privacy/egress.py`.

`EgressFilter` stands in the site's `local/privacy.json`, in every privacy scope, so that no job can go around it.
NVFlare applies a scope's filters to the result of every task, whatever its name and whoever made it. The class derives
from `Filter`, because a `DXOFilter` lets replies without data pass unseen. `EgressGuard` stands beside it and stops
what leaves by other ways than a task's result.
"""

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from nvflare.apis.dxo import from_shareable
from nvflare.apis.event_type import EventType
from nvflare.apis.filter import Filter
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_constant import FilterKey, FLContextKey, ReservedTopic, ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import ReservedHeaderKey, Shareable, make_reply
from nvflare.apis.utils.fl_context_utils import add_job_audit_event
from nvflare.apis.utils.task_utils import contains_lazy_download_ref, materialize_lazy_download_refs
from nvflare.app_common.abstract.fl_model import FLModel
from nvflare.app_common.utils.fl_model_utils import FLModelUtils

from ..errors import FmError, PolicyError
from ..privacy import egress
from ..privacy.budget import Budget, Entry, cost
from ..privacy.disclosed import Disclosed
from ..privacy.egress import Asked, Floor
from ..privacy.protection import Protection
from ..site.offer.policy import Submitter
from ..site.offer.site_config import FILE_NAME, SiteConfig, load_site
from ..untrusted import printable
from . import wire
from .submitter import submitter

_DXO = "DXO"  # NVFlare's content type of a message with data
ASKED = "nvflare_fm.asked"  # the gate leaves the task that it has decided here
_FRAMEWORKS = {ReservedTopic.SYNC_RUNNER, ReservedTopic.JOB_HEART_BEAT, ReservedTopic.TASK_CHECK}
_CODES = {code for name, code in vars(ReturnCode).items() if not name.startswith("_") and isinstance(code, str)}
logger = logging.getLogger(__name__)


class Egress:
    """What a site lets leave, and its account of it.

    Args:
        site_file: of the site; its budget lies beside it.
        config: what the site file says; where that cannot be told, nothing but a reason leaves.
    """

    def __init__(self, site_file: Path, config: Callable[[], SiteConfig]) -> None:
        self.config, self.budget = config, Budget.beside(site_file, FILE_NAME)

    def process(self, result: Shareable, fl_ctx: FLContext) -> Shareable:
        """What leaves in the place of `result`. Whatever goes wrong costs this one message and nothing else."""
        try:
            privacy, asked = self.config().privacy, fl_ctx.get_prop(ASKED)
            floor = privacy.floor_of(asked.plan) if asked else privacy.floor
            return self._closed(result, floor, fl_ctx) if floor else self._open(result, fl_ctx)
        except FmError as error:
            _audit(f"kept here: {error}", fl_ctx)
            return _refusal(egress.public_reason(error.message))
        except Exception as error:
            logger.exception("egress failed")
            _audit(f"kept here: internal error: {type(error).__name__}: {error}", fl_ctx)
            return _refusal("the site's egress filter failed; its log has the error [egress_failed]")

    def _open(self, result: Shareable, fl_ctx: FLContext) -> Shareable:
        """Without a floor: all passes as it is, but the trainer's record of its protection, which is paid for here."""
        if result.get_header(ReservedHeaderKey.CONTENT_TYPE) != _DXO:
            return result
        dxo = from_shareable(result)
        if "protection" not in _content(dxo.meta):
            return result
        model = FLModelUtils.from_shareable(result)
        protection = wire.read_protection(model, "the site's trainer")
        wire.write_disclosed(model, self._paid(protection, model, fl_ctx) if protection else None)
        dxo.meta = {**dxo.meta, wire.KEY: model.meta[wire.KEY]}
        return dxo.update_shareable(result)

    def _closed(self, result: Shareable, floor: Floor, fl_ctx: FLContext) -> Shareable:
        """Under a floor, and of a vote: a message of its own is made of what may leave."""
        code = result.get_return_code()
        if type(code) is not str or code != ReturnCode.OK:
            return make_reply(code if type(code) is str and code in _CODES else ReturnCode.EXECUTION_EXCEPTION)
        if result.get_header(ReservedHeaderKey.CONTENT_TYPE) != _DXO:
            _audit("kept here: no message of nvflare_fm", fl_ctx)
            return make_reply(ReturnCode.TASK_RESULT_FILTER_ERROR)
        if contains_lazy_download_ref(result):
            result = materialize_lazy_download_refs(result, fl_ctx.get_engine().get_cell())
        model = FLModelUtils.from_shareable(result)
        if not _content(model.meta):
            _audit("kept here: no message of nvflare_fm", fl_ctx)
            return make_reply(ReturnCode.TASK_RESULT_FILTER_ERROR)
        if (reason := wire.refused(model)) is not None:
            return _refusal(egress.public_reason(reason) if self.config().privacy.floor else reason)
        if (update := wire.read_outgoing(model)) is None:
            if wire.says_nothing(model):
                return FLModelUtils.to_shareable(wire.write_nothing())
            raise PolicyError(
                "this site has a privacy floor, and nothing but updates leaves it",
                code="submission_withheld" if model.params else "metrics_withheld",
            )
        asked, adapter = fl_ctx.get_prop(ASKED), update.packed.adapter()
        ranks = {adapter.lora[layer].rank for layer in adapter.lora}
        egress.check_update(
            update.protection, floor, asked, adapter.descriptions(), ranks, update.packed.chain.encrypts
        )
        if adapter.bytes() > self.config().limits.max_adapter_mib * 2**20:
            raise PolicyError("the update is larger than max_adapter_mib of this site", code="above_limit")
        update = replace(update, report=egress.public_report(update.report, asked.plan))
        if update.protection is None:
            digest, size = fingerprint(model)
            _audit(f"let out encrypted: round {asked.round}, {size} bytes, sha256 {digest} {_for(fl_ctx)}", fl_ctx)
        disclosed = self._paid(update.protection, model, fl_ctx) if update.protection else None
        return FLModelUtils.to_shareable(wire.write_outgoing(update, disclosed))

    def _paid(self, protection: Protection, model: FLModel, fl_ctx: FLContext) -> Disclosed:
        """Charges the site's budget, and says what the server may know of it."""
        privacy, asked = self.config().privacy, fl_ctx.get_prop(ASKED)
        entry = _entry(protection, model, submitter(fl_ctx), str(fl_ctx.get_job_id()), asked)
        book = self.budget.charge(entry, privacy.unit, privacy.delta, privacy.max_epsilon)
        of_job = [each for each in book.of(entry.data, entry.unit) if each.job == entry.job]
        spent = cost(of_job, protection.delta)
        _audit(
            f"let out: round {entry.round}, {entry.bytes} bytes, sha256 {entry.digest or 'not known'}, ε of the job "
            f"{spent:.4g} at δ {protection.delta:g} {_for(fl_ctx)}",
            fl_ctx,
        )
        to_come = max(0, asked.rounds - asked.round - 1) if asked else 0
        whole = cost([*of_job, *[entry] * to_come], protection.delta)  # when a bound on part of it grows tells more
        return Disclosed.of(protection, whole, asked.plan.privacy.epsilon if asked else None)


class EgressFilter(Filter):
    """Lets leave what a site's file allows; see `local/privacy.json`."""

    def __init__(self) -> None:
        super().__init__()
        self._egress: Egress | None = None

    def process(self, shareable: Shareable, fl_ctx: FLContext) -> Shareable:
        """What leaves in the place of `shareable`."""
        if self._egress is None:
            self._egress = _of_site(fl_ctx)
        return self._egress.process(shareable, fl_ctx)


class EgressGuard(FLComponent):
    """At a site with a floor, lets no message to the server leave but a task's result and NVFlare's own: metrics that
    are streamed while a job runs, events that are sent on, and streams of logs do not leave.
    """

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Stand in the way before any component of the job has anything to tell."""
        if event_type == EventType.ABOUT_TO_START_RUN and _has_floor(fl_ctx):
            stop_messages(fl_ctx.get_engine().aux_runner)


def stop_messages(runner: Any) -> None:
    """Have NVFlare's sender of messages send NVFlare's own, which have headers only."""
    send = runner.send_aux_request

    def guarded(targets: Any, topic: str, request: Shareable, *args: Any, **kwargs: Any) -> Any:
        is_framework = topic in _FRAMEWORKS and not request.keys() - {ReservedHeaderKey.HEADERS}
        return send(targets, topic, request, *args, **kwargs) if is_framework else {}

    runner.send_aux_request, runner.multicast_aux_requests = guarded, lambda *args, **kwargs: {}


def in_force(fl_ctx: FLContext) -> bool:
    """Whether the privacy scope of a job ends with our filter."""
    scope = fl_ctx.get_prop(FLContextKey.SCOPE_OBJECT)
    filters = scope.task_result_filters.get(FilterKey.OUT, []) if scope is not None else []
    return bool(filters) and type(filters[-1]) is EgressFilter


def _of_site(fl_ctx: FLContext) -> Egress:
    site_file = Path(fl_ctx.get_engine().get_workspace().get_site_config_dir()) / FILE_NAME
    found: list[SiteConfig] = []

    def config() -> SiteConfig:
        if not found:
            found.append(load_site(site_file))
        return found[0]

    return Egress(site_file, config)


def _has_floor(fl_ctx: FLContext) -> bool:
    try:
        return _of_site(fl_ctx).config().privacy.floor is not None
    except FmError:
        return True


def _content(meta: Any) -> dict[str, Any]:
    content = meta.get(wire.KEY) if isinstance(meta, dict) else None
    return content if isinstance(content, dict) else {}


def _entry(protection: Protection, model: FLModel, who: Submitter, job: str, asked: Asked | None) -> Entry:
    digest, size = fingerprint(model)
    return Entry(
        job=printable(job, 100),
        submitter=printable(who.name, 80),
        org=printable(who.org, 80),
        round=asked.round if asked else 0,
        data=protection.data,
        unit=protection.unit,
        delta=protection.delta,
        events=protection.events,
        digest=digest,
        bytes=size,
    )


def fingerprint(model: FLModel) -> tuple[str, int]:
    """SHA-256 and bytes of a message's tensors, in the order of their names; empty and 0 where they are not here."""
    params, digest, size = model.params or {}, hashlib.sha256(), 0
    for name in sorted(params):
        if not isinstance(tensor := params[name], torch.Tensor):
            return "", 0
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(flat.view(torch.uint8).numpy().data)
        size += tensor.nbytes
    return digest.hexdigest(), size


def _for(fl_ctx: FLContext) -> str:
    who = submitter(fl_ctx)
    return f"[for {who.name or 'unknown'} of {who.org or 'unknown'}]"


def _refusal(reason: str) -> Shareable:
    return FLModelUtils.to_shareable(wire.write_refusal(reason))


def _audit(what: str, fl_ctx: FLContext) -> None:
    add_job_audit_event(fl_ctx, msg=f"nvflare_fm egress: {printable(what, 2000)}")
