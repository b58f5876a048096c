"""Server steps act on products: what they do to a layer is what the paper's formula does to ΔW."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nvflare_fm.adapter import Adapter
from nvflare_fm.aggregation import step
from nvflare_fm.aggregation.cohort import Cohort
from nvflare_fm.aggregation.combine import combine
from nvflare_fm.config import Aggregation, RoundPlan
from nvflare_fm.errors import ConfigError
from nvflare_fm.export.folder import Saved, read_adapter, write_adapter
from nvflare_fm.job.settle import settle
from tests.codes import refused
from tests.strategies import MANIFEST, SINGLE, close, identical, make_pair, rotated, update


def sites(*seeds: int, rank: int = 3, head: float = 1.0):
    adapters = [
        Adapter({"q": make_pair(7, 6, rank, seed=s).to(SINGLE)}, {"head": torch.full((2,), head * s)}) for s in seeds
    ]
    return [update(f"s{i}", adapter) for i, adapter in enumerate(adapters)]


def run(entry, rounds: list) -> list[torch.Tensor]:
    """The dense ΔW after each round, at a rank at which nothing is cut off."""
    state, manifest, memory, seen = Adapter(), None, None, []
    for updates in rounds:
        combined = combine(state, manifest, updates, Aggregation(merge="svd", step=entry), 7, memory)
        state, manifest, memory = combined.adapter, MANIFEST, combined.memory
        seen.append(state.lora["q"].delta().double())
    return seen


def means(rounds: list) -> list[torch.Tensor]:
    return [sum(u.adapter.lora["q"].delta().double() for u in updates) / len(updates) for updates in rounds]


ROUNDS = [sites(1, 2), sites(3, 4), sites(5, 6)]


@given(rate=st.floats(0.1, 2.0))
def test_plain_goes_a_part_of_the_way(rate):
    x = torch.zeros(7, 6, dtype=torch.float64)
    for seen, mean in zip(run({"rule": "plain", "learning_rate": rate}, ROUNDS), means(ROUNDS), strict=True):
        x = x + rate * (mean - x)
        close(seen, x, 1e-4)


def test_momentum_is_the_dense_formula():
    x = m = torch.zeros(7, 6, dtype=torch.float64)
    for seen, mean in zip(
        run({"rule": "momentum", "beta": 0.6, "learning_rate": 0.7}, ROUNDS), means(ROUNDS), strict=True
    ):
        m = 0.6 * m + (mean - x)
        x = x + 0.7 * m
        close(seen, x, 1e-4)


@pytest.mark.parametrize("name", ["adam", "yogi"])
def test_adaptive_steps_are_the_dense_formula_with_one_second_moment_a_layer(name):
    entry = {"rule": name, "learning_rate": 0.3, "beta1": 0.8, "beta2": 0.9, "tau": 0.2}
    x = m = torch.zeros(7, 6, dtype=torch.float64)
    v = torch.tensor(0.2**2, dtype=torch.float64)
    for seen, mean in zip(run(entry, ROUNDS), means(ROUNDS), strict=True):
        d = mean - x
        squared = d.square().mean()
        m = 0.8 * m + 0.2 * d
        v = 0.9 * v + 0.1 * squared if name == "adam" else v - 0.1 * squared * torch.sign(v - squared)
        x = x + 0.3 * m / (v.sqrt() + 0.2)
        close(seen, x, 1e-4)


def test_dense_tensors_have_a_second_moment_for_each_entry():
    entry = {"rule": "adam", "learning_rate": 0.3, "beta1": 0.0, "beta2": 0.9, "tau": 0.2}
    first = combine(Adapter(), None, sites(1, 3), Aggregation(step=entry), 6)
    assert torch.equal(first.adapter.dense["head"], torch.full((2,), 2.0)), "a first head is taken as it is"
    second = combine(first.adapter, MANIFEST, sites(3, 5), Aggregation(step=entry), 6, first.memory)
    v = 0.9 * 0.2**2 + 0.1 * 2.0**2
    close(second.adapter.dense["head"], torch.full((2,), 2.0 + 0.3 * 2.0 / (v**0.5 + 0.2)), 1e-5)


@pytest.mark.parametrize("name", list(step.registry))
def test_no_step_sees_how_b_and_a_are_turned_inside_the_rank(name):
    turned = [
        [update(u.site, Adapter({"q": rotated(u.adapter.lora["q"], 9)}, u.adapter.dense)) for u in updates]
        for updates in ROUNDS
    ]
    for one, other in zip(run(name, ROUNDS), run(name, turned), strict=True):
        close(one, other, 1e-4)


@pytest.mark.parametrize("name", list(step.registry))
def test_sites_that_changed_nothing_move_nothing_from_rest(name):
    first = combine(Adapter(), None, sites(1, 2), Aggregation(), 6)
    idle = [update(f"s{i}", Adapter(first.adapter.lora, first.adapter.dense)) for i in range(2)]
    after = combine(first.adapter, MANIFEST, idle, Aggregation(step=name), 6)
    close(after.adapter.lora["q"].delta(), first.adapter.lora["q"].delta(), 1e-5)
    close(after.adapter.dense["head"], first.adapter.dense["head"], 1e-6)


def test_the_default_step_is_the_merge_rule_and_nothing_else():
    assert step.choose("plain", Cohort(sites(1)), [1.0]).plain
    assert not step.choose({"rule": "plain", "learning_rate": 0.9}, Cohort(sites(1)), [1.0]).plain


def rate(updates: list, weights: list[float], **settings: float) -> float:
    return float(step.choose({"rule": "fedexp", **settings}, Cohort(updates), weights).gain(None))


def test_fedexp_takes_the_plain_step_where_sites_agree_and_a_longer_one_where_they_do_not():
    same = sites(1, 1, 1, 1)
    apart = sites(1, 2, 3, 4, 5, 6, 7, 8)
    assert rate(same, [0.25] * 4) == 1.0
    longer = rate(apart, [1 / 8] * 8, most=99.0)
    changes = [u.adapter.lora["q"].delta().double() for u in apart]
    mean = sum(changes) / 8
    squares = sum(float(c.square().sum()) for c in changes) / 8
    assert longer == pytest.approx(squares / (2 * (float(mean.square().sum()) + 1e-3 * squares)), rel=1e-5)
    assert 1.0 < rate(apart, [1 / 8] * 8, most=1.2) <= 1.2


def test_an_unknown_setting_of_a_step_is_refused_with_the_nearest():
    with refused("wrong_setting", ConfigError, '"beta1"'):
        step.choose({"rule": "adam", "beta_1": 0.5}, Cohort(sites(1)), [1.0])
    with refused("no_rule_name", ConfigError, "rule"):
        step.choose({"step": "adam"}, Cohort(sites(1)), [1.0])
    with refused("wrong_setting", ConfigError, "learning_rate"):
        step.choose({"rule": "plain", "learning_rate": 0}, Cohort(sites(1)), [1.0])


@pytest.mark.parametrize(
    ("task", "merge", "usual"),
    [
        ("causal_lm", "exact", "fedexp"),
        ("causal_lm", "svd", "plain"),
        ("causal_lm", "factor_mean", "plain"),
        ("sequence_classification", "exact", "plain"),
    ],
)
def test_the_step_a_job_leaves_open_follows_from_its_task_and_rule(task, merge, usual):
    labels = () if task == "causal_lm" else ("a", "b")
    how = settle(RoundPlan(task=task, labels=labels), Aggregation(merge=merge, guard=())).aggregation
    assert how == Aggregation(merge=merge, step=usual, guard=())
    assert (combine(Adapter(), None, sites(1, 2, 3), how, 3).step_size > 1) == (usual == "fedexp")


@pytest.mark.parametrize(
    ("entry", "size"), [("adam", None), ("yogi", None), ({"rule": "momentum", "learning_rate": 0.7}, 0.7)]
)
def test_a_step_tells_its_size_but_where_a_second_moment_sets_one_for_each_layer(entry, size):
    assert combine(Adapter(), None, sites(1, 2), Aggregation(step=entry), 3).step_size == size


STEPS = [None, "plain", "fedexp", "adam", "yogi", {"rule": "momentum", "beta": 0.6}]


@pytest.mark.parametrize("entry", STEPS, ids=str)
@pytest.mark.parametrize("killed_after", range(3))
def test_a_federation_that_goes_on_from_its_files_ends_where_it_would_have(entry, killed_after: int, tmp_path: Path):
    """The server is killed after a round, and another goes on from the folder that the first one saved."""
    rounds = [*ROUNDS, sites(7, 8)]
    how = Aggregation(merge="svd", step=entry)
    ends = []
    for killed in (False, True):
        state, manifest, memory = Adapter(), None, None
        for number, updates in enumerate(rounds):
            combined = combine(state, manifest, updates, how, 5, memory)
            state, manifest, memory = combined.adapter, MANIFEST, combined.memory
            if killed and number == killed_after:
                folder = write_adapter(tmp_path / "last", Saved(state, MANIFEST, number, None, how.step, memory))
                found = read_adapter(folder)
                state, memory = found.adapter, found.memory
        ends.append(state)
    assert identical(*ends)
