"""The values every stage hands on."""

from collections.abc import Mapping
from dataclasses import FrozenInstanceError

import jaxtyping
import pytest
import torch
from hypothesis import given

from nvflare_fm.adapter import Adapter, Lazy, LoraPair, Report, from_tensors
from nvflare_fm.errors import WireError
from tests.codes import refused
from tests.strategies import close, cohorts, identical, make_pair, pairs

ONE = Adapter({"model.q": make_pair(4, 3, 2, seed=0, scale=2.0)}, {"head.weight": torch.ones(2, 4)})


@given(pairs())
def test_a_pair_is_scale_times_b_a(pair):
    assert pair.shape == tuple(pair.delta().shape)
    entries = sum((torch.outer(pair.B[:, r], pair.A[r]) for r in range(pair.rank)), torch.zeros(pair.shape).double())
    close(pair.delta(), pair.scale * entries, 1e-12, 1 + float(pair.delta().norm()))


@given(cohorts())
def test_an_adapter_comes_back_bit_for_bit_from_its_tensors_and_scales(updates):
    for update in updates:
        back = from_tensors(update.adapter.tensors(), update.adapter.scales(), update.site)
        assert identical(back, update.adapter)
        assert back.scales() == update.adapter.scales()


def test_tensor_names_are_those_peft_saves():
    assert sorted(ONE.tensors()) == ["head.weight", "model.q.lora_A.weight", "model.q.lora_B.weight"]
    assert ONE.tensors()["model.q.lora_A.weight"].shape == (2, 3)


def test_what_is_not_a_lora_factor_is_dense():
    names = ["base_layer.lora_magnitude_vector", "prompt_embeddings", "ia3_l", "model.q.lora_A.weightless"]
    adapter = from_tensors({n: torch.ones(1) for n in names}, {}, "hospital-a")
    assert sorted(adapter.dense) == sorted(names)
    assert not adapter.lora


@pytest.mark.parametrize("missing", ["lora_A", "lora_B"])
def test_a_factor_without_its_other_half_is_refused_by_site_and_layer(missing):
    tensors = {n: t for n, t in ONE.tensors().items() if missing not in n}
    with refused("half_a_pair", WireError, "hospital-a", "'model.q'"):
        from_tensors(tensors, ONE.scales(), "hospital-a")


def test_a_layer_without_a_scale_is_refused_by_site_and_layer():
    with refused("no_scale", WireError, "hospital-a", "'model.q'"):
        from_tensors(ONE.tensors(), {"model.k": 1.0}, "hospital-a")


class Counting(Mapping):
    """Tensors that count how often they are fetched."""

    def __init__(self, tensors):
        self.tensors, self.fetched = tensors, []

    def __getitem__(self, name):
        self.fetched.append(name)
        return self.tensors[name]

    def __iter__(self):
        return iter(self.tensors)

    def __len__(self):
        return len(self.tensors)


def test_tensors_are_fetched_one_layer_at_a_time_and_only_when_read(malformed_allowed):
    source = Counting({**ONE.tensors(), **Adapter({"model.k": make_pair(4, 3, 1, seed=1)}).tensors()})
    adapter = from_tensors(source, {"model.q": 2.0, "model.k": 1.0}, "hospital-a")
    assert list(adapter.lora) == ["model.k", "model.q"]
    assert source.fetched == []
    assert adapter.lora["model.q"].scale == 2.0
    assert source.fetched == ["model.q.lora_A.weight", "model.q.lora_B.weight"]
    assert "model.q" in adapter.lora
    assert len(source.fetched) == 2


def test_a_lazy_mapping_knows_its_names_in_order_and_no_others():
    lazy = Lazy(["b", "d", "a", "c"], str.upper)
    assert list(lazy) == ["a", "b", "c", "d"]
    assert len(lazy) == 4
    assert lazy["a"] == "A"
    assert "e" not in lazy
    with pytest.raises(KeyError):
        lazy["e"]


def test_an_adapter_with_nothing_in_it_is_false():
    assert not Adapter()
    assert ONE
    assert Adapter(dense=ONE.dense)
    assert Adapter(ONE.lora)


def test_values_are_frozen():
    with pytest.raises(FrozenInstanceError):
        ONE.lora["model.q"].scale = 3.0


def test_shapes_are_checked_in_a_test_run():
    with pytest.raises(jaxtyping.TypeCheckError):
        LoraPair(torch.ones(2, 3), torch.ones(4, 3))
    with pytest.raises(jaxtyping.TypeCheckError):
        LoraPair(torch.ones(2, 3, dtype=torch.int64), torch.ones(4, 2))


def test_speed_is_tokens_over_seconds_and_nothing_where_no_time_passed():
    assert Report(examples=1, tokens=30, seconds=2.0).tokens_per_s == 15.0
    assert Report(examples=1, tokens=30).tokens_per_s == 0.0
