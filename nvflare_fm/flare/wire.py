"""Tasks, updates and refusals as NVFlare messages: tensors in `FLModel.params`, all else as plain Python in its meta.

Everything under one meta key, with a version; what is missing or of the wrong type is refused by name.
"""

import logging
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from enum import Enum
from typing import Annotated, Any, Literal, TypeVar

import torch
from nvflare.app_common.abstract.fl_model import FLModel, ParamsType
from pydantic import Field, TypeAdapter, ValidationError
from safetensors import safe_open
from torch import Tensor

from .. import transforms
from ..adapter import Adapter, AdapterUpdate, Described, Description, Lazy, Manifest, Report, RoundTask
from ..aggregation.admit import MOST_BYTES, MOST_TENSORS, TYPES, check_form
from ..config import Rules, TaskPlan
from ..errors import ConfigError, WireError
from ..export.folder import Saved
from ..privacy.disclosed import Disclosed, read_disclosed
from ..privacy.protection import PROTECTION, Protection
from ..transforms import Chain, Parcel
from ..transforms.packed import Packed, pack
from ..untrusted import Metrics, Text, printable, usable

KEY, VERSION = "nvflare_fm", 1
ROUND_OVER = "nvflare_fm.round_over"  # the server's word to sites that are still at a round it has ended
T = TypeVar("T")
_NAME = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")
_LONGEST_NAME = 256
_DTYPES = {  # as safetensors calls them
    "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "U8": torch.uint8,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_SCALES = TypeAdapter(dict[str, Annotated[float, Field(strict=True, gt=0, le=1e6)]])
_MANIFEST, _REPORT, _METRICS = TypeAdapter(Manifest), TypeAdapter(Report), TypeAdapter(Metrics)
_DECIDED = TypeAdapter(dict[str, Any])
_LOWERED = TypeAdapter(Annotated[tuple[Text, ...], Field(max_length=16)])
_BY = TypeAdapter(Rules)
_ROUND = TypeAdapter(Annotated[int, Field(strict=True, ge=0, le=10**6)] | None)
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Before:
    """What a message says of a tensor that travels encoded."""

    shape: Annotated[tuple[Annotated[int, Field(strict=True, ge=0, le=MOST_BYTES)], ...], Field(max_length=8)]
    dtype: Literal["F32", "BF16", "F16"]


_WHOLE = TypeAdapter(dict[str, _Before])


def write_saved(saved: Saved | None, packed: Packed | None = None) -> FLModel:
    """An adapter, what it belongs to, its round and its plan, as a message.

    Args:
        saved: None before a round has made one.
        packed: the adapter encoded for its way; None: it travels as it is.
    """
    if saved is None:
        return _model(nothing := _plainly(Adapter()), _described(nothing))
    packed = packed or _plainly(saved.adapter)
    meta = _described(packed, saved.manifest, saved.plan)
    return _model(packed, meta if saved.round is None else {**meta, "round": saved.round})


def read_saved(params: Mapping[str, Any] | None, meta: Mapping[str, Any], sender: str) -> Saved | None:
    """The inverse of `write_saved`; tensors are fetched when they are read. Nothing where there are none.

    Raises:
        WireError: names what `sender` left out.
    """
    if params is None or (isinstance(params, Mapping) and not params):
        return None
    content = _content(meta, sender)
    return Saved(
        adapter=_adapter(params, content, sender),
        manifest=_typed(_MANIFEST, content, "manifest", sender),
        round=_typed(_ROUND, content, "round", sender) if "round" in content else None,
        plan=_plan(content, sender),
    )


def write_task(task: RoundTask, packed: Packed | None = None) -> FLModel:
    """What the server sends. Nothing in it says who the sites are or what they sent.

    Args:
        packed: the task's adapter, encoded once for all sites; None: it travels as it is.
    """
    packed = packed or _plainly(task.adapter)
    model = _model(packed, _described(packed, task.manifest, task.plan))
    model.current_round, model.total_rounds = task.round, task.total_rounds
    return model


def bytes_of(model: FLModel) -> int:
    """How many bytes the tensors of a message of ours take."""
    return sum(tensor.nbytes for tensor in (model.params or {}).values())


def read_task(model: FLModel) -> RoundTask:
    """The inverse of `write_task`, and of `write_submission`: what is to be trained or measured.

    Raises:
        WireError: no plan came with it, it is malformed, or what the server forwards is itself a refusal.
        ConfigError: the plan has a setting that is not one we know.
    """
    if reason := refused(model):
        raise WireError(f"there is no adapter to work on: {reason}", code="no_submission")
    plan = _plan(_content(model.meta, "the server"), "the server")
    saved = read_saved(model.params, model.meta, "the server")
    if plan is None:
        raise WireError("the server sent no plan; update nvflare_fm there", code="no_plan")
    number, total = _rounds(model)
    adapter, manifest = (saved.adapter, saved.manifest) if saved else (Adapter(), None)
    return RoundTask(plan, adapter, manifest, number, total)


def rounds_over(model: FLModel) -> bool:
    """Whether a task comes after the last round, as `RoundTask.over` of what `read_task` reads.

    Raises:
        WireError: its number is not one.
    """
    number, total = _rounds(model)
    return number == total


def _rounds(model: FLModel) -> tuple[int, int]:
    number = _typed(_ROUND, {"round": model.current_round}, "round", "the server") or 0
    total = _typed(_ROUND, {"total_rounds": model.total_rounds}, "total_rounds", "the server") or 1
    if number > total:
        raise WireError(f"the server sent round {number} of {total}", code="no_round")
    return number, total


def read_plan(model: FLModel) -> TaskPlan | None:
    """What a task asks, without its tensors; nothing where it asks for no work, as submit_model.

    Raises:
        WireError, ConfigError: the message, or a setting in it, is not one we know.
    """
    if refused(model) or KEY not in (model.meta or {}):
        return None
    return _plan(_content(model.meta, "the server"), "the server")


def write_decision(model: FLModel, plan: TaskPlan, lowered: Sequence[str]) -> None:
    """Put what a site's gate has decided beside what the server asked, for the site's own trainer.

    Args:
        model: a task as it came; whatever it says of a decision already is replaced.
        plan: as the site is to carry it out.
        lowered: what the site gives less of than the server asked.
    """
    decided = {"plan": plan.model_dump(mode="json"), "lowered": list(lowered)}
    model.meta = {**model.meta, KEY: {**_content(model.meta, "the server"), "decided": decided}}


def read_decided(model: FLModel) -> RoundTask:
    """Read a task as the site's gate has decided it: what the trainer carries out.

    Raises:
        WireError: as `read_task`, or no gate has decided the task.
        ConfigError: the plan has a setting that is not one we know.
    """
    task = read_task(model)
    decided = _typed(_DECIDED, _content(model.meta, "the server"), "decided", "the site's gate")
    plan = _plan(decided, "the site's gate")
    if plan is None:
        raise WireError("the site's gate has decided no plan; update nvflare_fm at the site", code="no_plan")
    return replace(task, plan=plan, lowered=_typed(_LOWERED, decided, "lowered", "the site's gate"))


def write_update(update: AdapterUpdate, packed: Packed | None = None) -> FLModel:
    """What a site sends. The metrics of the adapter it received go where NVFlare's own widgets look for them.

    Without labels: the server named them itself, and no list of them leaves a site.

    Args:
        packed: the update's adapter, encoded by the plan's `uplink`; None: it travels as it is.
    """
    packed = packed or _plainly(update.adapter)
    meta = _described(packed, replace(update.manifest, labels=())) | {"report": plain(asdict(update.report))}
    if update.protection is not None:
        meta["protection"] = plain(asdict(update.protection))
    return _model(packed, meta, metrics=dict(update.report.before) or None)


def read_update(
    model: FLModel, site: str, labels: tuple[str, ...] = (), names: Collection[str] = (), uplink: Rules = ()
) -> AdapterUpdate:
    """The inverse of `write_update`. `site` is who NVFlare authenticated, whatever the message says.

    Args:
        labels: that the site was asked to train with.
        names: that its tensors must have; empty: any.
        uplink: the transforms that it was asked to apply, in this order.

    Raises:
        WireError: names the site and what is missing.
    """
    content = _content(model.meta, site)
    if _transforms(content, site) != uplink:
        raise WireError(
            f"{site} did not encode its adapter by the plan's uplink; update nvflare_fm there", code="other_encoding"
        )
    report = _typed(_REPORT, content, "report", site)
    disclosed = read_disclosed(content["protection"], site) if "protection" in content else None
    epsilon = disclosed.epsilon if disclosed else None  # whatever the report says
    report = replace(report, before=_usable(report.before, site), after=_usable(report.after, site), epsilon=epsilon)
    manifest = _typed(_MANIFEST, content, "manifest", site)
    if not isinstance(model.params, Mapping) or not model.params:
        raise WireError(f"{site} sent no tensors; did its PEFT method find a layer to train?", code="no_tensors")
    if names and model.params.keys() != set(names):
        missing, extra = set(names) - model.params.keys(), [name for name in model.params if name not in names]
        shown = [printable(name, 80) for name in (*sorted(missing)[:3], *extra[:3])]
        raise WireError(
            f"{site}: layers differ: {len(missing)} tensors are missing and {len(extra)} unexpected, such as {shown}; "
            "use the same target_modules and base model",
            code="other_layers",
        )
    return AdapterUpdate(site, _adapter(model.params, content, site), replace(manifest, labels=labels), report)


def read_protection(model: FLModel, sender: str) -> Protection | None:
    """What a trainer states about the protection of an update, for its own site; None: it states none.

    Raises:
        WireError: it states what is no protection.
    """
    content = _content(model.meta, sender)
    return _typed(PROTECTION, content, "protection", sender) if "protection" in content else None


def write_disclosed(model: FLModel, disclosed: Disclosed | None) -> None:
    """Put what the server may know of an update's protection in the place of what the trainer states."""
    content = dict(_content(model.meta, "the site's trainer"))
    content.pop("protection", None)
    model.meta = {**model.meta, KEY: content | ({"protection": asdict(disclosed)} if disclosed else {})}


@dataclass(frozen=True)
class Outgoing:
    """An update on its way from the trainer to the site's egress, read as strictly as the server reads it."""

    packed: Packed
    manifest: Manifest
    report: Report
    protection: Protection | None


def read_outgoing(model: FLModel) -> Outgoing | None:
    """The inverse of `write_update` at the sender's own site; None: it is no update.

    Raises:
        WireError, ConfigError: it is malformed.
    """
    content = _content(model.meta, "the site's trainer")
    if "report" not in content:
        return None
    return Outgoing(
        _packed(model.params, content, "the site's trainer"),
        _typed(_MANIFEST, content, "manifest", "the site's trainer"),
        _typed(_REPORT, content, "report", "the site's trainer"),
        read_protection(model, "the site's trainer"),
    )


def write_outgoing(outgoing: Outgoing, disclosed: Disclosed | None) -> FLModel:
    """Make the update that leaves: of what was read, and nothing else that the trainer's message may have held."""
    update = AdapterUpdate("", outgoing.packed.adapter(), outgoing.manifest, outgoing.report)
    model = write_update(update, outgoing.packed)
    write_disclosed(model, disclosed)
    return model


def write_submission(
    adapter: Adapter, manifest: Manifest, plan: TaskPlan | None, packed: Packed | None = None
) -> FLModel:
    """What a site sends for others to measure: an adapter and the plan it was trained by, both without labels."""
    plan = plan.model_copy(update={"labels": ()}) if plan else None
    return write_saved(Saved(adapter, replace(manifest, labels=()), plan=plan), packed)


def labelled(task: RoundTask, labels: tuple[str, ...]) -> RoundTask:
    """A task as it is to be carried out where it measures what a site submitted: with the labels of this job."""
    if task.plan.labels or not labels:
        return task
    manifest = replace(task.manifest, labels=labels) if task.manifest else None
    return replace(task, plan=task.plan.model_copy(update={"labels": labels}), manifest=manifest)


def write_metrics(metrics: Mapping[str, float]) -> FLModel:
    """Make the message of a site that measured an adapter."""
    return FLModel(metrics=dict(metrics), meta={KEY: {"version": VERSION}})


def write_nothing() -> FLModel:
    """Make the message of a site that did what it was asked, and keeps what came of it."""
    return write_metrics({})


def says_nothing(model: FLModel) -> bool:
    """Whether a message is one of `write_nothing`."""
    try:
        content = _content(model.meta, "the site's trainer")
    except WireError:  # whose words are the sender's
        return False
    return not (model.params or model.metrics) and set(content) == {"version"}


def read_metrics(model: FLModel, site: str) -> dict[str, float]:
    """What a site measured; values that cannot be compared are left out.

    Raises:
        WireError: names the site and what is no metric.
    """
    metrics = {} if model.metrics is None else model.metrics
    return _usable(_typed(_METRICS, {"metrics": metrics}, "metrics", site), site)


def _usable(metrics: Mapping[str, float], site: str) -> dict[str, float]:
    found = usable(metrics)
    if left_out := sorted(metrics.keys() - found.keys()):
        logger.warning("%s measured values that are not finite, left out: %s", site, ", ".join(left_out))
    return found


def write_refusal(reason: str) -> FLModel:
    """A reply, not an error: the site stays in the federation and is asked again next round."""
    return FLModel(metrics={}, meta={KEY: {"version": VERSION, "refused": reason}})


def refused(model: FLModel) -> str | None:
    """Why the sender did not do what it was asked, if it did not; safe to print."""
    content = model.meta.get(KEY) if isinstance(model.meta, Mapping) else None
    reason = content.get("refused") if isinstance(content, Mapping) else None
    return None if reason is None else printable(reason) or "no reason given"


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
    raise WireError(f"a {type(value).__name__} cannot travel in a message; send numbers and texts", code="not_plain")


def _plainly(adapter: Adapter) -> Packed:
    return pack(adapter, Chain(), "this sender")


def _model(packed: Packed, meta: dict[str, Any], metrics: dict[str, float] | None = None) -> FLModel:
    tensors = packed.parcel.tensors
    params = {name: tensors[name].detach().cpu().contiguous() for name in tensors}
    return FLModel(params_type=ParamsType.FULL, params=params, metrics=metrics, meta={KEY: meta})


def _described(packed: Packed, manifest: Manifest | None = None, plan: TaskPlan | None = None) -> dict[str, Any]:
    described: dict[str, Any] = {"version": VERSION, "scales": dict(packed.whole.scales)}
    if packed.chain:
        whole = {n: {"shape": list(t.shape), "dtype": _NAMES[t.dtype]} for n, t in packed.whole.tensors.items()}
        described["encoded"] = {"by": plain(packed.chain.entries), "tensors": whole}
    if plan is not None:
        described["plan"] = plan.model_dump(mode="json")
    return described | ({"manifest": plain(asdict(manifest))} if manifest else {})


def _content(meta: Mapping[str, Any] | None, sender: str) -> Mapping[str, Any]:
    content = meta.get(KEY) if isinstance(meta, Mapping) else None
    said = content.get("version") if isinstance(content, Mapping) else None
    if not isinstance(content, Mapping) or type(said) is not int or said != VERSION:
        raise WireError(
            f"{sender} speaks another version of this message, version {VERSION} is needed; update nvflare_fm",
            printable(said, 20),  # not in the text: under a site's floor it leaves the site
            code="other_version",
        )
    return content


def _adapter(params: Any, content: Mapping[str, Any], sender: str) -> Adapter:
    return _packed(params, content, sender).adapter()


def _packed(params: Any, content: Mapping[str, Any], sender: str) -> Packed:
    """What came, as far as it can be told without reading a tensor.

    Raises:
        WireError, ConfigError: it is no adapter, or encoded in a way that is not known here.
    """
    if not isinstance(params, Mapping):
        raise WireError(
            f"{sender} sent a {type(params).__name__} for its tensors; update nvflare_fm", code="wrong_type"
        )
    _check_few(sender, tensors=params, scales=content.get("scales"))
    scales = _typed(_SCALES, content, "scales", sender)
    sent = {name: _description(name, value, sender) for name, value in params.items()}
    chain = transforms.read(_transforms(content, sender), f"what {sender} sent")
    whole = _whole(content, sender) if chain else sent
    _check_encoded(chain, sent, whole, sender)
    for name, tensor in whole.items():
        if tensor.dtype not in TYPES:
            raise WireError(
                f"{sender} sent values in {name!r} that are not float32, bfloat16 or float16; only these are merged",
                code="tensor_type",
            )
    parcel = Parcel(sender, Lazy(params, lambda name: _fetched(params[name])), sent)
    packed = Packed(chain, parcel, Described(whole, scales))
    check_form(packed.adapter(), sender)
    return packed


def _transforms(content: Mapping[str, Any], sender: str) -> Rules:
    """The transforms that a message says its tensors went through."""
    if "encoded" not in content:
        return ()
    found = content["encoded"]
    return _typed(_BY, found if isinstance(found, Mapping) else {}, "by", sender)


def _whole(content: Mapping[str, Any], sender: str) -> dict[str, Description]:
    """What the tensors of a message were before they were encoded, as it says."""
    _check_few(sender, descriptions=content["encoded"].get("tensors"))
    found = _typed(_WHOLE, content["encoded"], "tensors", sender)
    return {name: Description(each.shape, _DTYPES[each.dtype]) for name, each in found.items()}


def _check_encoded(
    chain: Chain, sent: Mapping[str, Description], whole: Mapping[str, Description], sender: str
) -> None:
    """Hold each tensor that came against what its transforms make of the tensor it is said to have been.

    Raises:
        WireError: another tensor came, or one of another size or type, so that it cannot be decoded.
    """
    if chain.encrypts:
        if not chain.fits(sent, whole):
            raise WireError(
                f"{sender} sent no ciphertexts of the {len(whole)} tensors that it described; update nvflare_fm there",
                code="encoded_size",
            )
        return
    if sent.keys() != whole.keys():
        raise WireError(
            f"{sender} sent {len(sent)} tensors and described {len(whole)} others; update nvflare_fm there",
            code="encoded_names",
        )
    for name, before in whole.items():
        if sent[name] != chain.encoded(name, before):
            raise WireError(
                f"{sender} sent {name!r} as {sent[name].shape} numbers of {sent[name].dtype}, which is not what "
                f"{', '.join(chain.transforms)} makes of {before.shape}; update nvflare_fm there",
                code="encoded_size",
            )


def _check_few(sender: str, **found: Any) -> None:
    """Before each of them is looked at."""
    for what, several in found.items():
        if isinstance(several, Mapping) and len(several) > MOST_TENSORS:
            raise WireError(f"{sender} sent {len(several)} {what}, {MOST_TENSORS} are read", code="too_many_tensors")


def _description(name: Any, value: Any, sender: str) -> Description:
    """Shape and type of a tensor; of one that NVFlare has left on disk, from its file's header.

    Raises:
        WireError: it is no plain tensor under a name as PEFT gives them.
    """
    if not isinstance(name, str) or len(name) > _LONGEST_NAME or not _NAME.fullmatch(name):
        raise WireError(f"{sender} sent a tensor called {printable(name, 80)}; is it PEFT's?", code="tensor_name")
    if isinstance(value, Tensor):
        plain = value.layout == torch.strided and value.device.type == "cpu" and not value.is_quantized
        shape, dtype = tuple(value.shape), value.dtype if plain else None
    elif callable(getattr(value, "materialize", None)):
        with safe_open(value.file_path, framework="pt") as file:
            header = file.get_slice(value.key)
            shape, dtype = tuple(header.get_shape()), _DTYPES.get(header.get_dtype())
    else:
        raise WireError(f"{sender} sent a {type(value).__name__} for {name!r}; a tensor is needed", code="tensor_type")
    if dtype not in _NAMES:
        raise WireError(
            f"{sender} sent {name!r} as a tensor of a type or layout that does not travel; only plain float32, "
            "bfloat16, float16 and uint8 do",
            code="tensor_type",
        )
    return Description(shape, dtype)


def _fetched(value: Any) -> Tensor:
    """NVFlare can leave a tensor on disk until it is asked for."""
    return value.detach() if isinstance(value, Tensor) else value.materialize()


def _plan(content: Mapping[str, Any], sender: str) -> TaskPlan | None:
    if "plan" not in content:
        return None
    if not isinstance(content["plan"], Mapping):
        raise WireError(f"{sender} sent a {type(content['plan']).__name__} where a plan is needed", code="wrong_type")
    try:
        return TaskPlan.read(content["plan"], f"the plan {sender} sent")
    except ConfigError as error:  # it repeats what came, however long
        raise ConfigError(printable(error.text), code=error.code) from None


def _typed(kind: TypeAdapter[T], content: Mapping[str, Any], name: str, sender: str) -> T:
    if name not in content:
        raise WireError(f"{sender} sent no {name}; update nvflare_fm there", code="incomplete_message")
    try:
        return kind.validate_python(content[name])
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        where = ".".join([name, *(printable(part, 80) for part in first["loc"])])
        said = printable(first["input"], 80)
        raise WireError(f"{sender} sent {where} = {said!r}: {printable(first['msg'])}", code="wrong_type") from None
