"""Shortening what is much longer than its result: as close as the SVD of the dense ΔW, whatever the spectrum.

`direct=0` makes every pair long; elsewhere there are enough sites.
"""

import weakref

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from nvflare_fm.adapter import Adapter, Lazy, LoraPair, Waiting, WaitingPair
from nvflare_fm.aggregation.cohort import Cohort
from nvflare_fm.aggregation.combine import combine
from nvflare_fm.algebra import inner as pieces
from nvflare_fm.algebra.inner import energy, of_sums
from nvflare_fm.algebra.lora import DIRECT, head, owners, shorten, stack
from nvflare_fm.config import Aggregation
from tests.strategies import (
    DOUBLE,
    MANIFEST,
    SINGLE,
    close,
    dense_mean,
    identical,
    layers,
    make_pair,
    precisions,
    rotated,
    update,
)

TOLERANCE = {DOUBLE: 1e-6, SINGLE: 1e-5}
SPECTRA = {
    "flat": lambda i: torch.ones_like(i),
    "nearly flat": lambda i: 1 - i / 200,
    "falling": lambda i: 0.7**i,
    "tied in pairs": lambda i: 0.8 ** (i // 2),
    "deficient": lambda i: (i < 5).double(),
    "faint": lambda i: torch.where(i < 2, 1.0, 1e-4 * (1 - i / 200)),
    "zero": lambda i: torch.zeros_like(i),
}


def spread(fan_out: int, fan_in: int, values: torch.Tensor, more: int, seed: int) -> LoraPair:
    """A pair with these singular values, whose rank is `more` than it needs."""
    generator = torch.Generator().manual_seed(seed)
    sides = (fan_out, fan_in, len(values) + more)
    u, v, turn = (torch.linalg.qr(torch.randn(n, len(values), generator=generator, dtype=DOUBLE))[0] for n in sides)
    return LoraPair(turn @ v.T, (u * values) @ turn.T / 2, 2.0)


@st.composite
def long_pairs(draw: st.DrawFn, spectra: tuple[str, ...] = tuple(SPECTRA)) -> LoraPair:
    fan_out, fan_in = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    values = SPECTRA[draw(st.sampled_from(spectra))](torch.arange(min(fan_out, fan_in)).double())
    return spread(fan_out, fan_in, values, draw(st.integers(0, 30)), draw(st.integers(0, 2**32)))


few = st.integers(0, 5)


@given(long_pairs(), few, precisions)
def test_a_long_pair_is_shortened_as_closely_as_any_pair_of_that_rank_can_be(pair, rank, dtype):
    short, lost = shorten(pair.to(dtype), rank, direct=0)
    values = torch.linalg.svdvals(pair.delta())
    norm, best = float(values.norm()), float(values[rank:].norm())  # Eckart-Young
    assert short.rank <= rank
    assert float((short.delta().double() - pair.delta()).norm()) <= best + TOLERANCE[dtype] * norm
    assert lost == pytest.approx((best / norm) ** 2 if norm else 0.0, abs=TOLERANCE[dtype])


@given(long_pairs(("falling",)), few)
def test_a_long_pair_has_the_canonical_form_of_a_short_one_with_its_signs(pair, rank):
    short, _ = shorten(pair, rank, direct=0)
    expected, _ = shorten(pair, rank)
    assert short.rank == expected.rank
    close(short.A, expected.A, 1e-3)
    close(short.B, expected.B, 1e-3)
    close(short.A @ short.A.T, torch.eye(short.rank).double(), 1e-10, 1.0)


@given(long_pairs(("deficient", "zero")))
def test_empty_directions_of_a_long_pair_are_left_out(pair):
    assert shorten(pair, 20, direct=0)[0].rank == int((torch.linalg.svdvals(pair.delta()) > 1e-9).sum())


@given(long_pairs(("falling", "nearly flat")), st.floats(0.05, 0.95))
def test_a_long_pair_keeps_the_directions_that_hold_the_share_of_all_energy(pair, keep):
    held = torch.linalg.svdvals(pair.delta()).square().cumsum(0)
    held = held / held[-1]
    assume(((held - keep).abs() > 1e-6).all())
    expected = min(5, 1 + int((held < keep).sum()))
    assert shorten(pair, 5, keep_energy=keep, direct=0)[0].rank == expected


@given(long_pairs(("falling",)), st.integers(1, 5), st.integers(0, 99))
def test_a_long_pair_is_shortened_the_same_however_b_and_a_are_turned_inside_the_rank(pair, rank, seed):
    one, other = (shorten(p, rank, direct=0)[0].delta() for p in (pair, rotated(pair, seed)))
    close(one, other, 1e-3, float(pair.delta().norm()))


def test_a_long_pair_is_shortened_the_same_bit_for_bit_each_time():
    pair = make_pair(60, 50, 70, seed=0)
    one, other = (shorten(pair, 5, direct=0)[0] for _ in range(2))
    assert torch.equal(one.A, other.A)
    assert torch.equal(one.B, other.B)


@pytest.mark.parametrize("dtype", [SINGLE, DOUBLE])
def test_pure_noise_longer_than_the_layer_is_wide_is_shortened_to_within_a_millionth_of_the_best(dtype):
    pair = make_pair(300, 200, 500, seed=0).to(dtype)
    assert pair.rank > DIRECT
    values = torch.linalg.svdvals(pair.to(DOUBLE).delta())
    short, lost = shorten(pair, 8)
    best = float(values[8:].norm())
    assert float((short.to(DOUBLE).delta() - pair.to(DOUBLE).delta()).norm()) <= best * (1 + 1e-6)
    assert lost == pytest.approx((best / float(values.norm())) ** 2, abs=1e-6)


@given(st.integers(1, 7), st.integers(1, 7), st.integers(0, 600), st.integers(0, 99))
def test_energy_and_inner_products_are_those_of_the_dense_changes_however_long_the_pairs(fan_out, fan_in, rank, seed):
    pairs = [make_pair(fan_out, fan_in, r, seed + r, scale=2.0) for r in (rank, 3, 300)]
    flat = torch.stack([p.delta().flatten() for p in pairs])
    inner = of_sums(stack(pairs, [1.0] * 3), owners([p.rank for p in pairs]))
    close(inner, flat @ flat.T, 1e-10)
    assert energy(pairs[0]) == pytest.approx(float(pairs[0].delta().square().sum()), rel=1e-9)


def many(count: int, made: list[int] | None = None, waiting: bool = False) -> list:
    """Sites of rank 16; `made`: how many of their tensors A were alive when one was read; `waiting`: each factor is
    fetched on its own when it is read, as from the server's disk.
    """
    alive: set[int] = set()

    def pair(site: int) -> LoraPair:
        found = make_pair(60, 50, 16, seed=site).to(SINGLE)
        if made is not None:
            alive.add(id(found.A))
            weakref.finalize(found.A, alive.discard, id(found.A))
            made.append(len(alive))
        return found

    def later(site: int) -> LoraPair:
        a = Waiting((16, 50), SINGLE, lambda: pair(site).A)
        return WaitingPair(a, Waiting((60, 16), SINGLE, lambda: pair(site).B))

    read = later if waiting else pair
    adapters = [Adapter(Lazy(["q"], lambda _, site=site: read(site))) for site in range(count)]
    return [update(f"s{site:02}", adapter, site + 1) for site, adapter in enumerate(adapters)]


STATE = Adapter({"q": shorten(make_pair(60, 50, 16, seed=99).to(SINGLE), 16)[0]})


def test_a_round_of_many_sites_is_the_best_approximation_of_the_weighted_mean_in_any_order():
    updates = many(20)
    result = combine(STATE, MANIFEST, updates, Aggregation(), 16)
    expected = dense_mean([u.adapter.lora["q"].to(DOUBLE).delta() for u in updates], list(result.weights.values()))
    values = torch.linalg.svdvals(expected)
    error = float((result.adapter.lora["q"].delta().double() - expected).norm())
    assert error <= float(values[16:].norm()) + 1e-5 * float(values.norm())
    turned = [updates[::-1], updates[7:] + updates[:7]]
    assert all(identical(combine(STATE, MANIFEST, o, Aggregation(), 16).adapter, result.adapter) for o in turned)


@pytest.mark.parametrize("weigh", [("examples",), ("agreement",), ("norm",)])
@pytest.mark.parametrize("merge", ["exact", "svd", "stack"])
@pytest.mark.parametrize("waiting", [False, True])
def test_the_server_holds_one_site_at_a_time_besides_the_sum(weigh, merge, waiting):
    made: list[int] = []
    combine(STATE, MANIFEST, many(20, made, waiting), Aggregation(merge=merge, weigh=weigh), 16)
    assert made
    assert max(made) <= 3  # the one of before and the one that is read


def test_the_products_of_what_sites_of_any_rank_changed_are_those_of_the_dense_changes():
    adapters = [make_pair(9, 8, rank, seed=rank, scale=0.5).to(SINGLE) for rank in (1, 3, 5, 20)]
    for rest in ("none", "tail", "all"):
        state = Adapter({"q": make_pair(9, 8, 5, seed=0, scale=2.0).to(SINGLE)})
        cohort = Cohort([update(f"s{p.rank}", Adapter({"q": p})) for p in adapters], state, rest)
        began = [head(state.lora["q"], 0 if rest == "all" else p.rank).delta() for p in adapters]
        flat = torch.stack([(p.delta() - g).flatten().double() for p, g in zip(adapters, began, strict=True)])
        close(cohort.products, flat @ flat.T, 1e-5)
        norms = torch.stack([p.delta().norm() for p in adapters])
        close(cohort.norms, norms.double(), 1e-5)


@given(layer=layers(), panel=st.integers(1, 5), rows=st.integers(1, 5))
def test_the_pieces_in_which_long_sums_are_multiplied_change_nothing(layer, panel, rows):
    with pytest.MonkeyPatch.context() as patch:
        for name, size in (("DIRECT", 1), ("PANEL", panel), ("ROWS", rows)):
            patch.setattr(pieces, name, size)
        found = of_sums(stack(layer.pairs, [1.0] * len(layer.pairs)), owners([p.rank for p in layer.pairs]))
    flat = torch.stack([p.delta().flatten() for p in layer.pairs])
    close(found, flat @ flat.T, 1e-10, layer.size() ** 2)
