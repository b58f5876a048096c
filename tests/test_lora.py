"""The algebra of B @ A against the dense computation in float64."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from nvflare_fm.adapter import LoraPair
from nvflare_fm.algebra.inner import of_sums
from nvflare_fm.algebra.lora import (
    effective_rank,
    fresh_rows,
    head,
    owners,
    refill,
    shorten,
    spectrum,
    stack,
    svd,
    tail,
    zero,
)
from tests.strategies import (
    DOUBLE,
    SINGLE,
    TOLERANCE,
    close,
    dense_mean,
    layers,
    make_pair,
    pairs,
    precisions,
    ranks,
    rotated,
    scales,
    sides,
)

sigmas = st.sampled_from(["B", "balanced", "A"])


@given(pairs(), scales)
def test_a_pair_rescaled_is_the_same_change(pair, scale):
    other = pair.rescaled(scale)
    assert other.scale == scale
    close(other.delta(), pair.delta(), 1e-12)


@given(layers(), precisions)
def test_stacking_is_the_weighted_sum_of_the_products(layer, dtype):
    stacked = stack([p.to(dtype) for p in layer.pairs], layer.weights)
    assert stacked.rank == sum(p.rank for p in layer.pairs)
    close(stacked.delta(), dense_mean([p.delta() for p in layer.pairs], layer.weights), TOLERANCE[dtype], layer.size())


@given(pairs(), precisions)
def test_the_short_svd_is_the_svd_of_the_dense_change(pair, dtype):
    u, sigma, vt = svd(pair.to(dtype))
    dense = torch.linalg.svdvals(pair.delta())
    close(sigma, dense[: len(sigma)], TOLERANCE[dtype], float(dense.norm()) or 1.0)
    close((u.double() * sigma) @ vt.double(), pair.delta(), TOLERANCE[dtype], float(dense.norm()) or 1.0)
    close(u.double().T @ u.double(), torch.eye(len(sigma)).double(), TOLERANCE[dtype], 1.0)
    close(vt.double() @ vt.double().T, torch.eye(len(sigma)).double(), TOLERANCE[dtype], 1.0)


@given(pairs())
def test_signs_are_fixed_so_that_the_largest_entry_of_each_left_vector_is_positive(pair):
    u, _, _ = svd(pair)
    assert (u.gather(0, u.abs().argmax(dim=0, keepdim=True)) > 0).all() if u.numel() else True


@given(pairs(), ranks, sigmas, precisions)
def test_shortening_is_as_close_as_any_pair_of_that_rank_can_be(pair, rank, sigma, dtype):
    short, lost = shorten(pair.to(dtype), rank, sigma)
    values = torch.linalg.svdvals(pair.delta())
    norm = float(values.norm())
    best = float(values[rank:].norm())  # Eckart-Young
    assert short.rank <= rank
    assert float((short.delta().double() - pair.delta()).norm()) <= best + TOLERANCE[dtype] * norm
    assert lost == pytest.approx((best / norm) ** 2 if norm else 0.0, abs=TOLERANCE[dtype])


@given(pairs(), ranks)
def test_the_canonical_form_has_falling_singular_values_and_orthonormal_rows_of_a(pair, rank):
    short, _ = shorten(pair, rank, "B")
    lengths = short.B.norm(dim=0)
    assert short.scale == 1.0
    assert (lengths[:-1] >= lengths[1:] * (1 - 1e-12)).all()
    assert (lengths > 0).all()
    close(short.A @ short.A.T, torch.eye(short.rank).double(), 1e-10, 1.0)
    inner = short.B.T @ short.B
    close(inner, torch.diag(inner.diagonal()), 1e-10, float(inner.norm()) or 1.0)


@given(pairs(), ranks)
def test_sigma_says_which_factor_holds_the_singular_values(pair, rank):
    in_b, in_a, shared = (shorten(pair, rank, s)[0] for s in ("B", "A", "balanced"))
    values = in_b.B.norm(dim=0)
    one = torch.ones_like(values)
    close(in_a.A.norm(dim=1), values, 1e-10)
    close(in_a.B.norm(dim=0), one, 1e-10)
    close(shared.A.norm(dim=1), values.sqrt(), 1e-10)
    close(shared.B.norm(dim=0), values.sqrt(), 1e-10)
    for other in (in_a, shared):
        close(other.delta(), in_b.delta(), 1e-10)


@given(pairs(), ranks, st.integers(0, 99))
def test_shortening_does_not_see_how_b_and_a_are_turned_inside_the_rank(pair, rank, seed):
    values = torch.linalg.svdvals(pair.delta())
    assume(rank >= len(values) or values[rank] < 0.9 * values[rank - 1] or rank == 0)  # a tie may be cut either way
    close(shorten(rotated(pair, seed), rank)[0].delta(), shorten(pair, rank)[0].delta(), 1e-8, float(values.norm()))


@given(pairs(), ranks)
def test_shortening_what_is_short_changes_nothing(pair, rank):
    short, _ = shorten(pair, rank)
    again, lost = shorten(short, rank)
    assert again.rank == short.rank
    assert lost == 0.0
    close(again.A, short.A, 1e-6)
    close(again.B, short.B, 1e-6)


def test_a_faint_direction_of_a_wide_layer_is_kept():
    drawn = make_pair(4096, 4096, 2, seed=0).to(SINGLE)
    columns, rows = torch.linalg.qr(drawn.B)[0], torch.linalg.qr(drawn.A.T)[0].T
    pair = LoraPair(rows, columns * torch.tensor([1.0, 1e-4]))
    short, lost = shorten(pair, 2)
    assert short.rank == 2
    assert lost == 0.0
    close(short.B.norm(dim=0)[1:], torch.tensor([1e-4]), 1e-3)


def test_directions_that_are_only_rounding_noise_are_left_out():
    pair = make_pair(64, 64, 8, seed=0).to(SINGLE)
    doubled = stack([pair, pair], [0.3, 0.7])
    assert shorten(doubled, 16)[0].rank == 8


@given(pairs(), ranks)
def test_head_and_tail_make_the_whole(pair, rank):
    first, other = head(pair, rank), tail(pair, rank)
    assert first.rank == min(rank, pair.rank)
    assert first.rank + other.rank == pair.rank
    close(first.delta() + other.delta(), pair.delta(), 1e-12, 1 + float(pair.delta().norm()))


@given(pairs(), ranks)
def test_the_head_of_a_canonical_pair_is_its_best_approximation(pair, rank):
    whole, _ = shorten(pair, 6)
    close(head(whole, rank).delta(), shorten(pair, rank)[0].delta(), 1e-10, 1 + float(pair.delta().norm()))


@given(layers(), precisions)
def test_the_gram_matrix_holds_the_inner_products_of_the_dense_changes(layer, dtype):
    sent = [p.to(dtype) for p in layer.pairs]
    inner = of_sums(stack(sent, [1.0] * len(sent)), owners([p.rank for p in sent]))
    flat = torch.stack([p.delta().flatten() for p in layer.pairs])
    close(inner, flat @ flat.T, TOLERANCE[dtype], layer.size() ** 2)


@given(sides, ranks, ranks, st.integers(0, 9))
def test_a_low_rank_site_makes_the_first_rows_of_a_high_rank_site(fan_in, rank, more, seed):
    few, many = (fresh_rows("layer", fan_in, range(r), seed) for r in (rank, rank + more))
    assert torch.equal(few, many[:rank])


@given(st.integers(1, 9), ranks, st.integers(0, 9))
def test_fresh_rows_are_orthonormal_as_far_as_the_layer_is_wide(fan_in, rank, seed):
    rows = fresh_rows("layer", fan_in, range(rank), seed)
    wide = rows[:fan_in]
    assert rows.shape == (rank, fan_in)
    close(wide @ wide.T, torch.eye(len(wide)), 1e-5, 1.0)
    close(rows.norm(dim=1), torch.ones(rank), 1e-6)


def test_fresh_rows_differ_by_layer_row_and_seed():
    first = fresh_rows("q_proj", 64, range(1), seed=0)
    others = [
        fresh_rows("k_proj", 64, range(1), seed=0),
        fresh_rows("q_proj", 64, range(1, 2), seed=0),
        fresh_rows("q_proj", 64, range(1), seed=1),
    ]
    assert all((first @ other.T).abs().item() < 0.5 for other in others)


@given(pairs(), ranks, ranks, sigmas)
def test_refilling_keeps_the_change_and_lets_every_direction_learn(pair, kept, rank, sigma):
    short, _ = shorten(pair, kept, sigma)
    full = refill(short, rank, "layer", seed=0)
    assert full.rank == max(rank, short.rank)
    assert torch.equal(full.delta(), short.delta()) or (full.delta() - short.delta()).norm() < 1e-12
    assert torch.equal(full.A[: short.rank], short.A)
    assert (full.B[:, short.rank :] == 0).all()
    rows = torch.nn.functional.normalize(full.A, dim=1)[: pair.shape[1]]
    close(rows @ rows.T, torch.eye(len(rows)).double(), 1e-5, 1.0)
    close(full.A[short.rank :].norm(dim=1), torch.ones(full.rank - short.rank).double(), 1e-5)


@given(sides, sides)
def test_zero_is_no_change_at_rank_zero(fan_out, fan_in):
    nothing = zero(fan_out, fan_in, DOUBLE)
    assert nothing.rank == 0
    assert nothing.shape == (fan_out, fan_in)
    assert (nothing.delta() == 0).all()


@given(data=st.data(), count=st.integers(1, 4))
def test_the_spectrum_of_a_canonical_pair_is_its_singular_values_and_the_effective_rank_lies_between_one_and_its_rank(
    data, count
):
    pair = data.draw(pairs(rank=count))
    for sigma in ("A", "balanced", "B"):
        short, _ = shorten(pair, count, sigma)
        values = torch.linalg.svdvals(pair.delta())[: short.rank]
        close(spectrum(short), values, 1e-9, 1e-12 + float(values.norm()))
        if short.rank:
            assert 1 - 1e-9 <= effective_rank(spectrum(short)) <= short.rank + 1e-9


def test_the_effective_rank_counts_directions_that_carry_energy():
    assert effective_rank(torch.tensor([2.0, 2.0, 2.0, 0.0])) == pytest.approx(3.0)
    assert effective_rank(torch.tensor([5.0])) == pytest.approx(1.0)
    assert effective_rank(torch.zeros(3)) == 0.0


@pytest.mark.parametrize(("keep", "rank"), [(0.5, 1), (0.79, 1), (0.81, 2), (0.951, 3), (1.0, 3)])
def test_shortening_keeps_the_fewest_directions_that_hold_the_share_of_energy(keep, rank):
    diagonal = torch.tensor([80.0, 15.0, 5.0]).sqrt().double()
    pair = LoraPair(torch.eye(3).double(), torch.diag(diagonal))
    short, lost = shorten(pair, 3, keep_energy=keep)
    assert short.rank == rank
    assert lost <= 1 - keep + 1e-12
