"""The start of a head at the server: no site is believed what no rows could be, and none decides alone."""

from contextlib import suppress

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nvflare_fm.adapter import Adapter, AdapterUpdate
from nvflare_fm.aggregation.false_sums import added, without
from nvflare_fm.aggregation.head_start import Start, check_sums, head_start
from nvflare_fm.errors import WireError
from nvflare_fm.synthesis.features import COUNTS, NAMES, SQUARES, SUMS, Head, Sums, covariance, head, means
from tests.codes import refused
from tests.strategies import identical, update
from tests.synthesis.test_features import rows, summed

sizes = st.tuples(st.integers(1, 30), st.integers(1, 4), st.integers(1, 3), st.integers(0, 2**31))


def said(site: str, sums: Sums) -> AdapterUpdate:
    return update(site, Adapter(dense=sums.tensors()))


@given(sizes, st.sampled_from([1e-3, 1.0, 1e3]))
def test_sums_of_rows_are_believed(size, scale):
    points, labels = rows(*size)
    check_sums(said("alder", summed(scale * points, labels, size[2])), size[2])


HONEST = summed(*rows(40, 3, 2, 0), 2).tensors()


@pytest.mark.parametrize(
    ("changed", "code"),
    [
        ({COUNTS: torch.tensor([-1.0, 5.0])}, "sums_impossible"),
        ({COUNTS: torch.zeros(2), SUMS: torch.zeros(2, 3)}, "sums_impossible"),
        ({COUNTS: 1e-3 * HONEST[COUNTS]}, "sums_impossible"),  # so few rows cannot have such sums
        ({SUMS: 100 * HONEST[SUMS]}, "sums_impossible"),
        ({SQUARES: -HONEST[SQUARES]}, "sums_impossible"),
        ({SQUARES: HONEST[SQUARES] + 1e4 * (1 - torch.eye(3))}, "sums_impossible"),
        ({COUNTS: torch.ones(3)}, "sums_shape"),
        ({SUMS: torch.ones(3, 3)}, "sums_shape"),
        ({SUMS: torch.ones(6)}, "sums_shape"),
        ({SQUARES: torch.ones(3, 4)}, "sums_shape"),
        ({SUMS: torch.ones(2, 0), SQUARES: torch.ones(0, 0)}, "sums_shape"),
        ({SUMS: torch.ones(2, 2**13 + 1)}, "sums_shape"),
    ],
)
def test_what_no_rows_could_have_is_refused(changed, code):
    with refused(code, WireError):
        check_sums(update("alder", Adapter(dense={**HONEST, **changed})), 2)


def test_the_head_is_that_of_all_sites_rows():
    points, labels = rows(60, 3, 2, 3)
    updates = [said(name, summed(points[i::3], labels[i::3], 2)) for i, name in enumerate(("c", "a", "b"))]
    start = head_start(updates)
    assert (start.refused, start.shares) == ({}, {"a": 1.0, "b": 1.0, "c": 1.0})
    assert start.manifest == updates[0].manifest
    found, whole = Head.read(start.adapter.dense), head(summed(points, labels, 2))
    assert torch.allclose(found.weight, whole.weight, atol=1e-3)
    assert torch.allclose(found.bias, whole.bias, atol=1e-3)
    assert identical(start.adapter, head_start(updates[::-1]).adapter)


def alike(sites: int, count: int = 20) -> dict[str, tuple[torch.Tensor, list[int]]]:
    """Rows of sites that hold about the same."""
    points, labels = rows(count * sites, 3, 2, 0)
    return {"abcdef"[place]: (points[place::sites], labels[place::sites]) for place in range(sites)}


def test_a_site_counts_as_twice_the_median_of_the_others_at_most():
    sums = {name: summed(*found, 2) for name, found in alike(4).items()}
    many = Sums(*(1e6 * value for value in vars(sums["d"]).values()))
    others = [said(name, sums[name]) for name in "abc"]
    start = head_start([*others, said("d", many)])
    assert start.shares == {"a": 1.0, "b": 1.0, "c": 1.0, "d": pytest.approx(2e-6)}
    twice = Sums(*(2 * value for value in vars(sums["d"]).values()))
    found, expected = start.adapter, head_start([*others, said("d", twice)]).adapter
    assert all(torch.allclose(found.dense[n], expected.dense[n], rtol=1e-3, atol=1e-3) for n in expected.dense)


@given(st.lists(st.integers(1, 50), min_size=3, max_size=5), st.integers(0, 2**31))
def test_a_sum_without_a_site_is_that_of_the_others(counts, seed):
    """Of labels that no other site has, too, no row is left."""
    updates = []
    for place, count in enumerate(counts):
        points, _ = rows(count, 3, 1, seed + place)
        updates.append(said("abcde"[place], summed(points, [place] * count, 5)))
    rows_of = {each.site: float(count) for each, count in zip(updates, counts, strict=True)}
    total, shares = added(updates, rows_of)
    for each in updates:
        left = without(total, each, shares[each.site])
        others = [other for other in updates if other is not each]
        expected = Sums(*(sum(shares[o.site] * o.adapter.dense[name].double() for o in others) for name in NAMES))
        assert torch.equal(left.counts > 0, expected.counts > 0)
        for one, other in zip(vars(left).values(), vars(expected).values(), strict=True):
            assert torch.allclose(one, other, rtol=1e-5, atol=1e-5)


def test_features_of_another_base_model_do_not_count():
    each = alike(6)
    honest = [said(name, summed(*each[name], 2)) for name in "abc"]
    others = {
        "d": summed(torch.cat([each["d"][0]] * 2, 1), each["d"][1], 2),
        "e": summed(10 * each["e"][0], [1 - label for label in each["e"][1]], 2),
        "f": summed(each["f"][0] / 10, each["f"][1], 2),
    }
    start = head_start([*honest, *(said(name, sums) for name, sums in others.items())])
    assert {*start.shares} == {*"abc"}
    codes = {site: reason.code for site, reason in start.refused.items()}
    assert codes == {"d": "other_layers", "e": "other_features", "f": "other_features"}
    assert identical(start.adapter, head_start(honest).adapter)


def labelled(sites: int, seed: int, classes: int = 24, near: bool = False) -> dict[str, tuple[torch.Tensor, list[int]]]:
    """Rows of sites that hold some of the labels each, and mean the same by them; every two labels may lie near."""
    generator = torch.Generator().manual_seed(seed)
    middles, found = 3 * torch.randn(classes, 8, generator=generator), {}
    if near:
        middles = 2 * middles[: classes // 2].repeat(2, 1) + middles / 3
    for place in range(sites):
        held = torch.randperm(classes, generator=generator)[: classes * 2 // 3]
        labels = held.repeat(6)
        found[f"site-{place}"] = (middles[labels] + torch.randn(len(labels), 8, generator=generator), labels.tolist())
    return found


def started(rows_of: dict[str, tuple[torch.Tensor, list[int]]], swapped: set[str], classes: int = 24) -> Start:
    """A start, where some sites have their labels in the opposite order."""
    return head_start(
        [
            said(site, summed(points, [classes - 1 - label if site in swapped else label for label in labels], classes))
            for site, (points, labels) in rows_of.items()
        ]
    )


@settings(max_examples=15)
@given(st.integers(5, 9), st.integers(0, 2**31), st.integers(0, 2))
def test_a_site_whose_labels_mean_something_else_is_told_apart(sites, seed, some):
    rows_of = labelled(sites, seed)
    swapped = {f"site-{place}" for place in range(min(some, (sites - 1) // 4))}
    start = started(rows_of, swapped)
    assert start.mislabelled == swapped == start.refused.keys()
    assert {reason.code for reason in start.refused.values()} <= {"other_labels"}
    honest = started({site: found for site, found in rows_of.items() if site not in swapped}, set())
    assert identical(start.adapter, honest.adapter)


def test_two_labels_are_enough_to_tell():
    assert not started(alike(5), set(), 2).refused
    assert started(alike(5), {"e"}, 2).mislabelled == {"e"}


def test_a_site_with_few_rows_is_as_alike_as_others():
    """One row's distance from its label's mean is three times as large here as labels lie apart."""
    generator = torch.Generator().manual_seed(0)
    middles, rows_of = torch.randn(16, 8, generator=generator), {}
    for site, count in {"few": 1, **dict.fromkeys("abcd", 60)}.items():
        labels = torch.arange(16).repeat(count)
        rows_of[site] = (middles[labels] + 3 * torch.randn(len(labels), 8, generator=generator), labels.tolist())
    assert not started(rows_of, set(), 16).refused


def middles_of(others: list[Sums]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Each label's mean, the mean of all, and the covariance within labels, as one knows who holds all rows."""
    total = Sums(*(torch.stack(parts).sum(0) for parts in zip(*(vars(each).values() for each in others), strict=True)))
    return means(total), total.sums.sum(0) / total.counts.sum(), covariance(total)[0]


def claimed(each: int, means: torch.Tensor, within: torch.Tensor) -> Sums:
    """Those of `each` rows of every label around means."""
    counts = torch.full((len(means),), each, dtype=torch.float64)
    return Sums(each * means, counts, counts.sum() * within + each * means.T @ means)


CRAFTED = {  # means, mean of all, covariance → means and covariance that a site claims
    "half the way to others": lambda means, middle, within: (means + 0.45 * (means.flip(0) - means), within),
    "what tells labels apart is noise": lambda means, middle, within: (
        means,
        3 * within.trace() * (s := (means - middle).T @ (means - middle)) / s.trace(),
    ),
}


@pytest.mark.parametrize("crafted", CRAFTED)
def test_sums_that_would_ruin_the_head_do_not_count(crafted: str):
    honest = {site: summed(*found, 24) for site, found in labelled(5, 5, near=True).items()}
    false = said("site-9", claimed(8, *CRAFTED[crafted](*middles_of([*honest.values()]))))
    check_sums(false, 24)
    start = head_start([*(said(site, sums) for site, sums in honest.items()), false])
    assert {site: reason.code for site, reason in start.refused.items()} == {"site-9": "harmful_sums"}
    assert not start.mislabelled  # it trains on: an honest site's rows may be as unlike
    assert identical(start.adapter, head_start([said(site, sums) for site, sums in honest.items()]).adapter)


@given(st.integers(1, 5), st.integers(1, 3), st.integers(0, 2**31))
def test_of_rows_that_do_not_differ_the_head_is_of_finite_numbers_or_refused(sites, each, seed):
    generator, updates = torch.Generator().manual_seed(seed), []
    for place in range(sites):
        label = int(torch.randint(3, (), generator=generator))
        updates.append(said("abcde"[place], summed(torch.ones(each, 2), [label] * each, 3)))
    with suppress(WireError):
        assert all(bool(tensor.isfinite().all()) for tensor in head_start(updates).adapter.dense.values())


@pytest.mark.parametrize("seed", [0, 6, 7])
def test_where_rows_are_as_few_as_features_no_honest_site_is_left_out(seed: int):
    """Each of these sites takes about 5 points from the others: that is what any rows more do to such a head."""
    labels = [place % 3 for place in range(140)]
    points = torch.randn(140, 128, generator=torch.Generator().manual_seed(seed))
    assert not started({site: (points[i::4], labels[i::4]) for i, site in enumerate("abcd")}, set(), 3).refused


def test_no_site_alone_makes_another_one_look_different():
    honest = {site: summed(*found, 24) for site, found in labelled(4, 6).items()}
    means, middle, within = middles_of([*honest.values()])
    framing = said("site-9", claimed(12, middle.expand_as(means), within))
    start = head_start([*(said(site, sums) for site, sums in honest.items()), framing])
    assert not start.refused.keys() - {"site-9"}


def test_where_many_sites_disagree_no_head_follows():
    with refused("sums_contradict", WireError):
        started(labelled(4, 0), {"site-0", "site-1"})
    assert not started(labelled(2, 0), {"site-0"}).refused  # and of two nobody can tell


def test_one_other_site_alone_cannot_have_a_site_left_out():
    points, _ = rows(200, 8, 10, 1)
    middles, labels = 9 * torch.randn(10, 8, generator=torch.Generator().manual_seed(0)), [i % 10 for i in range(200)]
    points = points + middles[labels]
    mine = {"site-0": (points, labels)}
    framing = {"site-4": (points, [(label + 1) % 10 for label in labels])}
    theirs = {f"site-{place}": (points - 10, [10 + label for label in labels]) for place in (1, 2, 3)}
    start = started({**mine, **theirs, **framing}, set())
    assert not start.refused


def test_without_any_site_there_is_no_start():
    with refused("no_head_start", WireError):
        head_start([])
