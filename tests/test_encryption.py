"""The laws of encrypted sums: of rows of ciphertexts, of the transform over them, and of the round that adds them."""

import struct
import subprocess
import sys
from dataclasses import replace
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nvflare_fm import transforms
from nvflare_fm.adapter import LORA_A, LORA_B, Adapter, AdapterUpdate, Description, LoraPair, Report
from nvflare_fm.aggregation.encrypted import combine_unread
from nvflare_fm.config import Aggregation
from nvflare_fm.encryption import keys
from nvflare_fm.encryption.ciphertexts import check, decrypted, encrypted, weighted_sum
from nvflare_fm.encryption.keys import read_keys
from nvflare_fm.encryption.reader import check_apart
from nvflare_fm.errors import ConfigError, WireError
from nvflare_fm.transforms import Parcel
from nvflare_fm.transforms.packed import Sealed, added, check_sealed, pack

from .encryption import contexts, kits
from .strategies import MANIFEST, make_pair

pytestmark = pytest.mark.usefixtures("malformed_allowed")  # the checks of a test run would read values to look at them
SERVER, SITE = kits()
SLOTS = SITE.slots
NAME = "ciphertexts.00000"  # of the first tensor that travels
few = settings(max_examples=15)


def numbers(count: int, seed: int, size: float) -> Any:
    return numpy.random.default_rng(seed).standard_normal(count) * size


@few
@given(
    count=st.sampled_from([1, 2, 77, SLOTS - 1, SLOTS, SLOTS + 1, 2 * SLOTS + 5]),
    shares=st.lists(st.sampled_from([0.0, 1e-3, 0.2, 0.7, 3.0]), min_size=1, max_size=4).filter(any),
    size=st.sampled_from([1e-4, 1e-2, 1.0, 20.0]),
    seed=st.integers(0, 999),
)
def test_a_sum_decrypts_to_the_weighted_sum(count: int, shares: list[float], size: float, seed: int) -> None:
    shares = [share / sum(shares) for share in shares]
    vectors = [numbers(count, seed + i, size) for i in range(len(shares))]
    total = weighted_sum(SERVER, [encrypted(SITE, vector) for vector in vectors], shares, count)
    expected = sum(share * vector for share, vector in zip(shares, vectors, strict=True))
    scale = sum(share * numpy.linalg.norm(vector) for share, vector in zip(shares, vectors, strict=True))
    assert numpy.linalg.norm(decrypted(SITE, total, count) - expected) <= 1e-5 * scale


def test_a_sum_has_half_the_bytes_and_the_same_numbers_encrypt_to_other_bytes_each_time() -> None:
    vector = numbers(2 * SLOTS, 0, 0.01)
    row = encrypted(SITE, vector)
    assert row != encrypted(SITE, vector)
    assert len(weighted_sum(SERVER, [row, row], [0.5, 0.5], 2 * SLOTS)) < 0.6 * len(row)
    assert vector.tobytes()[:64] not in row


def test_a_site_reads_what_another_has_encrypted() -> None:
    vector = numbers(9, 0, 0.01)
    assert numpy.linalg.norm(decrypted(SITE, encrypted(SITE, vector), 9) - vector) <= 1e-5 * numpy.linalg.norm(vector)


def test_whoever_has_another_key_or_none_reads_nothing() -> None:
    vector = numbers(9, 0, 0.01)
    total = weighted_sum(SERVER, [encrypted(SITE, vector)], [1.0], 9)
    stranger = read_keys(contexts()[1], secret=True, whose="a stranger")
    with pytest.raises(WireError) as refused:
        decrypted(stranger, total, 9)
    assert refused.value.code == "other_key"
    with pytest.raises(ValueError):  # TenSEAL's own: the server has no secret key
        decrypted(SERVER, total, 9)
    with pytest.raises(ValueError):
        encrypted(SERVER, vector)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -257.0, 1e30])
def test_what_no_ciphertext_holds_is_refused_by_site(value: float) -> None:
    adapter = Adapter(dense={"head.weight": torch.tensor([0.0, value])})
    with pytest.raises(WireError) as refused:
        pack(adapter, transforms.read(("ckks",), "uplink").keyed(SITE), "alder")
    assert refused.value.code == "too_large_to_encrypt"
    assert refused.value.message.startswith("alder")


# --- the contexts


@pytest.mark.parametrize(
    ("given", "code"),
    [
        ({"poly_modulus_degree": 4096, "coeff_mod_bit_sizes": [40, 20, 40], "scale_bits": 20}, "context_degree"),
        ({"coeff_mod_bit_sizes": [40, 20, 20], "scale_bits": 20}, "context_precision"),
        ({"coeff_mod_bit_sizes": [60, 40], "scale_bits": 40}, "context_precision"),
        ({"coeff_mod_bit_sizes": [60, 40, 40], "scale_bits": 55}, "context_precision"),
    ],
)
def test_contexts_under_which_sums_are_not_exact_are_refused(given: dict[str, Any], code: str) -> None:
    with pytest.raises(ConfigError) as refused:
        read_keys(contexts(**given)[1], secret=True, whose="this site")
    assert refused.value.code == code
    assert "HEBuilder" in refused.value.message


def test_a_larger_ring_with_more_primes_will_do() -> None:
    server, site = contexts(poly_modulus_degree=16384, coeff_mod_bit_sizes=[60, 40, 40, 60])
    add, read = read_keys(server, secret=False, whose="the server"), read_keys(site, secret=True, whose="a site")
    vector = numbers(9000, 1, 0.1)
    row = encrypted(read, vector)
    check(add, row, 9000)
    found = decrypted(read, weighted_sum(add, [row], [0.25], 9000), 9000)
    assert numpy.linalg.norm(found - 0.25 * vector) <= 1e-5 * numpy.linalg.norm(0.25 * vector)


@pytest.mark.parametrize(
    ("data", "secret", "code"),
    [
        (SITE.data, False, "secret_at_server"),
        (SERVER.data, True, "no_secret_key"),
        (b"", True, "context_unreadable"),
        (b"junk" * 99, False, "context_unreadable"),
        (SITE.data[:-9], True, "context_unreadable"),
        (b"0" * (keys.MOST_BYTES + 1), True, "no_context"),
    ],
    ids=["secret", "public", "empty", "junk", "cut", "large"],
)
def test_what_is_no_context_for_this_end_is_refused(data: bytes, secret: bool, code: str) -> None:
    with pytest.raises(ConfigError) as refused:
        read_keys(data, secret, "this end")
    assert refused.value.code == code


def test_a_context_for_whole_numbers_is_refused() -> None:
    tenseal = keys.tenseal()
    context = tenseal.context(tenseal.SCHEME_TYPE.BFV, 8192, plain_modulus=1032193)
    with pytest.raises(ConfigError) as refused:
        read_keys(context.serialize(save_secret_key=True), secret=True, whose="this site")
    assert refused.value.code == "context_scheme"


def test_without_tenseal_the_remedy_is_told() -> None:
    code = "import sys; sys.modules['tenseal'] = None\nfrom nvflare_fm.encryption.keys import read_keys\n"
    code += "try: read_keys(b'', True, 'x')\nexcept Exception as error: print(error.code, error.message)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.startswith("no_tenseal")
    assert "nvflare_fm[encryption]" in said


def test_without_keys_a_plan_that_encrypts_is_refused() -> None:
    with pytest.raises(ConfigError) as refused:
        transforms.read(("ckks",), "uplink").keyed(None)
    assert refused.value.code == "no_context"
    assert transforms.read((), "uplink").keyed(None) == transforms.Chain()


# --- what a stranger sends


ROW = encrypted(SITE, numbers(9, 0, 0.01))
LENGTH = len(ROW) - 4


def resized(length: int) -> bytes:
    return struct.pack("<I", length) + ROW[4:]


FRESH_SUM = weighted_sum(SERVER, [ROW], [1.0], 9)
OTHER_SCALE = ROW[:-8] + struct.pack("<d", 2.0**39)
DAMAGED = {
    "nothing": (b"", "no_ciphertext"),
    "short": (ROW[:-1], "no_ciphertext"),
    "long": (ROW + b"x", "no_ciphertext"),
    "length": (resized(LENGTH + 1), "no_ciphertext"),
    "huge length": (resized(2**32 - 1), "no_ciphertext"),
    "zeros": (ROW[:4] + bytes(LENGTH), "no_ciphertext"),
    "other count": (encrypted(SITE, numbers(8, 0, 0.01)), "other_ciphertext"),
    "a sum": (FRESH_SUM, "other_ciphertext"),
    "a second size": (resized(LENGTH + 2) + b"\x08\x00", "other_ciphertext"),
    "its own scale": (OTHER_SCALE, "other_ciphertext"),  # TenSEAL reads it, and then fails to add it to any other
}


@pytest.mark.parametrize("count", [8, 10])
def test_a_sum_of_another_number_of_numbers_is_not_decrypted(count: int) -> None:
    with pytest.raises(WireError) as refused:
        decrypted(SITE, FRESH_SUM, count)
    assert refused.value.code == "other_ciphertext"


@pytest.mark.parametrize("name", DAMAGED)
def test_what_is_no_fresh_ciphertext_is_refused_with_a_code(name: str) -> None:
    row, code = DAMAGED[name]
    with pytest.raises(WireError) as refused:
        check(SERVER, row, 9)
    assert refused.value.code == code


def test_damage_that_can_be_added_is_found_by_who_can_read_it() -> None:
    """Nobody else can: a ciphertext says nothing of its content."""
    vector = numbers(SLOTS, 0, 0.01)
    row = bytearray(encrypted(SITE, vector))
    for place in range(len(row) // 2, len(row) // 2 + 500):
        row[place] ^= 0x80
    with pytest.raises(WireError) as refused:
        decrypted(SITE, weighted_sum(SERVER, [bytes(row)], [1.0], SLOTS), SLOTS)
    assert refused.value.code in {"other_key", "no_ciphertext"}


def test_another_process_reads_what_a_stranger_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    check_apart(SERVER, [ROW], [9], "alder")
    for name in ("short", "its own scale"):
        row, code = DAMAGED[name]
        with pytest.raises(WireError) as refused:
            check_apart(SERVER, [ROW, row], [9, 9], "alder")
        assert refused.value.code == code
        assert refused.value.message.startswith("alder")
    monkeypatch.setattr("nvflare_fm.encryption.reader.sys.executable", "/bin/false")
    with pytest.raises(WireError) as refused:
        check_apart(SERVER, [ROW], [9], "alder")
    assert refused.value.code == "ciphertext_crash"


# --- the adapter


def adapters(count: int) -> list[Adapter]:
    """Of one shape, with a frozen A that is the same everywhere, as sites send them."""
    frozen = {n: make_pair(*shape, 3, 5).A.float() for n, shape in {"a": (7, 5), "b": (1, 1)}.items()}
    made = []
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        pairs = {
            n: LoraPair(a, 0.1 * torch.randn({"a": 7, "b": 1}[n], 3, generator=generator)) for n, a in frozen.items()
        }
        head = {"head.weight": torch.randn(3, 4, generator=generator), "scalar": torch.randn((), generator=generator)}
        made.append(Adapter(pairs, head | {"none": torch.zeros(0, 7), "half": torch.ones(2, dtype=torch.bfloat16)}))
    return made


def sealed(adapter: Adapter, site: str = "alder") -> Sealed:
    found = pack(adapter, transforms.read(("ckks",), "uplink").keyed(SITE), site).adapter()
    assert isinstance(found, Sealed)
    return found


def without_keys(adapter: Sealed) -> Sealed:
    """As it is after a message, which holds no keys."""
    return replace(adapter.packed, chain=transforms.read(("ckks",), "what alder sent")).sealed()


def test_adapters_add_up_unread_and_open_to_their_mean_without_the_frozen_factor() -> None:
    parts = adapters(3)
    total = added(SERVER, [without_keys(sealed(part)) for part in parts], [0.5, 0.2, 0.3])
    assert total.descriptions() == parts[0].descriptions()
    opened = without_keys(total).packed.opened(SITE)
    assert opened.keys() == {n for n in parts[0].tensors() if not n.endswith(LORA_A)}
    for name, tensor in opened.items():
        expected = sum(w * p.tensors()[name].double() for w, p in zip([0.5, 0.2, 0.3], parts, strict=True))
        assert Description.of(tensor) == parts[0].descriptions()[name]
        precision = 1e-2 if tensor.dtype == torch.bfloat16 else 1e-5
        assert (tensor.double() - expected).norm() <= precision * expected.norm()


def test_what_travels_is_one_tensor_of_bytes_and_is_counted_as_sent() -> None:
    (adapter,) = adapters(1)
    sent = sealed(adapter)
    assert list(sent.packed.parcel.tensors) == [NAME]
    assert sent.bytes_sent() == sent.packed.parcel.tensors[NAME].nbytes > 50_000
    assert sent.bytes() == adapter.bytes()
    (event,) = sent.packed.events
    assert (event.bytes_before, event.bytes_after) == (adapter.bytes(), sent.bytes_sent())
    assert pack(sent, transforms.Chain(), "the server") is sent.packed
    assert sent.packed.chain.fits(sent.packed.parcel.described, adapter.descriptions())


def test_a_large_adapter_travels_in_parts_that_are_read_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nvflare_fm.transforms.ckks._PART", SLOTS)
    adapter = Adapter(dense={"head": torch.linspace(-1, 1, 2 * SLOTS + 3), "tail": torch.ones(5)})
    sent = without_keys(sealed(adapter))
    assert list(sent.packed.parcel.tensors) == [f"ciphertexts.0000{i}" for i in range(3)]
    check_sealed(SERVER, sent, "alder", apart=True)
    opened = without_keys(added(SERVER, [sent, sent], [0.3, 0.7])).packed.opened(SITE)
    for name, tensor in adapter.dense.items():
        assert (opened[name] - tensor).norm() <= 1e-5 * tensor.norm()


@pytest.mark.parametrize(
    "came",
    [
        {},
        {NAME: Description((9,), torch.float32)},
        {NAME: Description((3, 3), torch.uint8)},
        {NAME: Description((0,), torch.uint8)},
        {NAME: Description((2**20 + 1,), torch.uint8)},
        {NAME: Description((9,), torch.uint8), "l" + LORA_B: Description((9,), torch.uint8)},
        {"other": Description((9,), torch.uint8)},
        {NAME: Description((9,), torch.uint8), "ciphertexts.00001": Description((9,), torch.uint8)},
    ],
)
def test_what_came_is_bounded_by_what_it_is_said_to_hold(came: dict[str, Description]) -> None:
    assert not transforms.read(("ckks",), "uplink").fits(came, adapters(1)[0].descriptions())


def updates(count: int, examples: tuple[int, ...] = (10, 30, 60)) -> list[AdapterUpdate]:
    return [
        AdapterUpdate(f"site-{i}", without_keys(sealed(a, f"site-{i}")), MANIFEST, Report(examples=n, rank=3))
        for i, (a, n) in enumerate(zip(adapters(count), examples, strict=True))
    ]


def add(parts: Any, shares: Any) -> Adapter:
    return added(SERVER, parts, shares)


def test_a_round_weighs_as_it_would_if_it_could_read_and_goes_on_without_a_site() -> None:
    how = Aggregation(merge="freeze_a", guard=(), weigh=("examples",), max_weight=0.5)
    everyone = updates(3)
    combined = combine_unread(Adapter(), None, everyone[::-1], how, add)
    assert combined.weights == pytest.approx({"site-0": 0.125, "site-1": 0.375, "site-2": 0.5})
    two = combine_unread(combined.adapter, MANIFEST, everyone[:2], how, add)
    assert sum(two.weights.values()) == pytest.approx(1)
    opened = without_keys(two.adapter).packed.opened(SITE)["head.weight"]  # type: ignore[arg-type]
    parts = [part.dense["head.weight"] for part in adapters(2)]
    expected = sum(two.weights[f"site-{i}"] * part for i, part in enumerate(parts))
    assert (opened - expected).norm() <= 1e-5 * expected.norm()


def test_a_site_with_other_layers_costs_itself_the_round() -> None:
    others = [replace(u, site=f"b{u.site}") for u in updates(3)]
    head = Adapter(adapters(1)[0].lora, {"head.weight": torch.zeros(2)})
    other = AdapterUpdate("c", without_keys(sealed(head, "c")), MANIFEST, Report(rank=3))
    combined = combine_unread(others[0].adapter, MANIFEST, [*others, other], Aggregation(guard=()), add)
    assert set(combined.refused) == {"c"}
    with pytest.raises(WireError) as refused:
        combine_unread(others[0].adapter, MANIFEST, [other], Aggregation(guard=()), add)
    assert refused.value.code == "nothing_to_merge"


def test_an_update_that_is_readable_is_not_added_to_those_that_are_not() -> None:
    (adapter,) = adapters(1)
    for call in (
        lambda: added(SERVER, [without_keys(sealed(adapter)), adapter], [0.5, 0.5]),
        lambda: check_sealed(SERVER, adapter, "alder", apart=False),
    ):
        with pytest.raises(WireError) as refused:
            call()
        assert refused.value.code == "not_encrypted"


def test_a_ciphertext_that_cannot_be_read_is_told_by_site() -> None:
    sent = without_keys(sealed(adapters(1)[0]))
    check_sealed(SERVER, sent, "alder", apart=False)
    whole = sent.packed.parcel
    broken = {NAME: whole.tensors[NAME].clone()}
    broken[NAME][4:200] = 0
    packed = replace(sent.packed, parcel=Parcel("alder", broken, whole.described))
    for apart in (False, True):
        with pytest.raises(WireError) as refused:
            check_sealed(SERVER, packed.sealed(), "alder", apart)
        assert refused.value.code == "no_ciphertext"
        assert refused.value.message.startswith("alder")
