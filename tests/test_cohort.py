"""Who may be merged: every refusal names the site, what is wrong and the remedy."""

from dataclasses import replace
from itertools import permutations

import pytest
import torch

from nvflare_fm.adapter import Adapter, LoraPair, from_tensors
from nvflare_fm.aggregation.cohort import admit, check_values, drawn
from nvflare_fm.errors import WireError
from tests.strategies import MANIFEST, SINGLE, make_pair, update

LAYER = "base_model.model.layers.0.q_proj"


def adapter(rank: int = 2, shape: tuple[int, int] = (4, 3), layer: str = LAYER, head: int = 2) -> Adapter:
    return Adapter({layer: make_pair(*shape, rank, seed=rank).to(SINGLE)}, {"head.weight": torch.ones(head, 4)})


def with_values(a: torch.Tensor, b: torch.Tensor, scale: float = 1.0) -> Adapter:
    return Adapter({LAYER: LoraPair(a, b, scale)})


def test_a_sound_update_passes():
    check_values(update("hospital-a", adapter()))
    check_values(update("hospital-a", adapter(rank=0)))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("factor", ["A", "B"])
def test_a_factor_that_is_not_finite_is_refused_by_site_and_layer(value, factor):
    factors = {"A": torch.ones(2, 3), "B": torch.ones(4, 2)}
    factors[factor][0, 1] = value
    with pytest.raises(WireError, match=rf"hospital-a.*not finite.*{LAYER}.*learning rate"):
        check_values(update("hospital-a", with_values(factors["A"], factors["B"])))


def test_a_dense_tensor_that_is_not_finite_is_refused_by_site_and_name():
    with pytest.raises(WireError, match=r"hospital-a.*head\.bias"):
        check_values(update("hospital-a", Adapter({}, {"head.bias": torch.tensor([1.0, float("nan")])})))


def test_integer_tensors_are_refused(malformed_allowed):
    with pytest.raises(WireError, match=rf"hospital-a.*{LAYER}"):
        check_values(update("hospital-a", with_values(torch.ones(2, 3, dtype=torch.int8), torch.ones(4, 2))))
    with pytest.raises(WireError, match=r"hospital-a.*head\.bias"):
        check_values(update("hospital-a", Adapter({}, {"head.bias": torch.ones(2, dtype=torch.int64)})))


@pytest.mark.parametrize("shapes", [((2, 3), (4, 1)), ((3,), (4, 3)), ((2, 3), (4, 2, 1)), ((0, 3), (4, 1))])
def test_factors_whose_ranks_differ_are_refused_with_both_shapes(malformed_allowed, shapes):
    a, b = (torch.ones(*shape) for shape in shapes)
    with pytest.raises(WireError, match=rf"hospital-a.*lora_A \({shapes[0][0]},.*lora_B.*{LAYER}.*rank of both"):
        check_values(update("hospital-a", with_values(a, b)))


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scale_that_is_not_positive_and_finite_is_refused(scale):
    with pytest.raises(WireError, match=rf"hospital-a.*scale.*{LAYER}"):
        check_values(update("hospital-a", with_values(torch.ones(2, 3), torch.ones(4, 2), scale)))


def test_a_missing_scale_is_refused_by_site_and_layer():
    with pytest.raises(WireError, match=rf"hospital-a sent no scale for '{LAYER}'"):
        from_tensors(adapter().tensors(), {}, "hospital-a")


def test_another_base_model_is_refused_by_name():
    stranger = update("hospital-b", adapter(), manifest=replace(MANIFEST, base="base-2"))
    accepted, refused = admit(adapter(), MANIFEST, [update("hospital-a", adapter()), stranger])
    assert [u.site for u in accepted] == ["hospital-a"]
    assert "base-2" in refused["hospital-b"]
    assert "base-1" in refused["hospital-b"]


@pytest.mark.parametrize("field", [{"task": "token_classification"}, {"peft": "ia3"}, {"labels": ("yes", "no")}])
def test_another_task_method_or_label_list_is_refused_by_name(field):
    stranger = update("hospital-b", adapter(), manifest=replace(MANIFEST, **field))
    accepted, refused = admit(adapter(), MANIFEST, [update("hospital-a", adapter()), stranger])
    assert [u.site for u in accepted] == ["hospital-a"]
    assert str(next(iter(field.values()))) in refused["hospital-b"]


@pytest.mark.parametrize("field", ["tokenizer", "chat_template"])
def test_another_tokenizer_or_chat_template_is_refused_with_a_code(field):
    ours, theirs = (replace(MANIFEST, **{field: digest}) for digest in ("a", "b"))
    updates = [update(s, adapter(), manifest=m) for s, m in (("a", ours), ("b", theirs), ("c", ours))]
    for reference in (ours, None, replace(MANIFEST, **{field: ""})):  # the federation's, none yet, an older one's
        accepted, refused = admit(adapter(), reference, updates)
        assert [u.site for u in accepted] == ["a", "c"]
        assert f"[{field}_differs]" in refused["b"]


@pytest.mark.parametrize(
    ("theirs", "said"),
    [
        (adapter(layer="base_model.model.layers.0.k_proj"), "k_proj"),
        (adapter(shape=(5, 3)), "q_proj"),
        (adapter(head=3), "head.weight"),
        (Adapter(adapter().lora), "head.weight"),
        (Adapter(), "q_proj"),
    ],
)
def test_mismatched_layers_are_refused_with_the_tensors_that_differ(theirs, said):
    accepted, refused = admit(adapter(), MANIFEST, [update("hospital-a", adapter()), update("hospital-b", theirs)])
    assert [u.site for u in accepted] == ["hospital-a"]
    assert said in refused["hospital-b"]
    assert "target_modules" in refused["hospital-b"]


def test_mixed_ranks_are_welcome_where_the_rule_can_use_them():
    updates = [update("hospital-a", adapter(1)), update("hospital-b", adapter(5))]
    assert admit(adapter(3), MANIFEST, updates) == (updates, {})


def test_another_rank_is_refused_with_a_remedy_where_the_rule_cannot_use_it():
    updates = [update("hospital-a", adapter(2)), update("hospital-b", adapter(5))]
    accepted, refused = admit(adapter(2), MANIFEST, updates, mixed_ranks=False)
    assert [u.site for u in accepted] == ["hospital-a"]
    assert "rank 5" in refused["hospital-b"]
    assert "merge = exact" in refused["hospital-b"]


def test_in_the_first_round_what_most_sites_hold_is_the_reference():
    others = [update(s, adapter(), manifest=replace(MANIFEST, base="base-2")) for s in ("b", "c")]
    accepted, refused = admit(Adapter(), None, [update("a", adapter()), *others])
    assert [u.site for u in accepted] == ["b", "c"]
    assert list(refused) == ["a"]


def test_a_later_round_holds_the_majority_against_the_federation():
    others = [update(s, adapter(), manifest=replace(MANIFEST, base="base-2")) for s in ("b", "c")]
    accepted, refused = admit(adapter(), MANIFEST, [update("a", adapter()), *others])
    assert [u.site for u in accepted] == ["a"]
    assert sorted(refused) == ["b", "c"]


def test_who_is_admitted_does_not_depend_on_who_answered_first():
    updates = [
        update("a", adapter(), manifest=replace(MANIFEST, base="base-2")),
        update("b", adapter()),
        update("c", adapter(shape=(5, 3))),
        update("d", adapter(4), manifest=replace(MANIFEST, base="base-2")),
    ]
    for mixed_ranks in (True, False):
        answers = [admit(Adapter(), None, order, mixed_ranks) for order in permutations(updates)]
        assert all(answer == answers[0] for answer in answers)
        expected = ["a", "d"] if mixed_ranks else ["a"]  # two against two: the first by name
        assert [u.site for u in answers[0][0]] == expected


def test_nobody_is_a_cohort_too():
    assert admit(Adapter(), None, []) == ([], {})
    assert admit(adapter(), MANIFEST, [], mixed_ranks=False) == ([], {})


def test_two_answers_of_one_site_are_not_both_counted():
    with pytest.raises(WireError, match="hospital-a answered one round twice"):
        admit(
            Adapter(), None, [update("hospital-a", adapter()), update("b", adapter()), update("hospital-a", adapter())]
        )


def test_sites_are_drawn_by_the_seed_and_the_round_alone_and_all_have_their_turn():
    names = [f"s{i}" for i in range(7)]
    rounds = [drawn(names, 3, 5, number) for number in range(30)]
    assert all(len(set(sites)) == 3 and sites == sorted(sites) for sites in rounds)
    assert rounds == [drawn(names[::-1], 3, 5, number) for number in range(30)]
    assert rounds != [drawn(names, 3, 6, number) for number in range(30)]
    assert {site for sites in rounds for site in sites} == set(names)
    assert drawn(names, 0, 5, 0) == drawn(names, 99, 5, 0) == names
