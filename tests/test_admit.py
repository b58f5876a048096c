"""Who may be merged: held to the plan, to its own values and to the others; every refusal names the site."""

import time
from dataclasses import replace
from itertools import permutations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nvflare_fm.adapter import Adapter, AdapterUpdate, Described, LoraPair, Manifest, from_tensors
from nvflare_fm.aggregation.admit import Terms, admit, check_terms, check_values
from nvflare_fm.aggregation.cohort import drawn
from nvflare_fm.aggregation.combine import combine
from nvflare_fm.config import Aggregation, RoundPlan, SiteOverrides
from nvflare_fm.errors import WireError
from nvflare_fm.job.peft import complete
from nvflare_fm.job.peft import read as read_method
from nvflare_fm.job.settle import settle
from tests.codes import refused
from tests.strategies import MANIFEST, SINGLE, make_pair, update

LAYER = "base_model.model.layers.0.q_proj"
OWN_CLASS = "nvflare_fm.site.mean_pooling.MeanPooledForSequenceClassification"


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
    with refused("not_finite", WireError, "hospital-a", LAYER):
        check_values(update("hospital-a", with_values(factors["A"], factors["B"])))


def test_a_dense_tensor_that_is_not_finite_is_refused_by_site_and_name():
    with refused("not_finite", WireError, "hospital-a", "head.bias"):
        check_values(update("hospital-a", Adapter({}, {"head.bias": torch.tensor([1.0, float("nan")])})))


def test_integer_tensors_are_refused(malformed_allowed):
    with refused("not_finite", WireError, "hospital-a", LAYER):
        check_values(update("hospital-a", with_values(torch.ones(2, 3, dtype=torch.int8), torch.ones(4, 2))))
    with refused("not_finite", WireError, "hospital-a", "head.bias"):
        check_values(update("hospital-a", Adapter({}, {"head.bias": torch.ones(2, dtype=torch.int64)})))


@pytest.mark.parametrize("shapes", [((2, 3), (4, 1)), ((3,), (4, 3)), ((2, 3), (4, 2, 1)), ((0, 3), (4, 1))])
def test_factors_whose_ranks_differ_are_refused_with_both_shapes(malformed_allowed, shapes):
    a, b = (torch.ones(*shape) for shape in shapes)
    with refused("factor_shapes", WireError, "hospital-a", f"({shapes[0][0]},", LAYER):
        check_values(update("hospital-a", with_values(a, b)))


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scale_that_is_not_positive_and_finite_is_refused(scale):
    with refused("scale_not_positive", WireError, "hospital-a", LAYER):
        check_values(update("hospital-a", with_values(torch.ones(2, 3), torch.ones(4, 2), scale)))


def test_a_missing_scale_is_refused_by_site_and_layer():
    with refused("no_scale", WireError, "hospital-a", LAYER):
        from_tensors(adapter().tensors(), {}, "hospital-a")


def test_another_base_model_is_refused_by_name():
    stranger = update("hospital-b", adapter(), manifest=replace(MANIFEST, base="base-2"))
    accepted, refused = admit(adapter(), MANIFEST, [update("hospital-a", adapter()), stranger])
    assert [u.site for u in accepted] == ["hospital-a"]
    assert "base-2" in refused["hospital-b"].text
    assert "base-1" in refused["hospital-b"].text


@pytest.mark.parametrize(
    "field", [{"task": "token_classification"}, {"peft": "ia3"}, {"labels": ("yes", "no")}, {"base_class": OWN_CLASS}]
)
def test_another_task_method_label_list_or_class_is_refused_by_name(field):
    stranger = update("hospital-b", adapter(), manifest=replace(MANIFEST, **field))
    accepted, refused = admit(adapter(), MANIFEST, [update("hospital-a", adapter()), stranger])
    assert [u.site for u in accepted] == ["hospital-a"]
    assert str(next(iter(field.values()))) in refused["hospital-b"].text


@pytest.mark.parametrize("field", ["tokenizer", "chat_template"])
def test_another_tokenizer_or_chat_template_is_refused_with_a_code(field):
    ours, theirs = (replace(MANIFEST, **{field: digest}) for digest in ("a", "b"))
    updates = [update(s, adapter(), manifest=m) for s, m in (("a", ours), ("b", theirs), ("c", ours))]
    for reference in (ours, None, replace(MANIFEST, **{field: ""})):  # the federation's, none yet, an older one's
        accepted, refused = admit(adapter(), reference, updates)
        assert [u.site for u in accepted] == ["a", "c"]
        assert refused["b"].code == f"{field}_differs"


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
    assert said in refused["hospital-b"].text
    assert "target_modules" in refused["hospital-b"].text


def test_mixed_ranks_are_welcome_where_the_rule_can_use_them():
    updates = [update("hospital-a", adapter(1)), update("hospital-b", adapter(5))]
    assert admit(adapter(3), MANIFEST, updates) == (updates, {})


def test_another_rank_is_refused_with_a_remedy_where_the_rule_cannot_use_it():
    updates = [update("hospital-a", adapter(2)), update("hospital-b", adapter(5))]
    accepted, refused = admit(adapter(2), MANIFEST, updates, mixed_ranks=False)
    assert [u.site for u in accepted] == ["hospital-a"]
    assert "rank 5" in refused["hospital-b"].text
    assert "merge = exact" in refused["hospital-b"].text


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
    with refused("answered_twice", WireError, "hospital-a"):
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


# --- what the plan asked, before a tensor is read

PLAN = RoundPlan(peft={"method": "lora", "rank": 4, "lora_alpha": 8}, training={"local_steps": 20})
MIXED = Aggregation(max_rank=16)


def asked(site: str = "a", how: Aggregation = MIXED, plan: RoundPlan = PLAN, **sites: dict) -> Terms:
    return settle(plan, how, {name: SiteOverrides.read(said, "test") for name, said in sites.items()}).terms(site)


def sent(rank: int = 4, scale: float = 2.0, names: tuple[str, ...] = (LAYER,), **report) -> AdapterUpdate:
    pairs = {name: replace(make_pair(4, 3, rank, seed=1).to(SINGLE), scale=scale) for name in names}
    one = update("a", Adapter(pairs, {"head.weight": torch.ones(2, 4)}))
    return replace(one, report=replace(one.report, rank=rank, **report))


def code_of(found: AdapterUpdate, on: Terms, state: Adapter | None = None, manifest: Manifest | None = None) -> str:
    """Of the refusal, which names the site; nothing where it is taken."""
    try:
        check_terms(found, on, state or Adapter(), manifest)
    except WireError as error:
        return error.code if error.message.startswith("a") else error.message
    return ""


@given(plan_rank=st.integers(1, 64), rank=st.integers(1, 64), rslora=st.booleans())
def test_at_every_rank_the_scale_is_the_one_the_site_trains_with(plan_rank, rank, rslora):
    plan = RoundPlan(peft=complete({"method": "lora", "rank": plan_rank, "use_rslora": rslora}))
    trained = read_method(SiteOverrides(rank=rank).applied(plan).peft).scale
    assert code_of(sent(rank, trained), asked(plan=plan, how=Aggregation(max_rank=64))) == ""
    assert code_of(sent(rank, trained * 1.001), asked(plan=plan, how=Aggregation(max_rank=64))) == "scale_not_in_plan"


@pytest.mark.parametrize(
    ("rank", "code"), [(1, ""), (4, ""), (16, ""), (17, "rank_not_in_plan"), (8192, "rank_not_in_plan")]
)
def test_a_site_the_server_knows_nothing_of_may_have_any_rank_up_to_the_global_one(rank, code):
    assert code_of(sent(rank, 2.0 * (4 / rank) ** 0.5), asked()) == code


@pytest.mark.parametrize("rank", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("negotiable", [(), ("rank",)])
def test_a_site_that_is_listed_is_held_to_its_rank_or_less_where_it_may_lower_it(rank, negotiable):
    plan = PLAN.model_copy(update={"negotiable": negotiable})
    found = code_of(sent(rank, 2.0 * (4 / rank) ** 0.5), asked(plan=plan, a={"rank": 3}))
    assert found == ("" if rank == 3 or (negotiable and rank < 3) else "rank_not_in_plan")


def test_a_rule_for_one_rank_and_dora_take_the_plans_rank_alone():
    for how, plan in ((Aggregation(merge="factor_mean"), PLAN), (Aggregation(), _with(PLAN, use_dora=True))):
        assert code_of(sent(4), asked(how=how, plan=plan)) == ""
        assert code_of(sent(3, 2.0 * (4 / 3) ** 0.5), asked(how=how, plan=plan)) == "rank_not_in_plan"


def test_a_site_with_a_lora_alpha_of_its_own_is_held_to_it():
    assert code_of(sent(scale=5.0), asked(a={"lora_alpha": 20})) == ""
    assert code_of(sent(scale=2.0), asked(a={"lora_alpha": 20})) == "scale_not_in_plan"
    assert code_of(sent(scale=5.0), asked(b={"lora_alpha": 20})) == "scale_not_in_plan"
    lowered = PLAN.model_copy(update={"negotiable": ("rank",)})
    assert code_of(sent(rank=1, scale=10.0), asked(plan=lowered, a={"lora_alpha": 20})) == ""


def test_one_rank_in_all_layers_and_the_one_that_is_reported():
    pairs = {f"{LAYER}{r}": replace(make_pair(4, 3, r, seed=1).to(SINGLE), scale=2.0) for r in (3, 4)}
    assert code_of(replace(sent(), adapter=Adapter(pairs)), asked()) == "rank_not_in_plan"
    found = sent()
    assert code_of(replace(found, report=replace(found.report, rank=3)), asked()) == "rank_not_in_plan"


@pytest.mark.parametrize(
    ("steps", "of_site", "code"),
    [(20, {}, ""), (1, {}, "steps_not_in_plan"), (10**9 - 1, {}, "steps_not_in_plan"), (7, {"local_steps": 7}, "")],
)
def test_where_changes_count_by_the_step_a_site_has_taken_those_it_was_asked_for(steps, of_site, code):
    how = Aggregation(max_rank=16, normalize_steps=True)
    assert code_of(sent(steps=steps), asked(how=how, a=of_site)) == code
    assert code_of(sent(steps=steps), asked()) == ""  # else they weigh nothing
    fewer = PLAN.model_copy(update={"negotiable": ("local_steps",)})
    assert code_of(sent(steps=3), asked(how=how, plan=fewer)) == ""


def test_another_task_method_or_base_than_the_plans_is_refused_though_nobody_else_has_answered():
    pinned = PLAN.model_copy(update={"fingerprint": "ba5e2"})
    assert code_of(sent(), asked(plan=pinned)) == "other_base"
    assert code_of(sent(), asked(), manifest=replace(MANIFEST, base="base-2")) == "other_base"
    assert code_of(replace(sent(), manifest=replace(MANIFEST, peft="ia3")), asked()) == "other_task"
    assert code_of(replace(sent(), manifest=replace(MANIFEST, task="token_classification")), asked()) == "other_task"


def test_pairs_come_where_the_plan_asks_for_them_and_nowhere_else():
    assert code_of(replace(sent(), adapter=Adapter({}, {"v": torch.ones(2)})), asked()) == "pairs_not_in_plan"
    vectors = RoundPlan(peft={"method": "ia3"})
    found = replace(sent(), manifest=replace(MANIFEST, peft="ia3"))
    assert code_of(found, asked(plan=vectors)) == "pairs_not_in_plan"


def test_the_names_after_the_first_round_are_those_of_the_global_adapter_and_a_flood_of_others_is_refused_at_once():
    state = sent().adapter
    names = (LAYER, *(f"base_model.model.extra.{i}" for i in range(20_000)))
    flood, on = sent(names=names), asked()
    described = flood.adapter.descriptions()  # which came with the message
    flood = replace(flood, adapter=replace(flood.adapter, described=Described(described, flood.adapter.scales())))
    began = time.process_time()
    assert code_of(flood, on, state) == "other_layers"
    assert time.process_time() - began < 2  # 23 s once
    assert code_of(sent(), on, state) == ""


@pytest.mark.parametrize("factor", ["A", "B", "both", "dense"])
@pytest.mark.parametrize("size", [1e6, 1e12, 1e30])
def test_values_whose_sums_and_products_could_overflow_are_refused(factor, size):
    a, b = torch.ones(2, 3), torch.ones(4, 2)
    found = {"A": (a * size, b), "B": (a, b * size), "both": (a * size**0.5, b * size**0.5), "dense": (a, b)}[factor]
    one = update(
        "hospital-a", replace(with_values(*found), dense={"h": torch.ones(3) * (size if factor == "dense" else 1)})
    )
    if size == 1e6:
        return check_values(one)
    with pytest.raises(WireError) as caught:
        check_values(one)
    assert caught.value.code == "values_too_large"
    return None


@given(exponents=st.tuples(st.integers(-40, 38), st.integers(-40, 38)), scale=st.sampled_from([1e-6, 1.0, 1e6]))
def test_what_passes_is_merged_to_finite_values_by_every_rule(exponents, scale):
    pair = LoraPair(torch.ones(2, 3) * 10.0 ** exponents[0], torch.ones(4, 2) * 10.0 ** exponents[1], scale)
    strange = update("hospital-a", Adapter({LAYER: pair}, {"h": torch.ones(3) * 10.0 ** exponents[0]}))
    try:
        check_values(strange)
    except WireError:
        return
    usual = update("b", Adapter({LAYER: make_pair(4, 3, 2, seed=0).to(SINGLE)}, {"h": torch.ones(3)}))
    for name in ("exact", "stack", "svd", "factor_mean", "rank_partition"):
        how = Aggregation(merge=name, guard=())
        first = combine(Adapter(), None, [strange, usual], how, 2)
        second = combine(first.adapter, MANIFEST, [strange, usual], how, 2)
        for tensor in second.adapter.tensors().values():
            assert tensor.isfinite().all()


def _with(plan: RoundPlan, **peft) -> RoundPlan:
    return plan.model_copy(update={"peft": {**plan.peft, **peft}})
