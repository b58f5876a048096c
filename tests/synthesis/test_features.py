"""A head from sums: that of pooled rows, however they are spread, and of finite numbers whatever is claimed."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from nvflare_fm.synthesis.features import NAMES, START, Head, Sums, covariance, drawn, head, means, of_rows, precision

sizes = st.tuples(st.integers(1, 30), st.integers(1, 4), st.integers(1, 3), st.integers(0, 2**31))


def rows(count: int, width: int, classes: int, seed: int) -> tuple[torch.Tensor, list[int]]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=generator)
    middles = 3 * torch.randn(classes, width, generator=generator)
    return middles[labels] + torch.randn(count, width, generator=generator), labels.tolist()


def summed(points: torch.Tensor, labels: list[int], classes: int) -> Sums:
    found = Sums.none(classes, points.shape[1])
    found.add(points, labels)
    return found


@given(sizes)
def test_it_is_the_linear_discriminant_analysis_of_the_rows(size):
    points, labels = rows(60 + size[0], size[1] + 1, size[2] + 1, size[3])
    classes, shrinkage = size[2] + 1, points.shape[1] / len(points)
    found = head(summed(points, labels, classes))
    theirs = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage / (1 + shrinkage)).fit(points, labels)
    if len(theirs.classes_) < classes or classes == 2:  # of two classes it keeps the difference
        return
    means = torch.stack([points[torch.tensor(labels) == c].mean(0) for c in range(classes)]).double()
    expected = (means - points.double().mean(0)) @ torch.linalg.inv(torch.as_tensor(theirs.covariance_)).double()
    assert torch.allclose(found.weight.double() * (1 + shrinkage), expected, rtol=1e-3, atol=1e-3)
    mine, prior = points @ found.weight.T + found.bias, torch.tensor(theirs.priors_).log()
    likely = (mine - prior) * (1 + shrinkage) - (torch.tensor(theirs.decision_function(points)) - prior)
    assert float((likely - likely.mean(1, keepdim=True)).abs().max()) < 0.1  # half a row more of each class


@given(sizes, st.integers(1, 4))
def test_the_rows_may_be_spread_over_sites_in_any_way(size, sites):
    points, labels = rows(20 + size[0], *size[1:])
    whole, parts = summed(points, labels, size[2]), Sums.none(size[2], size[1])
    for site in range(sites):
        mine = Sums.read(summed(points[site::sites], labels[site::sites], size[2]).tensors())
        for total, part in zip(vars(parts).values(), vars(mine).values(), strict=True):
            total += part
    for one, other in zip(vars(head(whole)).values(), vars(head(parts)).values(), strict=True):
        assert torch.allclose(one, other, rtol=1e-2, atol=1e-2)


def test_it_tells_classes_apart_and_knows_which_are_frequent():
    points, labels = rows(400, 6, 4, 0)
    found = head(summed(points, labels, 5))  # nobody has the fifth
    answers = (points @ found.weight.T + found.bias).argmax(1)
    assert (answers == torch.tensor(labels)).float().mean() > 0.95
    assert not (answers == 4).any()
    assert torch.equal(found.weight[4], torch.zeros(6))


def test_without_a_bias_it_answers_nearly_the_same_where_all_features_have_something_in_common():
    points, labels = rows(400, 6, 4, 1)
    points = points + 5 * torch.ones(6)
    found = head(summed(points, labels, 4))
    with_bias, without = points @ found.weight.T + found.bias, points @ found.without_bias.T
    assert (with_bias.argmax(1) == without.argmax(1)).float().mean() > 0.97


@given(sizes, st.sampled_from([1e-3, 1.0, 1e3]))
def test_sums_of_rows_are_told_from_claims(size, scale):
    points, labels = rows(*size)
    found = Sums.read(summed(scale * points, labels, size[2]).tensors())
    assert of_rows(found)
    assert not of_rows(Sums(found.sums, -found.counts, found.squares))
    assert not of_rows(Sums(found.sums, found.counts + 0.5, found.squares))
    assert not of_rows(Sums(found.sums + scale, 0 * found.counts, found.squares))
    if size[1] >= size[0]:  # there is a direction without variance
        below = 1e-3 * found.squares.diagonal().mean() * torch.eye(size[1], dtype=torch.float64)
        assert not of_rows(Sums(found.sums, found.counts, found.squares - below))


def test_a_feature_that_is_large_and_hardly_varies_is_no_claim():
    """As some of every language model's are."""
    points, labels = rows(50, 64, 2, 0)
    points[:, 0] = 1000 + 1e-3 * points[:, 0]
    assert of_rows(Sums.read(summed(points, labels, 2).tensors()))


@given(sizes, st.integers(1, 4))
def test_sites_that_all_claim_as_little_variance_as_passes_still_give_a_head_of_finite_numbers(size, sites):
    points, labels = rows(min(size[0], size[1]), *size[1:])
    found = summed(points, labels, size[2])
    claimed = Sums(found.sums, found.counts, found.squares - (0.49 * covariance(found)[1] * len(labels)).diag())
    if of_rows(claimed):
        total = Sums(*(sites * value for value in vars(claimed).values()))
        assert all(bool(tensor.isfinite().all()) for tensor in vars(head(total)).values())
        assert float(torch.linalg.eigvalsh(precision(total)).min()) > 0


@given(sizes)
def test_points_are_drawn_from_what_sums_describe(size):
    found = summed(*rows(200, 3, 3, size[3]), 3)
    points, labels = drawn(found, 4000, size[3])
    assert {*labels.tolist()} <= {*found.counts.nonzero()[:, 0].tolist()}
    for label in labels.unique():
        assert torch.allclose(points[labels == label].mean(0), means(found)[label], atol=0.5)
    spread = torch.cov((points - means(found)[labels]).T)
    assert torch.allclose(spread, covariance(found)[0], atol=0.3)


def test_what_travels_comes_back():
    found = summed(*rows(9, 3, 2, 5), 2)
    assert {*found.tensors()} == {*NAMES}
    assert torch.allclose(Sums.read(found.tensors()).squares, found.squares, rtol=1e-6)
    made = head(found)
    assert {*made.tensors()} == {*START}
    assert torch.equal(Head.read(made.tensors()).weight, made.weight)
