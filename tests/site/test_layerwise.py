"""Laws of steps by one second moment a tensor."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.optim import AdamW

from nvflare_fm.site.training.layerwise import LayerwiseStep

SHAPES = st.lists(st.integers(1, 5), min_size=1, max_size=2).map(tuple)
SIZES = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=4)


def after(start: Tensor, gradients: list[Tensor], layerwise: bool, **settings: float) -> Tensor:
    """Where AdamW, with the hook or without, brings a tensor."""
    parameter = torch.nn.Parameter(start.clone())
    optimizer = AdamW([parameter], **{"lr": 0.1, "weight_decay": 0.0} | settings)
    if layerwise:
        optimizer.register_step_pre_hook(LayerwiseStep([parameter]))
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    return parameter.detach()


def drawn(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(SHAPES, SIZES, st.integers(0, 99))
def test_where_all_entries_are_as_large_it_is_adamw(shape: tuple[int, ...], sizes: list[float], seed: int) -> None:
    gradients = [size * drawn(shape, seed + i).sign() for i, size in enumerate(sizes)]
    start, settings = drawn(shape, seed - 1), {"weight_decay": 0.3}
    mine, adamw = (after(start, gradients, layerwise, **settings) for layerwise in (True, False))
    torch.testing.assert_close(mine, adamw, rtol=1e-5, atol=1e-6)


@given(SHAPES, st.integers(0, 99))
def test_the_first_step_is_along_the_gradient_and_as_long_as_the_rate(shape: tuple[int, ...], seed: int) -> None:
    start, gradient = drawn(shape, seed), drawn(shape, seed + 1)
    moved = after(start, [gradient], True) - start
    torch.testing.assert_close(moved, -0.1 * gradient / gradient.square().mean().sqrt(), rtol=1e-5, atol=1e-6)


@given(SHAPES, st.integers(1, 4), st.floats(1e-2, 1e2), st.integers(0, 99))
def test_the_loss_can_be_in_any_unit(shape: tuple[int, ...], steps: int, unit: float, seed: int) -> None:
    start, gradients = drawn(shape, seed), [drawn(shape, seed + 1 + i) for i in range(steps)]
    scaled = [unit * g for g in gradients]
    torch.testing.assert_close(after(start, scaled, True), after(start, gradients, True), rtol=1e-4, atol=1e-4)


def test_classes_with_a_faint_gradient_move_as_little_where_adam_moves_them_as_far() -> None:
    gradient = torch.tensor([[-1.0, -1.0], [0.01, 0.01]])  # a class of the batch, and one it lacks
    mine, adamw = (after(torch.zeros(2, 2), [gradient], layerwise)[1, 0] for layerwise in (True, False))
    assert float(mine) == pytest.approx(-0.1 * 0.01 * 2**0.5, rel=1e-3)
    assert float(adamw) == pytest.approx(-0.1, rel=1e-3)


def test_other_parameters_are_left_to_the_optimizer() -> None:
    mine, other = torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(2))
    optimizer = AdamW([mine, other], lr=0.1, weight_decay=0.0)
    optimizer.register_step_pre_hook(LayerwiseStep([mine]))
    mine.grad = other.grad = torch.tensor([1.0, 0.1])
    optimizer.step()
    assert other.tolist() == pytest.approx([-0.1, -0.1])
    assert mine.tolist()[1] == pytest.approx(mine.tolist()[0] / 10)
