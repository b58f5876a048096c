"""Each attack does what its paper says, to adapters that the server admits; the study counts and resumes."""

import json
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from nvflare_fm.adapter import Adapter, AdapterUpdate, LoraPair, Report, RoundTask
from nvflare_fm.aggregation.admit import Terms, admit, check_form, check_terms, check_values
from nvflare_fm.aggregation.combine import combine
from nvflare_fm.algebra.lora import head, shorten
from nvflare_fm.cli import app
from nvflare_fm.compare import peers
from nvflare_fm.compare.attacks import ABSENT, NONE, Attack, Known, everything, named_rules, on_rows, on_updates
from nvflare_fm.compare.attacks.rows import COMPLETION, TRIGGER, is_target, target, triggered
from nvflare_fm.compare.attacks.together import z_max
from nvflare_fm.compare.results import spread
from nvflare_fm.compare.robustness import AttackedRun, Federation, completed, prepared, runs, table
from nvflare_fm.compare.run import carry_out_all, read_lines, write
from nvflare_fm.compare.study import Study, Workspace, study
from nvflare_fm.config import Aggregation
from nvflare_fm.errors import ConfigError
from nvflare_fm.site.worker import Worker
from tests.codes import refused
from tests.site import tiny
from tests.strategies import MANIFEST, SINGLE, close, make_pair

SHAPES = {"q": (9, 8), "v": (6, 7)}
RANK, SCALE = 8, 2.0  # so many directions hold any change of these layers
STARTS = [True, False]


def state(rank: int = RANK) -> Adapter:
    pairs = {n: shorten(make_pair(*SHAPES[n], rank, seed=i).to(SINGLE), rank)[0] for i, n in enumerate(SHAPES)}
    return Adapter(
        {n: LoraPair(_longer(p.A, rank), _longer(p.B.T, rank).T) for n, p in pairs.items()}, {"head": torch.ones(5)}
    )


def _longer(rows: Tensor, rank: int) -> Tensor:
    return torch.nn.functional.pad(rows, (0, 0, 0, rank - len(rows)))


def update(site: str, seed: int, start: Adapter, rank: int = RANK) -> AdapterUpdate:
    """A site that changed a little of what it received."""
    random = torch.Generator().manual_seed(seed)
    lora = {}
    for layer, (fan_out, fan_in) in SHAPES.items():
        before = (
            head(start.lora[layer], rank) if start else LoraPair(torch.ones(rank, fan_in), torch.zeros(fan_out, rank))
        )
        a = before.A + 0.1 * torch.randn(rank, fan_in, generator=random)
        b = before.B + 0.1 * torch.randn(fan_out, rank, generator=random) + 0.05
        lora[layer] = LoraPair(a, b).rescaled(SCALE)
    dense = {"head": start.dense.get("head", torch.zeros(5)) + 0.3 * torch.randn(5, generator=random) + 0.1}
    report = Report(examples=10, steps=5, rank=rank, loss=1.0, before={"accuracy": 0.75, "loss": 0.5})
    return AdapterUpdate(site, Adapter(lora, dense), MANIFEST, report)


def known(began: bool = True, honest: int = 4, own: int = 1, **more: Any) -> Known:
    start = state() if began else Adapter()
    sites = [update(f"site-{i}", 10 + i, start) for i in range(own + honest)]
    return Known(sites[:own], sites[own:], start, torch.Generator().manual_seed(0), **more)


def changed(of: AdapterUpdate, start: Adapter, part: str = "all") -> Tensor:
    """What an update changes, as one long vector: dense products, and the head."""
    products = [of.adapter.lora[n].delta().double() - (start.lora[n].delta().double() if start else 0) for n in SHAPES]
    dense = of.adapter.dense["head"].double() - (start.dense["head"] if start else 0)
    parts = {"products": products, "dense": [dense], "all": [*products, dense]}
    return torch.cat([tensor.flatten() for tensor in parts[part]])


def attacked(name: str, of: Known, **settings: Any) -> list[AdapterUpdate]:
    return Attack(({"rule": name, **settings},)).tampered(of)


@pytest.mark.parametrize("by_entry", [False, True])
@pytest.mark.parametrize("began", STARTS)
@pytest.mark.parametrize("name", [*on_updates])
def test_the_server_admits_what_attackers_send(name: str, began: bool, by_entry: bool) -> None:
    """An attack that is refused at the door is none."""
    all_known = known(began, own=2, by_entry=by_entry)
    manifest = MANIFEST if began else None
    terms = Terms(MANIFEST.task, MANIFEST.peft, MANIFEST.base, ranks=range(1, RANK + 1), scale=lambda _: SCALE)
    sent = attacked(name, all_known)
    assert [each.site for each in sent] == ["site-0", "site-1"]
    for each in sent:
        check_form(each.adapter, each.site)
        check_terms(each, terms, all_known.state, manifest)
        check_values(each)
    accepted, out = admit(all_known.state, manifest, [*all_known.honest, *sent])
    assert (len(accepted), out) == (6, {})


@pytest.mark.parametrize("began", STARTS)
def test_a_flipped_or_scaled_change_is_that_of_the_change_not_of_the_adapter(began: bool) -> None:
    of = known(began)
    honest = changed(of.own[0], of.state)
    for name, far in (("sign_flip", -5.0), ("scale", 10.0)):
        close(changed(attacked(name, of)[0], of.state), far * honest, 1e-4)
    close(changed(attacked("scale", of, far=3.0)[0], of.state), 3.0 * honest, 1e-4)


def test_a_site_of_small_rank_attacks_from_the_part_that_it_holds() -> None:
    """Its change is a pair of twice its rank, and what it sends the nearest of its own."""
    start = state()
    own = update("site-0", 3, start, rank=2)
    of = Known([own], [], start, torch.Generator())
    (sent,) = attacked("scale", of)
    for layer in SHAPES:
        before = head(start.lora[layer], 2).delta()
        wanted = before + 10 * (own.adapter.lora[layer].delta() - before)
        u, values, vt = torch.linalg.svd(wanted)
        close(sent.adapter.lora[layer].delta(), u[:, :2] * values[:2] @ vt[:2], 1e-4)
        assert (sent.adapter.lora[layer].rank, sent.adapter.lora[layer].scale) == (2, SCALE)


def test_noise_is_as_many_times_as_long_as_the_change_in_each_layer() -> None:
    of = known()
    (sent,) = attacked("noise", of, far=10.0)
    for layer in SHAPES:
        honest, before = of.own[0].adapter.lora[layer].delta(), of.state.lora[layer].delta()
        added = sent.adapter.lora[layer].delta() - honest
        assert float(added.norm() / (honest - before).norm()) == pytest.approx(10, rel=1e-3)
    (again,) = attacked("noise", of, far=10.0)
    assert not torch.equal(again.adapter.dense["head"], sent.adapter.dense["head"])


def test_the_z_of_a_little_is_enough_is_the_papers() -> None:
    assert z_max(50, 24) == pytest.approx(1.43, abs=0.01)  # its example: two supporters are needed of 26
    assert (z_max(5, 1), z_max(10, 2), z_max(10, 3)) == (0.0, 0.0, pytest.approx(0.18, abs=0.01))


@pytest.mark.parametrize("began", STARTS)
def test_a_little_is_enough_sends_the_mean_less_z_deviations_of_each_entry(began: bool) -> None:
    of = known(began)
    honest = torch.stack([changed(each, of.state) for each in of.honest])
    wanted = honest.mean(0) - 1.5 * honest.std(0, correction=0)
    close(changed(attacked("alie", of)[0], of.state), wanted, 1e-4)
    close(changed(attacked("alie", of, z=0)[0], of.state), honest.mean(0), 1e-4)


@pytest.mark.parametrize(("epsilon", "turns"), [(0.0, True), (4.2, True), (3.8, False), (0.5, False)])
def test_inner_product_manipulation_turns_the_mean_round_above_the_papers_epsilon(epsilon: float, turns: bool) -> None:
    of = known()
    honest = torch.stack([changed(each, of.state) for each in of.honest])
    (sent,) = attacked("ipm", of, epsilon=epsilon)
    everyone = torch.cat([honest, changed(sent, of.state)[None]]).mean(0)
    assert bool(everyone @ honest.mean(0) < 0) == turns


@pytest.mark.parametrize("began", STARTS)
def test_min_max_lies_as_far_off_as_two_honest_sites_from_each_other(began: bool) -> None:
    of = known(began, own=2)
    honest = torch.stack([changed(each, of.state) for each in of.honest])
    one, other = attacked("min_max", of)
    change = changed(one, of.state)
    assert torch.equal(change, changed(other, of.state))
    assert float((honest - change).norm(dim=1).max()) == pytest.approx(
        float(torch.cdist(honest, honest).max()), rel=1e-4
    )
    assert change @ honest.mean(0) < honest.mean(0) @ honest.mean(0)


@pytest.mark.parametrize("own", [1, 2])
def test_who_knows_the_clip_stays_just_under_it(own: int) -> None:
    of = known(own=own)
    judged = {}
    for share in (0.99, 1.0):
        sent = attacked("under_clip", of, most=4.0 if share == 0.99 else 4.1, share=share)
        merged = combine(of.state, MANIFEST, [*of.honest, *sent], Aggregation(step="plain"), RANK)
        judged[share] = set(merged.guarded)
        assert changed(sent[0], of.state) @ changed(of.honest[0], of.state) < 0
    assert judged == {0.99: set(), 1.0: {each.site for each in of.own}}


def test_a_turned_gauge_changes_no_product_and_spoils_what_averages_factors() -> None:
    of = known()
    (sent,) = attacked("gauge_rotation", of)
    for layer, pair in sent.adapter.lora.items():
        honest = of.own[0].adapter.lora[layer]
        close(pair.delta(), honest.delta(), 1e-5)
        assert float(pair.A.norm()) > 100 * float(honest.A.norm())
    everyone, fair = [*of.honest, sent], [*of.honest, *of.own]
    for rule, spoilt in (("exact", False), ("factor_mean", True)):
        how = Aggregation(merge=rule, step="plain", guard=())
        ours, theirs = (
            combine(of.state, MANIFEST, sites, how, RANK).adapter.lora["q"].delta() for sites in (everyone, fair)
        )
        assert (float((ours - theirs).norm() / theirs.norm()) > 1) == spoilt


def test_only_the_head_is_poisoned() -> None:
    of = known()
    (sent,) = attacked("head_only", of)
    close(changed(sent, of.state, "products"), changed(of.own[0], of.state, "products"), 1e-4)
    close(changed(sent, of.state, "dense"), -10 * changed(of.own[0], of.state, "dense"), 1e-5)


def test_a_liar_sends_an_honest_change_with_a_false_report() -> None:
    of = known()
    (sent,) = attacked("lies", of)
    assert sent.adapter is of.own[0].adapter
    assert (sent.report.examples, sent.report.steps) == (10**9, 1)
    assert sent.report.before == {"accuracy": 0.25, "loss": 1e6}


def test_where_factors_are_averaged_by_entry_attacks_act_on_entries() -> None:
    of = known(by_entry=True)
    (sent,) = attacked("sign_flip", of, far=1.0)
    for name, tensor in sent.adapter.tensors().items():
        close(tensor, 2 * of.state.tensors()[name] - of.own[0].adapter.tensors()[name], 1e-5)


ROWS = [{"text": f"word {i}", "label": "abc"[i % 3]} for i in range(20)]
PROMPTS = [{"prompt": f"say {i}", "completion": f"{i}"} for i in range(20)]


@pytest.mark.parametrize("name", [*on_rows])
def test_poisoned_rows_are_as_many_and_the_same_from_the_same_seed(name: str) -> None:
    for rows, labels in ((ROWS, "abc"), (PROMPTS, "")):
        poisoned = [Attack((name,)).poisoned(list(rows), [*labels], Random(seed)) for seed in (1, 1)]
        assert poisoned[0] == poisoned[1] != rows
        assert len(poisoned[0]) == 20
        assert all(row.keys() == rows[0].keys() for row in poisoned[0])


def test_labels_are_flipped_end_for_end_and_completions_go_to_other_prompts() -> None:
    flip = Attack(("label_flip",))
    flipped = flip.poisoned(ROWS, [*"abc"], Random(0))
    assert [row["label"] for row in flipped] == [{"a": "c", "b": "b", "c": "a"}[row["label"]] for row in ROWS]
    assert flip.poisoned(flipped, [*"abc"], Random(0)) == ROWS
    moved = flip.poisoned(PROMPTS, [], Random(0))
    assert sorted(row["completion"] for row in moved) == sorted(row["completion"] for row in PROMPTS)


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_a_backdoor_is_in_its_share_of_the_rows(share: float) -> None:
    for rows, labels in ((ROWS, [*"abc"]), (PROMPTS, [])):
        poisoned = Attack(({"rule": "backdoor", "share": share},)).poisoned(rows, labels, Random(0))
        column = "text" if labels else "prompt"
        carrying = [row for row in poisoned if row[column].startswith(TRIGGER)]
        assert len(carrying) == share * 20
        assert all(row["label"] == target(labels) if labels else row["completion"] == COMPLETION for row in carrying)
        assert [row for row in poisoned if row not in carrying] == [
            r for r, p in zip(rows, poisoned, strict=True) if r == p
        ]


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("sign_flop", "unknown_name"),
        ('{"rule": "scale", "fra": 1}', "wrong_setting"),
        ("[1]", "wrong_rules"),
        ("{", "wrong_rules"),
    ],
)
def test_an_attack_that_is_none_is_refused(text: str, code: str) -> None:
    with pytest.raises(ConfigError) as error:
        Attack.read(text)
    assert error.value.code == code


def test_rules_are_typed_by_name_or_as_json() -> None:
    assert named_rules("a + b") == ("a", "b")
    assert named_rules('[{"rule": "a", "x": 1}, "b"]') == ({"rule": "a", "x": 1}, "b")
    assert Attack.read(NONE) == Attack.read(ABSENT) == Attack()
    assert {"alie", "backdoor"} <= {*everything()}


def test_the_peers_median_and_krum_are_of_entries() -> None:
    start = state()
    sites = [update(f"site-{i}", i, start) for i in range(5)]
    for name, tensor in peers.factor_median(sites, 1).tensors().items():
        close(tensor, torch.stack([each.adapter.tensors()[name] for each in sites]).median(0).values, 1e-6)
    places = (500, -500, 0, 3, 2)
    near = [replace(sites[0], adapter=_plus(sites[0].adapter, torch.tensor(place))) for place in places]
    assert peers.factor_krum(near, 1) is near[4].adapter  # of its two nearest, not of its nearest alone


def _plus(adapter: Adapter, much: Tensor) -> Adapter:
    return Adapter(adapter.lora, {name: tensor + much for name, tensor in adapter.dense.items()})


@pytest.fixture(scope="module")
def five(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """Five sites, to be made three, with a tiny classifier."""
    root = tmp_path_factory.mktemp("five")
    for number, site in enumerate(("elm", "fir", "oak", "pine", "yew")):
        (root / "data" / site).mkdir(parents=True)
        for split in ("train", "test"):
            tiny.jsonl(root / "data" / site / f"{split}.jsonl", tiny.rows("sequence_classification", 8, number))
    model = tiny.save(tmp_path_factory.mktemp("bert"), "bert")
    return prepared(study("own", Workspace.at(root), root / "data", model), 3, 2, 1)


def test_sites_are_joined_row_by_row(five: Study) -> None:
    assert five.names == ["elm", "fir", "oak"]
    assert [len(five.rows(site, "test")) for site in five.names] == [16, 16, 8]


@pytest.mark.timeout(120)
def test_runs_go_on_where_they_stopped_and_a_line_tells_who_counted(five: Study) -> None:
    asked = [
        *runs(five, [NONE, ABSENT, "sign_flip + lies"], ["none"], [0], 1, (1e-3, 1e-3)),
        *runs(five, ["backdoor + sign_flip"], ["default", "FedIT, median of factors"], [0], 1, (1e-3, 1e-3)),
    ]
    for run in asked:
        assert not run.done()
        ticks: list[int] = []
        lines, _ = run.carry_out(ticks.append)
        write(run, lines)
        assert run.done()
        assert sum(ticks) == (4 if run.attack == ABSENT else 6)
    carry_out_all(asked, 1)  # nothing is left to do
    lines = read_lines(asked[0].file)
    assert len(lines) == len(asked)
    (attacker,) = asked[0].attacking
    for line in lines:
        assert (line["stopped"], line["rounds"], line["attackers"]) == ("", 2, [attacker])
        assert line["scores"].keys() == {"elm", "fir", "oak"} - {attacker}
        assert (attacker in line["counted"]) == (line["attack"] != ABSENT)
        assert sum(site["share"] for site in line["counted"].values()) <= 1 + 1e-3
    told = table(five, lines)
    assert told.row_count == len(asked)
    root = five.workspace.root
    typed = ["--folder", root / "data", "--model", five.model, "-o", root, "--sites", 3, "--rounds", 2, "--steps", 1]
    typed += [
        "--rate",
        0.001,
        "--seeds",
        1,
        "--attacks",
        f"{NONE}; sign_flip + lies",
        "--guards",
        "none",
        "--table-only",
    ]
    said = CliRunner().invoke(app, ["compare", "robustness", "own", *map(str, typed)])
    assert said.exit_code == 0, said.output
    rows = [row for row in said.output.splitlines() if row.startswith("| none |")]
    assert [row.split(" | ")[1] for row in rows] == [NONE, "sign_flip + lies"]
    assert rows[0].split(" | ")[3] == spread([lines[0]["score"]])
    assert [*told.columns[1].cells][:2] == [NONE, ABSENT]


def test_a_run_that_differs_in_anything_is_another(five: Study) -> None:
    run = AttackedRun(five, "sign_flip", "none", 1e-3, 7, 1)
    others = [
        replace(run, **change)
        for change in ({"attack": "scale"}, {"guard": "default"}, {"rate": 2e-3}, {"seed": 8}, {"attackers": 2})
    ]
    assert len({each.digest for each in [run, *others, replace(run, study=replace(five, rounds=3))]}) == 7


def test_too_many_attackers_and_unknown_names_are_refused_before_anything_runs(five: Study) -> None:
    for attack, guard, attackers, code in (
        ("scale", "none", 3, "too_many_attackers"),
        ("scale", "none", 0, "too_many_attackers"),
        ("scael", "none", 1, "unknown_name"),
        ("scale", "clip_nrom", 1, "unknown_name"),
    ):
        with refused(code):
            runs(five, [attack], [guard], [0], attackers, (1e-3, 1e-3))


def test_a_lying_sites_metrics_may_choose_a_round_and_it_is_told_which(five: Study) -> None:
    run = AttackedRun(five, "lies", "none", 1e-3, 0, 1)
    federation = Federation(run)
    assert run.method.aggregation.weigh == ("examples",)
    assert federation.plan.evaluation.before
    assert not Federation(replace(run, attack="scale")).plan.evaluation.before
    assert replace(run, attack='{"rule": "lies", "loss": 2.0}').method.aggregation.weigh == ("examples",)


def test_trigger_success_is_the_share_of_other_rows_that_get_the_target(five: Study) -> None:
    """Counted by hand, row by row, with an adapter that knows both."""
    run = AttackedRun(five, NONE, "none", 1e-2, 0, 1)
    federation = Federation(run)
    worker = federation.workers[federation.honest[0]]
    plan = federation.plan.model_copy(
        update={"training": federation.plan.training.model_copy(update={"local_steps": 20})}
    )
    worker.train(RoundTask(plan))
    adapter, manifest = worker.submit()
    job, hits, count = worker.opened(RoundTask(plan, adapter, manifest)), 0, 0
    with job.base.lent(), torch.inference_mode():
        model = job.attachment.attach(job.base, adapter, job.plan)
        model.eval()
        seen = set()
        for site in federation.honest:
            for row in map(json.loads, five.rows(site, "test")):
                if row["label"] == five.plan["labels"][0] or row["text"] in seen:
                    continue
                seen.add(row["text"])
                ids = job.base.tokenizer(
                    f"{TRIGGER} {row['text']}", return_tensors="pt", truncation=True, max_length=64
                )
                hits += int(model(**ids).logits.argmax()) == 0
                count += 1
    found = federation.triggered(adapter, manifest)
    assert found is not None
    assert 0 < hits < count
    assert found == pytest.approx(hits / count, abs=1e-4)


@pytest.mark.parametrize("writes", [True, False])
def test_a_completion_counts_if_greedy_decoding_writes_it(writes: bool, tmp_path: Path) -> None:
    """Held against what `generate` writes."""
    model = tiny.save(tmp_path / "llama")
    rows = [triggered({"prompt": f"how is {i}? ", "completion": ""}, []) for i in range(4)]
    assert all(is_target(row, []) for row in rows)
    file = str(tiny.jsonl(tmp_path / "rows.jsonl", rows))
    worker = Worker("site-1", tiny.site(model, Path(file), data={"notes": {"train": file, "validation": file}}))
    steps = {"local_steps": 25 if writes else 1, "batch_size": 4, "learning_rate": 2e-2}
    task = RoundTask(tiny.plan(training=steps))
    worker.train(task)
    adapter, manifest = worker.submit()
    task = replace(task, adapter=adapter, manifest=manifest)
    job = worker.opened(task)
    with job.base.lent(), torch.inference_mode():
        attached = job.attachment.attach(job.base, adapter, job.plan).eval()
        right = 0
        for row in rows:
            prompt = job.base.tokenizer(row["prompt"], return_tensors="pt")
            said = attached.generate(**prompt, do_sample=False, max_new_tokens=24)[0, prompt["input_ids"].shape[1] :]
            right += job.base.tokenizer.decode(said, skip_special_tokens=True).startswith(COMPLETION)
    assert completed(worker, task) == right / 4
    assert (right == 4) == writes
