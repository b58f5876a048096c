"""Feature synthesis: a unit moves what is sent by at most 1, and without noise the Gaussians are those of the rows."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from nvflare_fm.synthesis.features import drawn, gaussians, head, moments
from nvflare_fm.synthesis.vote import noised

sizes = st.tuples(st.integers(1, 8), st.integers(1, 4), st.integers(1, 3), st.integers(0, 2**31))


def rows(count: int, width: int, classes: int, seed: int) -> tuple[torch.Tensor, list[int]]:
    generator = torch.Generator().manual_seed(seed)
    points = 2 * torch.randn(count, width, generator=generator)  # many are longer than 1
    return points, torch.randint(classes, (count,), generator=generator).tolist()


@given(sizes, st.data())
def test_a_unit_moves_what_is_sent_by_at_most_1_however_many_rows_it_has(size, data):
    points, labels = rows(*size)
    units = data.draw(st.lists(st.integers(0, 3), min_size=len(labels), max_size=len(labels)))
    whole = moments(points, labels, units, size[2])
    for unit in {*units}:
        kept = [place for place, other in enumerate(units) if other != unit]
        less = moments(points[kept], [labels[p] for p in kept], [units[p] for p in kept], size[2])
        assert float((whole - less).norm()) <= 1 + 1e-9


@given(sizes)
def test_without_noise_the_means_counts_and_spread_are_those_of_the_rows(size):
    points, labels = rows(*size)
    points = points / points.norm(dim=1, keepdim=True).clamp(min=1)
    found = gaussians(moments(points, labels, range(len(labels)), size[2]), size[2], 0.0)
    spread = torch.zeros(size[1], dtype=torch.float64)
    for label in range(size[2]):
        mine = points[[place for place, other in enumerate(labels) if other == label]].double()
        assert float(found.counts[label]) == len(mine) or abs(float(found.counts[label]) - len(mine)) < 1e-9
        if len(mine):
            assert torch.allclose(found.means[label], mine.mean(0), atol=1e-6)
            spread += (mine - mine.mean(0)).square().sum(0)
    assert torch.allclose(found.variance, (spread / len(labels)).clamp(min=1e-6), atol=1e-6)


def test_sites_add_up():
    points, labels = rows(20, 3, 2, 0)
    parts = sum(moments(points[i::2], labels[i::2], range(10), 2) for i in (0, 1))
    assert torch.allclose(parts, moments(points, labels, range(20), 2))


def test_points_are_drawn_from_the_gaussians_and_only_of_classes_that_are_there():
    points, labels = rows(60, 3, 2, 1)
    found = gaussians(moments(points, labels, range(60), 3), 3, 0.0)
    made, classes = drawn(found, 20_000, torch.Generator().manual_seed(0))
    assert {*classes.tolist()} == {0, 1}
    for label in (0, 1):
        mine = made[classes == label]
        assert torch.allclose(mine.mean(0), found.means[label], atol=0.03)
        assert torch.allclose(mine.var(0), found.variance, rtol=0.06)


def test_noise_alone_makes_no_class():
    generator, missed = torch.Generator().manual_seed(0), 0
    for _ in range(50):
        none = noised(torch.zeros(10 * 5 + 4), 3.0, lambda n: torch.randn(n, generator=generator, dtype=torch.float64))
        missed += int((gaussians(none, 10, 3.0).counts > 0).sum())
    assert missed < 0.04 * 500  # two deviations: 2.3 %


def test_a_head_tells_classes_apart_that_lie_apart():
    points = torch.cat([torch.randn(50, 4) * 0.05 + torch.eye(4)[place] for place in range(3)])
    labels = torch.arange(3).repeat_interleave(50)
    weight, bias = head(points, labels, 4)
    assert ((points @ weight.T + bias).argmax(1) == labels).float().mean() > 0.98
