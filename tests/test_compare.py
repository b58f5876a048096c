"""`nvflare-fm compare` runs every method on a user's own folders, and its lines and tables mean what they say."""

import importlib.util
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from nvflare_fm.adapter import Adapter
from nvflare_fm.cli import app
from nvflare_fm.compare import data_sets, grid, peers, run, tuning
from nvflare_fm.compare.bench import Bench, federated
from nvflare_fm.compare.methods import ALONE, BASELINES, METHODS, OWN_RATE, PEERS, Method, compared, methods_named
from nvflare_fm.compare.results import Results, overview, spread, verdict
from nvflare_fm.compare.run import Run, carry_out, carry_out_all, read_lines, write
from nvflare_fm.compare.study import Study, Workspace, study
from nvflare_fm.errors import FmError
from nvflare_fm.site.model.attach import heads
from nvflare_fm.site.training.fit import LocalTrainer
from nvflare_fm.site.worker import Worker
from tests.codes import refused
from tests.site import tiny

FIRST = (5e-3, 1e-2, 2e-2)


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sites")
    for number, site in enumerate(("lake", "north", "valley")):
        (root / site).mkdir()
        for split in ("train", "test"):
            tiny.jsonl(root / site / f"{split}.jsonl", tiny.rows("sequence_classification", 12, number))
    return root


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("bert"), "bert")


@pytest.fixture
def own(sites: Path, model: Path, tmp_path: Path) -> Study:
    """A study of two rounds."""
    return study("own", Workspace.at(tmp_path), sites, model, rounds=2)


def empty_study(folder: Path, **changed: Any) -> Study:
    """Two sites, lake and north, whose rows are only counted, and whose results lie in the same folder."""
    for site, rows in {"lake": 3, "north": 1}.items():
        (folder / site).mkdir()
        for split in ("train", "test"):
            tiny.jsonl(folder / site / f"{split}.jsonl", [{}] * rows)
    found = Study("own", folder, folder, {"task": "causal_lm"}, "bits_per_byte", Workspace(folder, folder), 2, 50)
    return replace(found, lower_is_better=True, **changed)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_method_and_baseline_runs_on_ones_own_folders(own: Study) -> None:
    own.plan["training"]["local_steps"] = 1
    for method in [*METHODS, *BASELINES]:
        ticks: list[int] = []
        found, _ = carry_out(Run(own, method, 1e-3, 0), ticks.append)
        assert found[-1]["round"] == (1 if method == "slow sites waited for" else 2), method
        assert found[-1]["scores"].keys() == {"lake", "north", "valley"}
        assert 0 <= found[-1]["score"] <= 1
        assert sum(ticks) == (3 if method == "slow sites waited for" else Run(own, method, 1e-3, 0).site_rounds)


def test_every_third_site_is_slow_and_is_dropped_or_waited_for(own: Study) -> None:
    bench = Bench(own, 1e-3)
    took_part = {}
    for name in ("slow sites waited for", "slow sites called off"):
        took_part[name] = [
            [*done.reports] for done in bench.rounds(METHODS[name], bench.workers(METHODS[name]), seed=0)
        ]
    assert took_part["slow sites waited for"] == [["lake", "north", "valley"]]
    assert took_part["slow sites called off"] == [["lake", "north"]] * 2


@pytest.mark.timeout(120)
def test_one_command_tunes_runs_and_reports(
    sites: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process: another one takes seconds to start."""

    def here(runs: Sequence[Run], cores: int) -> None:
        for each in runs:
            if not each.done():
                write(each, carry_out(each)[0])

    for module in (grid, run, tuning):
        monkeypatch.setattr(module, "carry_out_all", here)
    typed = [
        "compare",
        "run",
        "own",
        "--folder",
        str(sites),
        "--model",
        str(model),
        "--rounds",
        "2",
        "-o",
        str(tmp_path),
    ]
    typed += ["--methods", "ours, finished at home", "--seeds", "1", "--first-seed", "4", "--rates", "0.005,0.01,0.02"]
    said = CliRunner().invoke(app, typed)
    assert said.exit_code == 0, said.output
    assert "About 4 trials to tune and 1 runs: a minute or two on 2 cores" in said.output
    trials, found = (read_lines(tmp_path / "results" / f"own{end}.jsonl") for end in ("-tuning", ""))
    best = max(trials, key=lambda row: row["score"])
    assert {row["method"] for row in trials} == {"ours"}  # whose rate the other takes
    assert len(trials) >= 3
    assert {(row["method"], row["seed"]) for row in found} == {("ours, finished at home", 4)}
    assert {row["rate"] for row in found} == {best["rate"]}
    assert "ours, finished at home" in said.output
    assert list(tmp_path.rglob("own.png"))


@pytest.mark.timeout(120)
def test_runs_side_by_side_are_shown_as_they_go_and_not_done_twice(
    own: Study, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [Run(own, "ours", 1e-3, 0)]
    carry_out_all(asked, 1)
    assert "6/6" in capsys.readouterr().out  # rounds of three sites
    (line, *_) = before = read_lines(asked[0].file)
    assert line["digest"] == asked[0].digest
    carry_out_all(asked, 1)
    assert read_lines(asked[0].file) == before


def test_a_line_counts_only_for_the_configuration_that_made_it(own: Study) -> None:
    first = Run(own, "ours", 1e-3, 0)
    write(first, [{"method": "ours", "seed": 0, "rate": 1e-3, "digest": first.digest}])
    assert first.done()
    assert not Run(replace(own, test_rows=3), "ours", 1e-3, 0).done()
    assert not Run(replace(own, plan={**own.plan, "max_length": 9}), "ours", 1e-3, 0).done()


def test_rows_are_known_by_their_content_not_by_their_folders_name(sites: Path, own: Study, tmp_path: Path) -> None:
    other = tmp_path / sites.name
    for site in ("lake", "north"):
        (other / site).mkdir(parents=True)
        for split in ("train", "test"):
            tiny.jsonl(other / site / f"{split}.jsonl", tiny.rows("sequence_classification", 9, 7))
    changed = study("own", own.workspace, other, own.model)
    for held_out in (False, True):
        one, two = Bench(own, 1e-3, held_out), Bench(changed, 1e-3, held_out)
        assert one.pooled(METHODS["ours"]).config.data != two.pooled(METHODS["ours"]).config.data
    assert one.files["lake"] != two.files["lake"]


def test_what_the_docs_report_is_named_right() -> None:
    asked = [method for studies in (grid.cells(), grid.PARTS) for methods in studies.values() for method in methods]
    assert {*asked} <= {*METHODS, *BASELINES}


@pytest.mark.parametrize(
    ("typed", "code"),
    [
        (["--methods", "mine"], "unknown_name"),
        (["--task", "poetry"], "unknown_name"),
        (["--rates", "fast"], "wrong_rates"),
        (["--rates", "-1"], "wrong_rates"),
        (["--folder", "empty"], "no_study_data"),
        (["--folder", "both"], "ambiguous_task"),
        (["--folder", "broken"], "unreadable_row"),
        (["--folder", "unlabelled"], "unreadable_row"),
        (["--folder", "empty", "--task", "causal_lm"], "no_study_data"),
        ([], "unknown_data_set"),
    ],
)
def test_a_mistake_is_told_before_anything_runs(
    typed: list[str], code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "both" / "lake").mkdir(parents=True)
    for split in ("train", "test"):
        tiny.jsonl(tmp_path / "both" / "lake" / f"{split}.jsonl", [{"text": "a", "label": "b", "prompt": "c"}])
    for name, rows in {
        "broken": '{"text": "a"\n',
        "unlabelled": '{"text": "a", "label": "b"}\n{"text": "a"}\n',
    }.items():
        (tmp_path / name / "lake").mkdir(parents=True)
        for split in ("train", "test"):
            (tmp_path / name / "lake" / f"{split}.jsonl").write_text(rows)
    said = CliRunner().invoke(app, ["compare", "run", "clinics", *typed])
    assert said.exit_code == 1
    assert f"[{code}]" in str(said.exception)


def test_a_study_is_named_for_a_file_and_damaged_results_are_told_by_their_line(own: Study) -> None:
    with pytest.raises(FmError) as error:
        study("../clinics", own.workspace, own.folder, own.model)
    assert error.value.code == "study_name"
    write(Run(own, "ours", 1e-3, 0), [{"method": "ours"}])
    with own.results().open("a") as file:
        file.write('{"method": "ou')
    with refused("unreadable_row", FmError, "line 2") as error:
        read_lines(own.results())
    assert error.value.code == "unreadable_row"


def test_public_data_are_asked_for_where_they_are_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVFLARE_FM_SHARED", str(tmp_path))
    with pytest.raises(FmError) as error:
        study("medquad-lm", Workspace.at(tmp_path))
    assert error.value.code == "no_shared_folder"


def test_a_site_of_hetlora_gives_up_directions_that_fade(own: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    own.plan["training"]["local_steps"] = 1
    bench, method = Bench(own, 1e-2), METHODS["HetLoRA"]
    ranks = {}
    for pull, gamma in ((0.0, 0.7), (1e3, 0.7), (1e3, 0.99)):
        monkeypatch.setattr(peers, "LAMBDA", pull)
        monkeypatch.setattr(peers, "GAMMA", gamma)
        workers = bench.workers(method)
        list(bench.rounds(method, workers, seed=0))
        ranks[pull, gamma] = [worker.overrides.rank for worker in workers.values()]
    assert ranks[0.0, 0.7] == [2, 4, 32]
    assert ranks[1e3, 0.7] == [1, 3, 22]
    assert ranks[1e3, 0.99] == [2, 4, 32]  # a hundredth less is not yet one direction less
    for worker, rank in zip(workers.values(), (2, 4, 32), strict=True):
        assert isinstance(worker, peers.SelfPruningWorker)
        assert worker.exact_rank == pytest.approx(0.99 * rank)


def test_what_is_finished_at_home_is_each_sites_own(own: Study) -> None:
    bench, method = Bench(replace(own, metric="loss"), 1e-2), METHODS["ours, finished at home"]
    workers = bench.workers(method)
    (last,) = bench.rounds(method, workers, seed=0)
    together = bench.measure(workers, method, last.combined.adapter, last.combined.manifest)
    finished = bench.finished_at_home(method, workers, 0, last)
    for site, worker in workers.items():
        assert finished[site] != together[site]
        assert finished[site] == bench.measure(workers, method, *worker.submit())[site]


def test_an_adapter_of_its_own_costs_the_shared_one_nothing_and_is_scored_on_rows_that_did_not_choose_it(
    own: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, method = Bench(replace(own, metric="loss", test_rows=0), 1e-2), METHODS["ours, and its own at home"]
    workers = bench.workers(method)
    *_, last = bench.rounds(method, workers, seed=0)
    *_, ours = bench.rounds(METHODS["ours"], bench.workers(METHODS["ours"]), seed=0)
    one, two = (done.combined.adapter.tensors() for done in (last, ours))
    assert all(torch.equal(one[name], two[name]) for name in one | two)
    seen: list[set[int]] = []
    evaluate = Worker._evaluate

    def watched(self: Worker, model: Any, job: Any, stop: Any) -> Any:
        seen.append({hash(str(row["input_ids"])) for row in job.measured})
        return evaluate(self, model, job, stop)

    monkeypatch.setattr(Worker, "_evaluate", watched)
    found = bench.its_own(method, workers, 0, last)
    assert found.keys() == workers.keys()
    each = len(seen) // len(workers) // 2  # measurements of a half: those that choose, and the one that scores
    for start in range(0, len(seen), each):
        *chose, scored = seen[start : start + each]
        assert all(rows == chose[0] for rows in chose)
        assert not chose[0] & scored
    digests = {bench.digest(METHODS[name], 0) for name in ("ours", "ours, and its own at home")}
    assert len(digests) == 2


def test_hetloras_pull_is_the_gradient_of_its_penalty() -> None:
    start = 3
    a, b = torch.randn(5, 7, requires_grad=True), torch.randn(4, 5, requires_grad=True)
    penalty = peers.LAMBDA * b[:, start:].norm() * a[start:].norm()
    for factor, other, wanted in zip(
        (a, b.T), (b[:, start:], a[start:]), torch.autograd.grad(penalty, (a, b)), strict=True
    ):
        wanted = wanted if factor is a else wanted.T
        torch.testing.assert_close(peers._pulled(torch.ones_like(factor), factor, other, start), 1 + wanted)


def test_texts_are_cut_where_one_says(own: Study, sites: Path, model: Path) -> None:
    assert Bench(study("own", own.workspace, sites, model, max_length=9), 1e-3).plan.max_length == 9
    assert Bench(own, 1e-3).plan.max_length == 64


@given(rate=st.floats(1e-5, 0.05), head=st.floats(1 / 16, 256), tunes_head=st.booleans(), lower=st.booleans())
def test_a_setting_is_searched_for_until_the_best_is_at_no_end(
    rate: float, head: float, tunes_head: bool, lower: bool
) -> None:
    """Of a score with one summit, whose rate and head's factor depend on each other a little."""
    here = Path()
    study = Study("own", here, here, {}, "", Workspace(here, here), 2, 0, FIRST, lower)

    def score(at: tuple[float, float]) -> float:
        x, y = math.log2(at[0] / rate), math.log2(at[1] / head)
        return (1 if lower else -1) * (1 + x * x + x * y / 2 + y * y)

    scores = dict[tuple[float, float], float]()
    while settings := tuning.next_settings(scores, study, tunes_head):
        assert not {*settings} & {*scores}
        scores |= {at: score(at) for at in settings}
    best = tuning.best(scores, lower)
    beside = [(best[0] * step, best[1]) for step in (0.5, 2)]
    beside += [(best[0], best[1] * step) for step in (0.5, 2)] if tunes_head else []
    assert {*beside} <= {*scores}
    assert all((score(best) <= score(at)) if lower else (score(best) >= score(at)) for at in beside)
    assert tunes_head or {at for _, at in scores} == {1.0}
    assert not any(tuning.beyond(scores, study, tunes_head))


def test_a_single_rate_is_taken_as_it_is(own: Study) -> None:
    alone = replace(own, rates=(3e-3,))
    assert tuning.next_settings({}, alone) == []
    assert tuning.tuned(alone, ["ours", "FedIT, rank 4"]) == {"ours": (3e-3, 1.0), "FedIT, rank 4": (3e-3, 1.0)}


def test_private_methods_are_for_text_too(own: Study) -> None:
    writing = replace(own, plan={"task": "causal_lm", "training": {"local_steps": 1}})
    for name in ("ours, ε = 8", "alone, ε = 1", "FFA-LoRA, rank 4, ε = 3"):
        plan = Bench(writing, 1e-3).settled((METHODS | BASELINES)[name])
        assert plan.privacy.asked
        assert not plan.training.head_lr_ratio


def test_a_search_ends_at_wide_bounds_and_where_nothing_is_better(own: Study) -> None:
    study, scores = replace(own, rates=FIRST), dict[tuple[float, float], float]()
    while settings := tuning.next_settings(scores, study):
        scores |= {(rate, head): rate / 2 for rate, head in settings}
    rate, _ = tuning.best(scores, lower_is_better=False)
    assert tuning.RATE_BOUNDS[1] / 2 < rate <= tuning.RATE_BOUNDS[1]
    assert any(tuning.beyond(scores, study, tunes_head=False))  # and the tables say so
    all_right = {(5e-3, 1.0): 1.0, (1e-2, 1.0): 0.9, (2e-2, 1.0): 0.8}
    assert tuning.next_settings(all_right, study, tunes_head=True) == []
    coarse = {(1e-3, 1.0): 0.1, (1e-2, 1.0): 0.3, (1e-1, 1.0): 0.2}
    assert tuning.next_settings(coarse, replace(own, rates=(1e-3, 1e-2, 1e-1))) == [(5e-3, 1.0), (2e-2, 1.0)]


def test_a_method_chooses_of_its_own_trials_only(own: Study) -> None:
    """Not of those with another factor for its head, on other rows, or of an earlier version."""
    drawn = own.at_seed(tuning.TUNING_SEED)
    for rate, head, score in ((1e-2, 1.0, 0.3), (1e-2, 4.0, 0.5), (2e-2, 1.0, None)):
        trial = Run(drawn, "FlexLoRA", rate, tuning.TUNING_SEED, "own", head)
        line = {"method": "FlexLoRA", "seed": 100, "rate": rate, "head": head, "score": score}
        write(trial, [line | {"digest": trial.digest}])
    write(trial, [{"method": "FlexLoRA", "rate": 4e-2, "score": 0.9, **more} for more in ({}, {"digest": "other"})])
    both = ["FlexLoRA", "FlexLoRA, own head rate", "FedIT, rank 4"]
    assert tuning.tuned(own, both) == {"FlexLoRA": (1e-2, 1.0), "FlexLoRA, own head rate": (1e-2, 4.0)}
    assert {run.title for run in tuning.trials_left(replace(own, rates=(1e-2, 2e-2)), both[:2])} == {
        "own, FlexLoRA at 0.005, seed 100",  # twice that has diverged
        "own, FlexLoRA at 0.01, head times 2, seed 100",
        "own, FlexLoRA at 0.01, head times 8, seed 100",
    }
    assert tuning.tried(replace(own, test_rows=3)) == {}


def test_a_rate_at_which_training_diverges_is_the_worst(own: Study) -> None:
    trial = Run(replace(own, rounds=1), "FlexLoRA", 1e30, tuning.TUNING_SEED, "own")
    found, _ = carry_out(replace(trial, rate=10.0, head=1e38))
    assert [row["score"] for row in found] == [None]
    assert found[0]["stopped"] in run.DIVERGED


def test_adams_steps_of_a_head_are_as_if_it_had_a_rate_of_its_own(own: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    method, factor, create = METHODS["FedIT, rank 4"], 4.0, LocalTrainer.create_optimizer
    found = first_adapter(own, replace(method, head_factor=factor))

    def apart(self: Any, *args: Any, **kwargs: Any) -> Any:
        optimizer, head = create(self, *args, **kwargs), {id(p) for p in heads(self.model, self.base)}
        for group in [*optimizer.param_groups]:
            moved = [p for p in group["params"] if id(p) in head]
            group["params"] = [p for p in group["params"] if id(p) not in head]
            optimizer.add_param_group({**group, "params": moved, "lr": factor * group["lr"]})
        return optimizer

    monkeypatch.setattr(LocalTrainer, "create_optimizer", apart)
    assert_same(found, first_adapter(own, method))


def test_steps_of_our_heads_are_as_if_a_job_gave_their_rate(own: Study) -> None:
    usual, half = (replace(METHODS["ours"], training={"head_lr_ratio": ratio}) for ratio in (8.0, 4.0))
    assert_same(first_adapter(own, replace(usual, head_factor=0.5)), first_adapter(own, half))


def first_adapter(own: Study, method: Method) -> Adapter:
    """After a round of two steps."""
    own.plan["training"]["local_steps"] = 2
    bench = Bench(own, 1e-3)
    return next(bench.rounds(method, bench.workers(method), seed=0)).combined.adapter


def assert_same(one: Adapter, other: Adapter) -> None:
    """As products, but for the rounding of each step."""
    for layer in one.lora:
        torch.testing.assert_close(one.lora[layer].delta(), other.lora[layer].delta(), atol=1e-6, rtol=1e-4)
    for name in one.dense:
        torch.testing.assert_close(one.dense[name], other.dense[name], atol=1e-6, rtol=1e-4)


def test_bytes_are_those_of_what_must_travel(own: Study) -> None:
    """Three sites of ranks 2, 4 and 32, two rounds: what each method sends, in directions and heads."""
    own.plan["training"]["local_steps"] = 1
    bench = Bench(replace(own, test_rows=1), 1e-3)
    lines = {name: [*federated(bench, METHODS[name], 0, 1)][-1] for name in (
        "ours, int8", "FedIT, rank 4", "FFA-LoRA, rank 4", "RoLoRA, rank 4", "FlexLoRA", "FLoRA, folded into NF4",
        "ours", "FedIT, bytes of ours",
    )}  # fmt: skip
    up, down = ({name: line[way] for name, line in lines.items()} for way in ("bytes_up", "bytes_down"))
    adapter = first_adapter(own, METHODS["FedIT, rank 4"])
    head, pair = 3 * 4 * sum(p.numel() for p in adapter.dense.values()), adapter.lora
    one = 4 * sum(p.A.shape[1] + p.B.shape[0] for p in pair.values())  # bytes of a direction
    of_b = 4 * sum(p.B.shape[0] for p in pair.values())
    assert up["FedIT, rank 4"] == 2 * (12 * one + head)
    assert down["FedIT, rank 4"] == 12 * one + head
    assert up["FFA-LoRA, rank 4"] == 2 * (12 * of_b + head)
    assert down["FFA-LoRA, rank 4"] == 12 * of_b + head
    assert up["RoLoRA, rank 4"] == 12 * one + 2 * head  # B, then A
    assert down["RoLoRA, rank 4"] == 12 * of_b + head
    assert up["ours"] == up["FlexLoRA"] == 2 * (38 * one + head)
    assert down["ours"] == 3 * 32 * one + head
    assert down["FlexLoRA"] == 38 * one + head
    assert down["FLoRA, folded into NF4"] == 3 * 38 * one + head
    assert up["ours, int8"] < 0.4 * up["ours"]
    assert down["ours, int8"] < 0.4 * down["ours"]
    equal = "FedIT, bytes of ours"
    assert abs(up[equal] + down[equal] - up["ours"] - down["ours"]) <= 9 * one / 2  # a rank is a whole number
    assert {name: line["rank_sum"] for name, line in lines.items() if name in ("ours", equal)} == {
        "ours": 38,
        equal: 57,
    }


def test_a_stack_holds_what_all_sites_send_however_many_they_are(own: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nvflare_fm.compare.bench.RANKS", (4, 4))
    merged = []
    fold = peers.fold
    monkeypatch.setattr(
        peers, "fold", lambda combined, *more: (merged.append(combined.adapter), fold(combined, *more))[1]
    )
    bench, method = Bench(own, 1e-3), METHODS["FLoRA, folded into NF4"]
    list(bench.rounds(method, bench.workers(method), seed=0))
    assert max(pair.rank for adapter in merged for pair in adapter.lora.values()) == 12


@pytest.mark.realdata
def test_a_split_by_chance_is_drawn_anew_for_each_seed_and_keeps_all_rows(shared: Path, tmp_path: Path) -> None:
    whole = study("mtslm-0.3", Workspace.at(tmp_path))
    drawn = [whole.at_seed(seed) for seed in (0, 1, 1)]
    assert drawn[0].digest == whole.digest != drawn[1].digest == drawn[2].digest
    assert whole.setup == drawn[1].setup
    rows = [sorted(row for site in each.names for row in each.rows(site, "train")) for each in drawn]
    assert rows[0] == rows[1]
    assert Run(drawn[0], "ours", 1e-3, 1).digest != Run(drawn[1], "ours", 1e-3, 1).digest
    alike = replace(whole, source="banking77-0")
    assert alike.at_seed(1) is alike
    assert replace(whole, source="").at_seed(1).folder == whole.folder


def test_sets_with_few_classes_share_them_and_differ_in_topic_and_disjoint_ones_share_none(shared: Path) -> None:
    labels: dict[str, dict[str, set[str]]] = {}
    for name in ("banking77-two", "medquad-two", "medquad-three", "pubmedqa-years", "banking77-disjoint"):
        splits: dict[str, set[str]] = {"train": set(), "test": set()}
        for site, split, row in data_sets.SETS[name](0.2):
            labels.setdefault(name, {}).setdefault(site, set()).add(row["label"])
            splits[split].add(row["text"])
        assert splits["train"]
        assert len(splits["test"] & splits["train"]) <= len(splits["test"]) / 20  # institutes repeat some sentences
    assert set.union(*labels["banking77-two"].values()) == {"problem", "question"}
    assert all(len(found) == 2 for found in labels["banking77-two"].values())
    assert set.union(*labels["medquad-three"].values()) == {"information", "symptoms", "treatment"}
    assert all(found == {"yes", "no", "maybe"} for found in labels["pubmedqa-years"].values())
    apart = labels["banking77-disjoint"].values()
    assert sorted(map(len, apart)) == [3, 4, 5, 6, 7, 8, 9, 11, 12, 12]
    assert len(set.union(*apart)) == sum(map(len, apart)) == 77


def test_every_peer_is_measured_with_a_rate_for_its_head_and_with_ours() -> None:
    classified, written = compared("sequence_classification"), compared("causal_lm")
    for name in PEERS:
        assert {f"{name}, our head", f"{name}, own head rate"} <= {*classified}
    assert not [name for name in written if "head" in name]
    with pytest.raises(FmError):
        methods_named(["ours, our head, own head rate"])


def test_a_tie_is_what_seeds_cannot_tell_apart() -> None:
    assert verdict([0.02, 0.021, 0.019]) == "better"
    assert verdict([-0.02, -0.021, -0.019]) == "worse"
    assert verdict([0.02, -0.01, 0.03]) == "tie"
    assert verdict([0.02]) == "?"
    assert verdict([0.02] * 3) == "better"
    assert verdict([0.01, -0.01] * 8) == "tie"


def test_a_random_base_has_a_rate_of_its_own_and_one_for_every_skew() -> None:
    names = ("banking77-0.1", "banking77-0.3", "banking77-0.1@random", "banking77-0@random", "medquad-types")
    one, same, random, other, whole = map(tuning.tuned_on, names)
    assert one == same != random == other
    assert whole == "medquad-types"


def test_lone_sites_are_tuned_by_the_mean_of_what_each_has_at_home(own: Study) -> None:
    tried = Run(own, "alone", 1e-3, tuning.TUNING_SEED, tuning_of="own")
    found, _ = carry_out(tried)
    assert [[*row["scores"]] for row in found] == [["lake"], ["north"], ["valley"]]
    for row, score in zip(found, (0.2, 0.4, 0.9), strict=True):
        row["score"] = score
    write(tried, found)
    assert tuning.tried(own) == {"alone": {(1e-3, 1.0): pytest.approx(0.5)}}


def test_only_what_trains_as_ours_does_takes_its_rate(own: Study) -> None:
    for rate in (0.25, 0.5):
        trial = Run(own, "ours", rate, tuning.TUNING_SEED, "own")
        write(trial, [{"method": "ours", "rate": rate, "score": rate, "digest": trial.digest}])
    rates = tuning.tuned(own, [*METHODS, *BASELINES])
    assert rates["ours"] == rates["ours, by examples"] == rates["ours, finished at home"] == (0.5, 1.0)
    assert not {*OWN_RATE, *BASELINES} & {*rates}


def test_lower_may_be_better(tmp_path: Path) -> None:
    """Two methods, two seeds, two sites, in bits per byte: who is first, who is worst off, who reaches the target."""
    tiny.jsonl(tmp_path / "own.jsonl", [
        {"method": method, "seed": seed, "rate": 1e-3, "round": number, "score": score + seed, "bytes_up": 10 * number,
         "bytes_down": 1, "scores": {"lake": score + seed, "north": score + seed + 0.5}, "setup": "these"}
        for method, scores in {"ours": (3.0, 1.0), "FedIT, rank 4": (3.0, 2.0)}.items()
        for seed in (0, 1)
        for number, score in enumerate(scores, 1)
    ])  # fmt: skip
    others = [{"method": "FlexLoRA", "seed": 0, "rate": 1e-3, "round": 2, "score": 0.5, "scores": {}}]
    tiny.jsonl(tmp_path / "own.jsonl", others + read_lines(tmp_path / "own.jsonl"))
    results = Results(empty_study(tmp_path))
    assert list(results.final) == ["ours", "FedIT, rank 4"]  # and not what was measured another way
    assert results.worst("ours") == [1.5, 2.5]
    assert results.by_rows("ours") == [1.125, 2.125]
    assert results.paired("FedIT, rank 4", "ours") == [-1.0, -1.0]
    assert results.to_target("ours") == [(2, 21), (2, 21)]
    assert results.to_target("FedIT, rank 4") == [(2, 21)]
    table = overview([results.study])
    rows = dict(zip(*(list(column.cells) for column in table.columns), strict=True))
    assert rows["ours"] == "1.500 ± 0.707"
    assert spread([1.5]) == "1.500"  # one seed has no spread
    assert rows["FedIT, rank 4"] == "2.500 ± 0.707"  # told apart, so without a mark
    assert rows["pooled"] == "–"


def test_lone_sites_make_one_line_of_what_each_has_at_home(tmp_path: Path) -> None:
    scores = {"lake": {"lake": 0.9, "north": 0.1}, "north": {"lake": 0.2, "north": 0.5}}
    lone = [{"method": "alone", "seed": 0, "trained_at": site, "scores": scores[site]} for site in scores]
    ours = {"method": "ours", "seed": 0, "rate": 1e-3, "score": 0.8, "scores": {"lake": 0.8, "north": 0.8}}
    tiny.jsonl(tmp_path / "own.jsonl", [*lone, ours])
    results = Results(empty_study(tmp_path, metric="accuracy"))
    results = Results(replace(results.study, lower_is_better=False))
    (everywhere,) = results.final["alone, everywhere"].values()
    assert everywhere["scores"] == {site: mean(scores[of][site] for of in scores) for site in scores}
    (line,) = results.final[ALONE].values()
    assert line["scores"] == {"lake": 0.9, "north": 0.5}
    assert line["score"] == pytest.approx(0.8)
    assert results.worst(ALONE) == [0.5]


def page() -> ModuleType:
    """The script that writes the tables of the documentation."""
    file = Path(__file__).parent / "benchmarks" / "page.py"
    spec = importlib.util.spec_from_file_location("page", file)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.realdata
@pytest.mark.timeout(120)
def test_the_page_of_the_docs_has_what_was_measured(shared: Path) -> None:
    script = page()
    text = script.PAGE.read_text()
    assert script.written(text) == text, "run tests/benchmarks/page.py"
