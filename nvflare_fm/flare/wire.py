"""Tasks, updates and refusals as NVFlare messages: tensors in `FLModel.params`, all else as plain Python in its meta.

Everything under one meta key, with a version; what is missing or of the wrong type is refused by name.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from enum import Enum
from typing import Any, TypeVar

from nvflare.app_common.abstract.fl_model import FLModel, ParamsType
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from ..adapter import Adapter, AdapterUpdate, Lazy, Manifest, Report, RoundTask, from_tensors
from ..config import RoundPlan
from ..errors import WireError

KEY, VERSION = "nvflare_fm", 1
ROUND_OVER = "nvflare_fm.round_over"  # the server's word to sites that are still at a round it has ended
T = TypeVar("T")
_SCALES = TypeAdapter(dict[str, float])
_MANIFEST, _REPORT, _ROUND = TypeAdapter(Manifest), TypeAdapter(Report), TypeAdapter(int | None)


@dataclass(frozen=True)
class Saved:
    """An adapter at rest: what a file, the global model and a site's submission hold."""

    adapter: Adapter = field(default_factory=Adapter)
    manifest: Manifest | None = None
    round: int | None = None  # that made it; None: no round of this federation did
    plan: RoundPlan | None = None


def write_saved(saved: Saved) -> FLModel:
    meta = _described(saved.adapter, saved.manifest)
    if saved.round is not None:
        meta["round"] = saved.round
    if saved.plan is not None:
        meta["plan"] = saved.plan.model_dump(mode="json")
    return _model(saved.adapter, meta)


def read_saved(params: Mapping[str, Any] | None, meta: Mapping[str, Any], sender: str) -> Saved:
    """The inverse of `write_saved`; tensors are fetched when they are read.

    Raises:
        WireError: names what `sender` left out.
    """
    content = _content(meta, sender)
    if not params:
        return Saved(plan=_plan(content, sender))
    return Saved(
        adapter=_adapter(params, content, sender),
        manifest=_typed(_MANIFEST, content, "manifest", sender),
        round=_typed(_ROUND, content, "round", sender) if "round" in content else None,
        plan=_plan(content, sender),
    )


def write_task(task: RoundTask) -> FLModel:
    """What the server sends. Nothing in it says who the sites are or what they sent."""
    model = write_saved(Saved(task.adapter, task.manifest, plan=task.plan))
    model.current_round, model.total_rounds = task.round, task.total_rounds
    return model


def read_task(model: FLModel) -> RoundTask:
    """
    Raises:
        WireError: no plan came with it, or what the server forwards is itself a refusal.
    """
    if reason := refused(model):
        raise WireError(f"there is no adapter to work on: {reason}")
    saved = read_saved(model.params, model.meta, "the server")
    if saved.plan is None:
        raise WireError("the server sent no plan; update nvflare_fm there")
    return RoundTask(
        plan=saved.plan,
        adapter=saved.adapter,
        manifest=saved.manifest,
        round=model.current_round or 0,
        total_rounds=model.total_rounds or 1,
    )


def read_plan(model: FLModel) -> RoundPlan | None:
    """What a task asks, without its tensors; nothing where it asks for no work, as submit_model.

    Raises:
        WireError, ConfigError: the message, or a setting in it, is not one we know.
    """
    if refused(model) or KEY not in (model.meta or {}):
        return None
    return _plan(_content(model.meta, "the server"), "the server")


def write_update(update: AdapterUpdate) -> FLModel:
    """What a site sends. The metrics of the adapter it received go where NVFlare's own widgets look for them.

    Without labels: the server named them itself, and no list of them leaves a site.
    """
    meta = _described(update.adapter, replace(update.manifest, labels=())) | {"report": plain(asdict(update.report))}
    return _model(update.adapter, meta, metrics=dict(update.report.before) or None)


def read_update(model: FLModel, site: str, labels: tuple[str, ...] = ()) -> AdapterUpdate:
    """The inverse of `write_update`. `site` is who NVFlare authenticated, whatever the message says.

    Args:
        labels: that the site was asked to train with.

    Raises:
        WireError: names the site and what is missing.
    """
    content = _content(model.meta, site)
    report = _typed(_REPORT, content, "report", site)
    if report.examples is not None and report.examples < 1:
        raise WireError(f"{site} reports {report.examples} training examples; an update needs at least one")
    if not model.params:
        raise WireError(f"{site} sent no tensors; did its PEFT method find a layer to train?")
    manifest = _typed(_MANIFEST, content, "manifest", site)
    return AdapterUpdate(site, _adapter(model.params, content, site), replace(manifest, labels=labels), report)


def write_submission(adapter: Adapter, manifest: Manifest, plan: RoundPlan | None) -> FLModel:
    """What a site sends for others to measure: an adapter and the plan it was trained by, both without labels."""
    plan = plan.model_copy(update={"labels": ()}) if plan else None
    return write_saved(Saved(adapter, replace(manifest, labels=()), plan=plan))


def labelled(task: RoundTask, labels: tuple[str, ...]) -> RoundTask:
    """A task as it is to be carried out where it measures what a site submitted: with the labels of this job."""
    if task.plan.labels or not labels:
        return task
    manifest = replace(task.manifest, labels=labels) if task.manifest else None
    return replace(task, plan=task.plan.model_copy(update={"labels": labels}), manifest=manifest)


def write_metrics(metrics: Mapping[str, float]) -> FLModel:
    return FLModel(metrics=dict(metrics), meta={KEY: {"version": VERSION}})


def write_refusal(reason: str) -> FLModel:
    """A reply, not an error: the site stays in the federation and is asked again next round."""
    return FLModel(metrics={}, meta={KEY: {"version": VERSION, "refused": reason}})


def refused(model: FLModel) -> str | None:
    """Why the sender did not do what it was asked, if it did not."""
    content = (model.meta or {}).get(KEY)
    reason = content.get("refused") if isinstance(content, Mapping) else None
    return str(reason) if reason else None


def size(params: Mapping[str, Any] | None) -> int:
    """Bytes of the tensors in a message, as far as they are known without fetching them."""
    return sum(t.numel() * t.element_size() for t in (params or {}).values() if isinstance(t, Tensor))


def plain(value: Any) -> Any:
    """`value` in the types every NVFlare site can decode.

    Raises:
        WireError: something that is neither a number, a text nor a collection of them.
    """
    if isinstance(value, Enum):
        return plain(value.value)
    if value is None or isinstance(value, bool):
        return value
    for kind in (int, float, str):  # a NumPy scalar is one of these and still does not travel
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(plain(v) for v in value)
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    raise WireError(f"a {type(value).__name__} cannot travel in a message; send numbers and texts")


def _model(adapter: Adapter, meta: dict[str, Any], metrics: dict[str, float] | None = None) -> FLModel:
    params = {name: tensor.detach().cpu().contiguous() for name, tensor in adapter.tensors().items()}
    return FLModel(params_type=ParamsType.FULL, params=params, metrics=metrics, meta={KEY: meta})


def _described(adapter: Adapter, manifest: Manifest | None) -> dict[str, Any]:
    described = {"version": VERSION, "scales": adapter.scales()}
    return described | ({"manifest": plain(asdict(manifest))} if manifest else {})


def _content(meta: Mapping[str, Any] | None, sender: str) -> Mapping[str, Any]:
    content = (meta or {}).get(KEY)
    if not isinstance(content, Mapping) or content.get("version") != VERSION:
        said = content.get("version") if isinstance(content, Mapping) else None
        raise WireError(
            f"{sender} speaks version {said} of this message, version {VERSION} is needed; update nvflare_fm"
        )
    return content


def _adapter(params: Mapping[str, Any], content: Mapping[str, Any], sender: str) -> Adapter:
    scales = _typed(_SCALES, content, "scales", sender)
    for name, value in params.items():
        if not isinstance(value, Tensor) and not callable(getattr(value, "materialize", None)):
            raise WireError(f"{sender} sent a {type(value).__name__} for {name!r}; a tensor is needed")
    return from_tensors(Lazy(params, lambda name: _fetched(params[name])), scales, sender)


def _fetched(value: Any) -> Tensor:
    """NVFlare can leave a tensor on disk until it is asked for."""
    return value if isinstance(value, Tensor) else value.materialize()


def _plan(content: Mapping[str, Any], sender: str) -> RoundPlan | None:
    return RoundPlan.read(content["plan"], f"the plan {sender} sent") if "plan" in content else None


def _typed(kind: TypeAdapter[T], content: Mapping[str, Any], name: str, sender: str) -> T:
    if name not in content:
        raise WireError(f"{sender} sent no {name}; update nvflare_fm there")
    try:
        return kind.validate_python(content[name])
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join([name, *map(str, first["loc"])])
        raise WireError(f"{sender} sent {where} = {str(first['input'])[:80]!r}: {first['msg']}") from None
