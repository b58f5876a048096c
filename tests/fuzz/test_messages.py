"""Whatever a site or the server sends: no message ends the job, none merges a value that is not finite, none moves the
federation farther than its sites may, and none writes freely into the logs.
"""

import copy
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import jaxtyping
import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.app_common.abstract.fl_model import FLModel
from nvflare.app_common.utils.fl_model_utils import FLModelUtils
from torch import Tensor

from nvflare_fm import transforms
from nvflare_fm.adapter import Adapter, AdapterUpdate, Report, RoundTask
from nvflare_fm.aggregation.head_start import head_start
from nvflare_fm.config import Rules
from nvflare_fm.errors import FmError
from nvflare_fm.flare import wire
from nvflare_fm.flare.aggregator import AdapterAggregator
from nvflare_fm.flare.controller import FedPEFT
from nvflare_fm.flare.ledger import Ledger
from nvflare_fm.flare.votes import SyntheticVotes, chosen_of
from nvflare_fm.job.settle import settle
from nvflare_fm.record.round import read_line, written
from nvflare_fm.synthesis.candidates import read, write
from nvflare_fm.transforms.packed import pack
from tests.flare import test_head_start as starts
from tests.flare import test_votes as votes
from tests.flare.messages import MANIFEST, PLAN, adapter, update

HONEST = ("alder", "birch", "cedar")
STEPS = PLAN.training.local_steps
FAR = 4.0 * 1.5  # times the longest honest change: the guard's limit, and the longest server step


@pytest.fixture(scope="module", autouse=True)
def as_in_production() -> Iterator[None]:
    """Shape checks off: a stranger's tensors may have any shape and type."""
    jaxtyping.config.update("jaxtyping_disable", True)
    for logger in LOGGERS:
        logger.propagate = False  # a long run would keep every line in memory
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
    for logger in LOGGERS:
        logger.propagate = True


def honest(site: str, seed: int, state: Adapter) -> AdapterUpdate:
    """A site that changed a little of what it was sent."""
    one = update(site, seed, examples=10 + seed)
    if state:
        near = {n: replace(p, B=p.B + 0.1 * one.adapter.lora[n].B) for n, p in state.lora.items()}
        one = replace(one, adapter=Adapter(near, {n: t + 0.1 * one.adapter.dense[n] for n, t in state.dense.items()}))
    return replace(one, report=replace(one.report, steps=STEPS, label_skew=0.1, tokens=9, seconds=1.0))


def message(sent: AdapterUpdate, uplink: Rules = ()) -> FLModel:
    model = wire.write_update(sent, pack(sent.adapter, transforms.read(uplink, "uplink"), sent.site))
    model.meta["client_name"] = sent.site
    model.meta[wire.KEY]["protection"] = {"mechanism": "dp_sgd", "unit": "row", "delta": 1e-5, "epsilon": 2.0}
    return model


STATES = (Adapter(), adapter(9))
FOUND = {place: [honest(site, i, state) for i, site in enumerate(HONEST)] for place, state in enumerate(STATES)}
UPLINKS: tuple[Rules, ...] = ((), ("int8",))
SENT = {(place, up): [message(one, up) for one in found] for place, found in FOUND.items() for up in UPLINKS}
WORTH = {  # what is then changed
    (place, up): message(honest("dogwood", 5, state), up) for place, state in enumerate(STATES) for up in UPLINKS
}
JOBS: tuple[dict[str, Any], ...] = (
    {},
    {"weigh": ["examples"]},
    {"weigh": ["loss"], "normalize_steps": True},
    {"merge": "factor_mean"},
    {"merge": "stack", "weigh": ["norm", "agreement"]},
    {},
)
ENCODED = len(JOBS) - 1  # the job in which the sites are asked for int8

# --- what a message is turned into

EVIL = "\x1b[2J\n\u202egnp.exe\x00"
VALUES: tuple[Any, ...] = (
    None, True, 0, -1, 1, 10**9, 10**400, math.nan, math.inf, -math.inf, 1e300, 5e-324, 1e-9, "", "1", EVIL,
    "x" * 100_000, b"\xff", (), [], {}, set(),
    ["int8"], ["bf16"], ["int8", "int8"], [{"rule": "int8", "x": 1}], [2**35] * 8, [2], [0, 5], [-1], "F32", "F64",
    {"shape": [2], "dtype": "F32"}, [[[[[[]]]]]], {"a": {"b": {"c": 1}}}, {EVIL: EVIL}, {1: 2},
    dict.fromkeys(map(str, range(999)), 1.0), list(range(5000)), object(), torch.ones(2), torch.tensor(math.nan),
    numpy.float64(3.0), numpy.ones(3), "lora", "causal_lm", {"loss": "low"}, {"loss": math.nan}, {"loss": 1e308},
    {"loss": 1.0, EVIL: 2.0}, [EVIL], ["a"] * 1000,
)  # fmt: skip
NAMES: tuple[Any, ...] = (
    EVIL,
    "",
    7,
    None,
    "x" * 10**6,
    "a.b.c",
    "head.weight",
    "l.lora_A.weight",
    ("a",),
    "__class__",
)
TENSORS: tuple[Callable[[Tensor], Any], ...] = (
    lambda t: t.double(),
    lambda t: t.double() * 1e200,
    lambda t: t.half(),
    lambda t: t.bfloat16(),
    lambda t: t.to(torch.float8_e4m3fn),
    lambda t: t.long(),
    lambda t: t > 0,
    lambda t: t.to(torch.complex64),
    lambda t: t.to_sparse(),
    lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
    lambda t: t.to("meta"),
    lambda t: torch.nn.Parameter(t),
    lambda t: t.T if t.ndim == 2 else t[None],
    lambda t: t[None],
    lambda t: t[:0],
    lambda t: t[..., :0],
    lambda t: t[:1],
    lambda t: t.flatten(),
    lambda t: torch.cat([t, t]),
    lambda t: torch.tensor(1.0),
    lambda t: torch.ones(1).expand(10**6),
    lambda t: t.numpy(),
    lambda t: t.tolist(),
    lambda t: None,
    lambda t: t * math.nan,
    lambda t: t / 0,
    lambda t: t * 3e38,
    lambda t: t * 1e30,
    lambda t: t * 1e12,
    lambda t: t * 1e6,
    lambda t: t * -100,
    lambda t: t * 1e-6,
    lambda t: t * 1e-44,
    lambda t: t * 0,
    lambda t: torch.full_like(t, 1e18),
    lambda t: torch.full_like(t, -1e8),
    lambda t: t.contiguous().view(torch.uint8),
    lambda t: (t.flatten().contiguous().view(torch.uint8) ^ 255).view(t.dtype).reshape(t.shape),
    lambda t: t.char(),
)
REPORT = (*Report.__dataclass_fields__, "more")
PLACES: tuple[tuple[str, ...], ...] = (
    *(("report", name) for name in REPORT),
    *(("manifest", name) for name in ("base", "task", "peft", "base_class", "labels", "adapter_config")),
    *(("scales", "all"), ("scales", "one"), ("scales", "more")),
    *(("encoded", name) for name in ("by", "tensors", "more")),
    *(("encoded", "tensors", name) for name in ("one", "all", "more")),
    *(("encoded", "tensors", "head", name) for name in ("shape", "dtype")),
    *((name,) for name in ("encoded", "version", "scales", "manifest", "report", "round", "plan", "refused", "more")),
)
Change = Callable[[FLModel], None]


def at(place: tuple[str, ...], value: Any) -> Change:
    def put(model: FLModel) -> None:
        inside = model.meta.get(wire.KEY)
        for step in place[:-1]:
            inside = inside.get(step) if isinstance(inside, dict) else None
        if not isinstance(inside, dict):
            return
        names = (
            list(inside) if place[-1] == "all" else sorted(map(str, inside))[:1] if place[-1] == "one" else [place[-1]]
        )
        for name in names:
            inside[name] = value

    return put


def without(place: tuple[str, ...]) -> Change:
    def drop(model: FLModel) -> None:
        inside = model.meta.get(wire.KEY)
        for step in place[:-1]:
            inside = inside.get(step) if isinstance(inside, dict) else None
        if isinstance(inside, dict):
            inside.pop(place[-1], None)

    return drop


def tensor(which: int, how: Callable[[Tensor], Any]) -> Change:
    """Of one tensor; of all where `which` is beyond the last."""

    def turn(model: FLModel) -> None:
        names = sorted(model.params, key=str) if isinstance(model.params, dict) else []
        for name in names[which : which + 1] or names:
            if isinstance(model.params[name], Tensor):
                with_it = model.params[name].detach()
                try:
                    model.params[name] = how(with_it)
                except (RuntimeError, TypeError, IndexError):  # torch has no such tensor
                    continue

    return turn


def renamed(which: int, name: Any) -> Change:
    def rename(model: FLModel) -> None:
        if isinstance(model.params, dict) and model.params:
            names = list(model.params)
            model.params[name] = model.params.pop(names[which % len(names)])

    return rename


def added(name: Any, value: Any) -> Change:
    def add(model: FLModel) -> None:
        if isinstance(model.params, dict):
            model.params[name] = value

    return add


def whole(part: str, value: Any) -> Change:
    def put(model: FLModel) -> None:
        setattr(model, part, value)
        if part == "meta" and isinstance(value, dict):
            model.meta = {**value, "client_name": "dogwood"}

    return put


changes: st.SearchStrategy[Change] = st.one_of(
    st.builds(at, st.sampled_from(PLACES), st.sampled_from(VALUES)),
    st.builds(at, st.sampled_from(PLACES), st.integers() | st.floats() | st.text(max_size=9)),
    st.builds(without, st.sampled_from(PLACES)),
    st.builds(tensor, st.integers(0, 6), st.sampled_from(TENSORS)),
    st.builds(renamed, st.integers(0, 5), st.sampled_from(NAMES)),
    st.builds(added, st.sampled_from(NAMES), st.sampled_from([*VALUES, torch.ones(2, 2), torch.ones(3)])),
    st.builds(whole, st.just("params"), st.sampled_from(VALUES)),
    st.builds(whole, st.just("meta"), st.sampled_from([{}, {wire.KEY: None}, {wire.KEY: []}, {wire.KEY: {EVIL: 1}}])),
    st.builds(whole, st.just("metrics"), st.sampled_from(VALUES)),
)


def changed(model: FLModel, by: list[Change]) -> FLModel:
    meta = copy.deepcopy(model.meta)
    found = FLModel(params=dict(model.params), metrics=dict(model.metrics or {}), meta=meta)
    for change in by:
        change(found)
    return found


# --- the server, without NVFlare's around it


class Said(logging.Handler):
    """What the log was told."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


SERVERS = {
    place: FedPEFT(num_rounds=9, plan={"peft": dict(PLAN.peft)}, aggregator=AdapterAggregator(how))
    for place, how in enumerate(JOBS)
}
LOGGERS = {
    logging.getLogger(name) for name in (wire.__name__, SERVERS[0].logger.name, SERVERS[0].aggregator.logger.name)
}
SETTLED = {
    place: settle(PLAN.model_copy(update={"uplink": UPLINKS[place == ENCODED]}), server.aggregator.aggregation)
    for place, server in SERVERS.items()
}


ACCEPTED: dict[tuple[int, int], dict[str, AdapterUpdate]] = {}  # what the honest sites sent is read once


def opened(job: int, late: int) -> FedPEFT:
    server = SERVERS[job]
    server.fl_ctx = FLContext()
    server.panic = lambda reason: pytest.fail(f"the job was ended: {reason}")
    server.ledger = Ledger(late, 9, [*HONEST, "dogwood"], 0)
    state = STATES[late]
    task = RoundTask(SETTLED[job].plan, state, MANIFEST if state else None, late, 9)
    server.aggregator.begin(task, SETTLED[job])
    if (job, late) not in ACCEPTED:
        for sent in SENT[late, UPLINKS[job == ENCODED]]:
            server.aggregator.accept_model(sent)
        ACCEPTED[job, late] = server.aggregator.updates
    server.aggregator.updates = dict(ACCEPTED[job, late])
    server.ledger.answered.extend(HONEST)
    return server


def length(one: Adapter, other: Adapter) -> float:
    """How far apart the products of two adapters are."""
    total = 0.0
    for name, pair in one.lora.items():
        before = other.lora[name].delta() if other else torch.zeros(1)
        total += float((pair.delta().double() - before.double()).norm()) ** 2
    return total**0.5


LONGEST = {place: max(length(one.adapter, STATES[place]) for one in found) for place, found in FOUND.items()}


@given(
    by=st.lists(changes, min_size=1, max_size=3),
    job=st.integers(0, len(JOBS) - 1),
    late=st.integers(0, 1),
)
def test_no_update_ends_the_job_or_bends_it_beyond_the_clip_or_writes_into_its_logs(by, job, late):
    server, said = opened(job, late), Said()
    for logger in LOGGERS:
        logger.addHandler(said)
    try:
        taken = server._take(changed(WORTH[late, UPLINKS[job == ENCODED]], by))
        assert taken == ("dogwood" in server.aggregator.updates)
        if taken:
            merged(server, late)
    finally:
        for logger in LOGGERS:
            logger.removeHandler(said)
    assert all(part.isprintable() for text in map(str, server.ledger.out.values()) for part in text.split("→"))
    assert all(len(t) < 2000 and EVIL not in t for t in [*said.lines, *map(str, server.ledger.out.values())])
    assert not any("\x1b" in line or "\u202e" in line for line in said.lines)


def merged(server: FedPEFT, late: int) -> None:
    model = server.aggregator.aggregate_model()
    combined = server.aggregator.combined
    assert combined is not None
    assert not combined.failed
    assert {*HONEST} <= {*combined.weights}
    assert sum(combined.weights.values()) == pytest.approx(1)
    assert all(t.isfinite().all() for t in model.params.values())
    server.ledger.close(combined, server.aggregator.updates)
    line = written(server.ledger.line)
    assert written(read_line(line)) == line
    assert 3.0 <= server.ledger.line.medians["loss"] <= 5.0  # what the three measured
    if server.aggregator.aggregation.merge == "exact":
        assert length(combined.adapter, STATES[late]) <= FAR * LONGEST[late]


@given(code=st.sampled_from(VALUES) | st.text(max_size=9), by=st.lists(changes, max_size=1), late=st.integers(0, 1))
def test_no_return_code_and_nothing_that_is_no_message_raises(code, by, late):
    """What NVFlare gives us before a message is read: where it fails, it ends the round of all sites."""
    server = opened(0, late)
    result = FLModelUtils.to_shareable(WORTH[late, ()])
    result.set_return_code(code)
    server._accept_train_result("dogwood", result, server.fl_ctx)
    server.process_result_of_unknown_task(_Client, "train", "7", result, server.fl_ctx)
    empty = Shareable()
    empty["DXO"] = code
    empty.set_header("content_type", "DXO")
    assert not server._accept_train_result("dogwood", empty, server.fl_ctx)
    assert str(server.ledger.out["dogwood"]).isprintable()


class _Client:
    name = "dogwood"


@given(metrics=st.sampled_from(VALUES) | st.dictionaries(st.text(max_size=4), st.floats() | st.integers(), max_size=3))
def test_a_measurement_is_read_as_metrics_or_refused(metrics):
    model = FLModel(metrics={})
    model.metrics = metrics
    found, said = read_or_refused(lambda: wire.read_metrics(model, "dogwood"))
    assert said or all(math.isfinite(value) for value in found.values())


def read_or_refused(read: Callable[[], Any]) -> tuple[Any, str]:
    """What was read, or why it was not, which can be printed."""
    try:
        return read(), ""
    except FmError as error:
        said = error.message
    assert said.isprintable(), said
    assert len(said) < 2000
    return None, said


@given(by=st.lists(changes, min_size=1, max_size=3))
def test_whatever_a_site_sends_as_its_vote_the_others_choose(by):
    server = SyntheticVotes(plan=votes.JOB, per_label=2)
    server.fl_ctx, server.task = FLContext(), RoundTask(votes.PLAN)
    server.panic = lambda reason: pytest.fail(f"the job was ended: {reason}")
    server.ledger = Ledger(0, 1, [*HONEST, "dogwood"], 0)
    for site in HONEST:
        assert server._take(votes.vote(site, [90.0, 80.0, 70.0, 60.0, 0.0, 0.0, 0.0, 0.0]))
    assert server._take(changed(votes.vote("dogwood", torch.ones(8)), by)) == ("dogwood" in server.votes)
    chosen = chosen_of(votes.ROWS, server.votes, votes.PLAN, server.settings)
    assert {*chosen.rows} or "dogwood" in server.votes
    assert len(chosen.rows) <= 4
    assert all(row.text in votes.ROWS.texts for row in chosen.rows)
    assert read(write(chosen), "set") == chosen
    assert all(str(reason).isprintable() for reason in server.ledger.out.values())


@given(by=st.lists(changes, min_size=1, max_size=3))
def test_whatever_a_site_sends_as_its_sums_the_others_start(by):
    server = FedPEFT(plan=starts.PLAN)
    server.fl_ctx, server._open = FLContext(), RoundTask(server.settled.summing)
    server.panic = lambda reason: pytest.fail(f"the job was ended: {reason}")
    server.ledger = Ledger(0, 1, [*HONEST, "dogwood"], 0)
    for site in HONEST:
        assert server._take(starts.sums(site))
    assert server._take(changed(starts.sums("dogwood"), by)) == ("dogwood" in server._sums)
    start = head_start([*server._sums.values()])
    assert {*HONEST} <= start.shares.keys()
    assert all(bool(tensor.isfinite().all()) for tensor in start.adapter.dense.values())
    assert all(str(reason).isprintable() for reason in (*server.ledger.out.values(), *start.refused.values()))


# --- the site: what a hostile server sends

TASK = RoundTask(PLAN, STATES[1], MANIFEST, 3, 9)
TASKS = [wire.write_task(TASK, pack(TASK.adapter, transforms.read(down, "downlink"), "it")) for down in UPLINKS]
PLAN_PLACES = tuple(("plan", name) for name in (*PLAN.model_dump(), "more"))
of_task = st.one_of(
    changes,
    st.builds(at, st.sampled_from(PLAN_PLACES), st.sampled_from(VALUES)),
    st.builds(without, st.sampled_from(PLAN_PLACES)),
    st.builds(whole, st.sampled_from(["current_round", "total_rounds"]), st.sampled_from(VALUES)),
)


@given(by=st.lists(of_task, min_size=1, max_size=3), task=st.sampled_from(TASKS))
def test_whatever_the_server_sends_a_site_reads_it_or_says_what_is_wrong(by, task):
    sent = changed(task, by)
    sent.current_round = 3 if sent.current_round is None else sent.current_round
    task, _ = read_or_refused(lambda: wire.read_task(sent))
    assert task is None or (task.round >= 0 and task.total_rounds >= 1)
    if task is not None:
        read_or_refused(task.adapter.tensors)
    read_or_refused(lambda: wire.read_plan(sent))
    reason = wire.refused(sent)
    assert reason is None or reason.isprintable()
