"""The laws of every transform, registered now or later, and of the chains that they form."""

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nvflare_fm import transforms
from nvflare_fm.adapter import LORA_A, LORA_B, Adapter, AdapterUpdate, Described, Description, LoraPair, Report
from nvflare_fm.aggregation.combine import combine
from nvflare_fm.algebra.lora import head, shorten
from nvflare_fm.config import Aggregation, RoundPlan, Rules
from nvflare_fm.errors import ConfigError, ModelError, WireError
from nvflare_fm.job.settle import settle
from nvflare_fm.site.training.kept_state import FILE, FOLDER, KeptState
from nvflare_fm.transforms import Chain, Kept, Parcel, Stage, Transform
from nvflare_fm.transforms.int8 import Int8
from nvflare_fm.transforms.packed import Packed, pack

from .strategies import MANIFEST, identical, make_pair

A, B, HEAD = "l" + LORA_A, "l" + LORA_B, "head.weight"


class Negated(Transform):
    """Keeps every promise: the laws about promises have somebody to hold."""

    stage: ClassVar[Stage] = "protect"
    error: ClassVar[float] = 0.0
    linear: ClassVar[bool] = True

    def encoded(self, name: str, before: Description) -> Description:
        return before

    def encode(self, parcel: Parcel, kept: Kept | None) -> tuple[Parcel, Kept]:
        return replace(parcel, tensors={name: negative(parcel.tensors[name]) for name in parcel.tensors}), {}

    def decode(self, name: str, payload: Tensor, before: Description) -> Tensor:
        return negative(payload)


def negative(tensor: Tensor) -> Tensor:
    return ~tensor if tensor.dtype == torch.bool else -tensor


class Added(Negated):
    """As encryption: the server adds what it cannot read."""

    stage: ClassVar[Stage] = "encrypt"
    needs_linear: ClassVar[bool] = True


# What encrypts works on whole parcels, with keys: tests/test_encryption.py.
READABLE = [name for name in transforms.registry if transforms.registry[name].stage != "encrypt"]
EVERY: dict[str, Transform] = {name: transforms.registry[name]() for name in READABLE} | {
    "negated": Negated(),
    "added": Added(),
}
every = pytest.mark.parametrize("name", EVERY)
registered = pytest.mark.parametrize("name", READABLE)


def chain_of(name: str) -> Chain:
    return Chain((name,), {name: EVERY[name]})


FLOATS = (torch.float32, torch.float16, torch.bfloat16)
TYPES = (*FLOATS, torch.float32, torch.int64, torch.uint8, torch.bool)
shapes = st.one_of(
    st.tuples(),
    st.tuples(st.integers(0, 200)),
    st.tuples(st.integers(0, 9), st.integers(0, 150)),
    st.tuples(st.integers(0, 150), st.integers(0, 9)),
    st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(0, 70)),
)


@st.composite
def tensors(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = TYPES) -> Tensor:
    """Any shape, and values from denormal to the largest there are, of one size or of many; blocks of zeros."""
    shape, dtype = draw(shapes), draw(st.sampled_from(dtypes))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    kind = draw(st.sampled_from(["even", "spread", "sparse", "one", "constant"]))
    if kind == "spread":
        values = values * 10.0 ** torch.empty(shape, dtype=torch.float64).uniform_(-9, 0, generator=generator)
    if kind == "sparse":
        values = values * (torch.rand(shape, generator=generator) < 0.03)
    if kind == "one" and values.numel():
        values.flatten()[0] = 1e4
    if kind == "constant":
        values = torch.ones(shape, dtype=torch.float64)
    if not dtype.is_floating_point:
        return values.to(dtype)
    largest = torch.finfo(dtype).max
    size = draw(st.sampled_from([1.0, 1e-3, 1e-44, 1e-38, 1e4, 1e30, math.inf]))
    values = (
        values * size
        if math.isfinite(size)
        else values / max(float(values.abs().max()), 1.0) * largest
        if values.numel()
        else values
    )
    return values.clamp(-largest, largest).to(dtype)


names = st.sampled_from([A, B, HEAD, "bias"])


def sent(name: str, of: str, tensor: Tensor, kept: Mapping[str, Kept] | None = None) -> Tensor:
    return (
        chain_of(of).encode(Parcel("alder", {name: tensor}, {name: Description.of(tensor)}), kept).parcel.tensors[name]
    )


@every
@given(called=names, tensor=tensors())
def test_what_arrives_is_what_was_sent_within_the_stated_error_and_of_its_shape_and_type(name, called, tensor):
    before = Description.of(tensor)
    arrived = chain_of(name).decode(called, sent(called, name, tensor), before)
    assert Description.of(arrived) == before
    if EVERY[name].error == 0 or not tensor.is_floating_point():
        assert torch.equal(arrived, tensor)
    elif tensor.numel():
        limits, largest = torch.finfo(tensor.dtype), float(tensor.double().abs().max())
        allowed = (EVERY[name].error * (1 + 1e-5) + limits.eps) * largest + limits.tiny
        assert float((arrived.double() - tensor.double()).abs().max()) <= allowed


@every
@given(called=names, tensor=tensors())
def test_what_travels_is_as_described_before_it_is_read_and_the_same_each_time(name, called, tensor):
    before, copy = Description.of(tensor), tensor.clone()
    payload = sent(called, name, tensor)
    assert Description.of(payload) == chain_of(name).encoded(called, before)
    assert torch.equal(payload, sent(called, name, tensor))
    assert torch.equal(tensor, copy)
    if EVERY[name].stage == "compress":
        assert Description.of(payload).bytes <= before.bytes


@pytest.mark.parametrize("name", [name for name, transform in EVERY.items() if transform.linear])
@given(called=names, tensor=tensors(FLOATS), factor=st.sampled_from([0.5, -2.0, 3.0]))
def test_the_sum_of_what_linear_transforms_encode_decodes_to_the_sum(name, called, tensor, factor):
    tensor = (tensor.double() / max(float(tensor.double().abs().max()) if tensor.numel() else 1.0, 1e-30)).to(
        tensor.dtype
    )
    other = factor * tensor
    total = sent(called, name, tensor) + sent(called, name, other)
    arrived = chain_of(name).decode(called, total, Description.of(tensor))
    torch.testing.assert_close(arrived, tensor + other, rtol=1e-6, atol=0)


@every
@given(called=names, tensor=tensors(FLOATS), seed=st.integers(0, 2**32))
def test_damaged_contents_are_numbers_or_refused_with_a_code(name, called, tensor, seed):
    payload = sent(called, name, tensor)
    generator = torch.Generator().manual_seed(seed)
    rubbish = torch.randint(0, 256, (payload.numel() * payload.element_size(),), generator=generator, dtype=torch.uint8)
    parcel = Parcel(
        "alder", {called: rubbish.view(payload.dtype).reshape(payload.shape)}, {called: Description.of(payload)}
    )
    found = read_or_refused(Packed(chain_of(name), parcel, Described({called: Description.of(tensor)}, {})), called)
    if isinstance(found, WireError):
        assert found.code == "not_finite"
        assert "alder" in found.message
        assert called in found.message
    else:
        assert found.isfinite().all()
        assert Description.of(found) == Description.of(tensor)


def read_or_refused(packed: Packed, name: str) -> Tensor | WireError:
    try:
        return packed._decoded(name)
    except WireError as error:
        return error


@registered
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_no_numbers_are_refused_by_site_and_tensor(name, value):
    adapter = Adapter(dense={"head.weight": torch.ones(3, 70), "bad.weight": torch.full((2, 64), value)})
    with pytest.raises(WireError) as refused:
        pack(adapter, transforms.read((name,), "uplink"), "alder")
    assert refused.value.code == "not_finite"
    assert "alder" in refused.value.message
    assert "bad.weight" in refused.value.message


def test_int8_takes_eight_and_a_half_bits_a_number_and_leaves_what_would_not_get_smaller():
    sizes = {
        name: Int8().encoded(name, Description(shape, torch.float32)).bytes
        for name, shape in {
            A: (16, 384),
            B: (384, 16),
            HEAD: (77, 384),
            "bias": (1,),
            "none": (0, 7),
            "narrow" + LORA_A: (5, 1),
        }.items()
    }
    assert sizes[A] == sizes[B] == 16 * 384 * 8.5 / 8
    assert sizes[HEAD] == 77 * 384 * 8.5 / 8
    assert (sizes["bias"], sizes["none"], sizes["narrow" + LORA_A]) == (4, 0, 20)


@given(
    tensor=st.builds(lambda s, n: make_pair(1, n, 6, s).A.float(), st.integers(0, 999), st.integers(2, 140)),
    factor=st.sampled_from([1.0, 0.3, 2 / 3**0.5, 7e-4]),
    rows=st.integers(1, 6),
    factor_b=st.booleans(),
)
def test_a_site_that_has_not_moved_sends_back_what_it_received_at_any_rank_and_scale(tensor, factor, rows, factor_b):
    """int8 blocks are of one direction each, so the first rows of what is encoded are the first rows encoded."""
    name = B if factor_b else A
    whole = tensor.T.contiguous() if factor_b else tensor
    received = Int8().decode(name, sent(name, "int8", whole), Description.of(whole))
    mine = factor * (received[:, :rows] if factor_b else received[:rows])
    back = Int8().decode(name, sent(name, "int8", mine), Description.of(mine))
    torch.testing.assert_close(back, mine, rtol=1e-6, atol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@registered
def test_a_gpu_encodes_and_decodes_bit_for_bit_as_a_cpu_does(name):
    tensor = first_adapter().lora["l"].A
    payload = sent(A, name, tensor)
    assert torch.equal(sent(A, name, tensor.cuda()).cpu(), payload)
    decode, before = chain_of(name).decode, Description.of(tensor)
    assert torch.equal(decode(A, payload.cuda(), before).cpu(), decode(A, payload, before))


# --- the round: nothing drifts, nothing stands still


ONES = torch.where(torch.arange(100) % 64 == 0, 4.0, 1.0)  # whose blocks have one larger number each


def first_adapter() -> Adapter:
    generator = torch.Generator().manual_seed(0)
    sizes = 2.0 ** -torch.arange(6)
    pair = LoraPair(torch.randn(6, 130, generator=generator), torch.randn(70, 6, generator=generator) * sizes)
    return Adapter({"l": shorten(pair, 6)[0]}, {"ones": ONES, "bias": torch.randn(3, generator=generator)})


def one_round(
    whole: Adapter, name: str, how: Aggregation, ranks: tuple[int, ...], kept: dict[int, Any], moves: float
) -> Adapter:
    """What the server keeps after a round in which every site moves its dense tensors by `moves`, and no factor."""
    chain = transforms.read((name,), "downlink")
    received = pack(whole, chain, "the server").adapter()
    updates = []
    for site, rank in enumerate(ranks):
        trained = {n: head(received.lora[n], rank).rescaled(2 / rank**0.5) for n in received.lora}
        if how.merge == "stack":
            trained = {n: replace(pair, B=0 * pair.B) for n, pair in trained.items()}
        adapter = Adapter(trained, {n: received.dense[n] + moves * (received.dense[n] < 2) for n in received.dense})
        left = pack(adapter, chain, f"site-{site}", kept.get(site, {}))
        kept[site] = left.kept
        updates.append(AdapterUpdate(f"site-{site}", left.adapter(), MANIFEST, Report(examples=1, rank=rank)))
    return combine(received, MANIFEST, updates, how, 6, None, whole).adapter


def off(one: Adapter, other: Adapter) -> float:
    products = float((one.lora["l"].delta() - other.lora["l"].delta()).norm() / other.lora["l"].delta().norm())
    return max(products, *(float((one.dense[n] - other.dense[n]).norm() / other.dense[n].norm()) for n in other.dense))


@registered
@pytest.mark.parametrize(
    ("merge", "ranks", "rounds"),
    [("exact", (2, 6), 50), ("svd", (6, 6), 9), ("stack", (2, 4), 9), ("factor_mean", (6, 6), 9)],
)
def test_rounds_in_which_no_site_moves_leave_the_adapter_where_it_was(name, merge, ranks, rounds):
    begin = now = first_adapter()
    how, kept = Aggregation(merge=merge, step="plain", guard=()), dict[int, Any]()
    for _ in range(rounds):
        now = one_round(now, name, how, ranks, kept, moves=0.0)
    once = off(pack(begin, transforms.read((name,), "downlink"), "the server").adapter(), begin)
    assert off(now, begin) <= (1e-5 if name == "int8" else 5 * once)


@registered
def test_changes_smaller_than_a_step_of_the_encoding_add_up(name):
    """Of ones beside a four, a step of int8 is 4/127, of bf16 1/128: a change of 0.002 is rounded away."""
    now, how, kept = Adapter(dense={"ones": ONES}), Aggregation(step="plain", guard=()), dict[int, Any]()
    for _ in range(40):
        now = one_round(now, name, how, (0,), kept, moves=2e-3)
    assert now.dense["ones"][ONES < 2].numpy() == pytest.approx(1.08, abs=8 * EVERY[name].error)


@registered
def test_without_what_a_site_keeps_they_are_lost(name):
    now, how = Adapter(dense={"ones": ONES}), Aggregation(step="plain", guard=())
    for _ in range(3):
        now = one_round(now, name, how, (0,), dict[int, Any](), moves=2e-3)
    assert now.dense["ones"][ONES < 2].numpy() == pytest.approx(1.0, abs=1e-5)


def test_what_a_site_keeps_is_there_for_a_new_trainer_and_damage_is_told(tmp_path: Path) -> None:
    kept = {"int8": {HEAD: torch.randn(2, 64), "a/b": torch.ones(1)}}
    KeptState(tmp_path).keep(kept)
    found = KeptState(tmp_path).read()
    assert {n: t.tolist() for n, t in found["int8"].items()} == {n: t.tolist() for n, t in kept["int8"].items()}
    assert KeptState().read() == {}
    (tmp_path / FOLDER / FILE).write_bytes(b"\xff" * 40)
    with pytest.raises(ModelError) as refused:
        KeptState(tmp_path).read()
    assert refused.value.code == "kept_damaged"
    assert str(tmp_path) not in refused.value.message


def test_a_site_that_encodes_nothing_writes_nothing(tmp_path: Path) -> None:
    KeptState(tmp_path).keep({})
    assert not list(tmp_path.iterdir())


# --- the chain


@pytest.mark.parametrize(
    ("entries", "code"),
    [
        (("int8", "bf16"), "transform_twice"),
        (("int8", "int8"), "transform_twice"),
        (("ckks", "int8"), "transform_order"),
        (("int8", "ckks"), "transform_not_linear"),
        (("bf16", "ckks"), "transform_not_linear"),
        (("ckks", "ckks"), "transform_twice"),
        (("int4",), "unknown_name"),
        (({"rule": "int8", "blocks": 3},), "wrong_setting"),
        (({"blocks": 3},), "unknown_name"),
    ],
)
@pytest.mark.parametrize("way", ["uplink", "downlink"])
def test_a_chain_that_cannot_work_is_refused_while_the_job_loads(way: str, entries: Rules, code: str) -> None:
    with pytest.raises(ConfigError) as refused:
        settle(RoundPlan(**{way: entries}), Aggregation())
    assert refused.value.code == code
    assert way in refused.value.message or code == "unknown_name"


@pytest.mark.parametrize(
    ("entries", "code"),
    [
        (("int8", "negated"), "transform_order"),
        (("added", "int8"), "transform_order"),
        (("added", "negated"), "transform_order"),
        (("int8", "added"), "transform_not_linear"),
        (("negated", "negated"), "transform_twice"),
        (("added", "added"), "transform_twice"),
        (("negated", "int8"), ""),
        (("negated", "added"), ""),
    ],
)
def test_stages_and_promises_refuse_a_chain(monkeypatch: pytest.MonkeyPatch, entries: Rules, code: str) -> None:
    own = {**transforms.registry._fill(), "negated": Negated, "added": Added}
    monkeypatch.setattr(transforms.registry, "_entries", own)
    if not code:
        chain = transforms.read(entries, "uplink")
        assert tuple(chain.transforms) == entries
        adapter = first_adapter()
        arrived = pack(adapter, chain, "alder").adapter()
        assert off(arrived, adapter) <= (0.02 if "int8" in entries else 0)
        return
    with pytest.raises(ConfigError) as refused:
        transforms.read(entries, "uplink")
    assert refused.value.code == code


@registered
def test_bytes_are_told_as_they_travel(name: str) -> None:
    adapter = first_adapter()
    packed = pack(adapter, transforms.read((name,), "uplink"), "alder")
    travelled = sum(t.numel() * t.element_size() for t in packed.parcel.tensors.values())
    assert packed.adapter().bytes_sent() == packed.parcel.bytes == travelled < adapter.bytes()
    assert packed.adapter().bytes() == adapter.bytes() == adapter.bytes_sent()
    (event,) = packed.events
    assert (event.transform, event.bytes_before, event.bytes_after) == (name, adapter.bytes(), travelled)


def test_no_transform_leaves_every_tensor_as_it_is() -> None:
    adapter = first_adapter()
    packed = pack(adapter, Chain(), "alder")
    assert identical(packed.adapter(), adapter)
    assert (packed.events, dict(packed.kept)) == ((), {})


@pytest.mark.usefixtures("malformed_allowed")  # the checks of a test run would read values to look at them
def test_an_encoded_adapter_is_read_a_tensor_at_a_time() -> None:
    packed = pack(first_adapter(), transforms.read(("int8",), "uplink"), "alder")
    read: list[str] = []
    inside = packed.parcel.tensors

    class Counting(dict[str, Tensor]):
        def __getitem__(self, name: str) -> Tensor:
            read.append(name)
            return inside[name]

    adapter = replace(packed, parcel=replace(packed.parcel, tensors=Counting(inside))).adapter()
    assert (adapter.scales(), adapter.bytes_sent(), adapter.descriptions()[A].shape) == (
        {"l": 1.0},
        packed.parcel.bytes,
        (6, 130),
    )
    assert read == []
    pair = adapter.lora["l"]
    assert pair.A.shape[0] == pair.rank
    assert read == [A]
    assert pair.B.shape[1] == pair.rank
    assert sorted(read) == [A, B]


@registered
def test_the_largest_number_arrives_finite(name: str) -> None:
    tensor = torch.full((1, 130), torch.finfo(torch.float32).max)
    packed = pack(Adapter({}, {"head": tensor}), transforms.read((name,), "uplink"), "alder")
    torch.testing.assert_close(packed.adapter().dense["head"], tensor, rtol=0.01, atol=0)


def test_settings_of_a_transform_are_plain_json() -> None:
    for name in transforms.registry:
        json.dumps(transforms.registry[name]().model_dump(mode="json"))


def test_the_transform_of_the_how_to_is_all_of_its_file() -> None:
    root = Path(__file__).parents[1]
    page = (root / "docs" / "how_to" / "encode_what_travels.md").read_text(encoding="utf-8")
    assert (root / "nvflare_fm" / "transforms" / "bf16.py").read_text(encoding="utf-8") in page
