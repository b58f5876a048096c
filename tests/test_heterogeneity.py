"""The study of sites that differ runs on a user's own folders, whatever the method, and says what its lines mean."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.site import tiny


@pytest.fixture(scope="module")
def harness() -> Iterator[dict[str, Any]]:
    """The modules of the benchmark, which are scripts beside each other, with federations of two rounds."""
    folder = str(Path(__file__).parent / "benchmarks")
    sys.path.insert(0, folder)
    import bench
    import comparison
    import heterogeneity
    import page
    import peers

    modules = {"bench": bench, "comparison": comparison, "heterogeneity": heterogeneity, "page": page, "peers": peers}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "ROUNDS", dict.fromkeys(bench.ROUNDS, 2))
        yield modules
    sys.path.remove(folder)


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


@pytest.mark.slow
def test_every_method_and_baseline_runs_on_ones_own_folders(
    harness: dict[str, Any], sites: Path, model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    run, study = harness["heterogeneity"], harness["bench"].study("own", sites, model)
    study.plan["training"]["local_steps"] = 1
    for method in [*run.METHODS, *run.BASELINES]:
        found, _ = run.carry_out(run.Job(study, method, 1e-3, 0))
        assert found[-1]["round"] == (1 if method == "slow sites waited for" else 2), method
        assert found[-1]["scores"].keys() == {"lake", "north", "valley"}
        assert 0 <= found[-1]["score"] <= 1


@pytest.mark.timeout(60)
def test_every_third_site_is_slow_and_is_dropped_or_waited_for(
    harness: dict[str, Any], sites: Path, model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    bench = harness["bench"].Bench(harness["bench"].study("own", sites, model), 1e-3)
    took_part = {}
    for name in ("slow sites waited for", "slow sites called off"):
        method = harness["heterogeneity"].METHODS[name]
        took_part[name] = [[*done.reports] for done in bench.rounds(method, bench.workers(method), seed=0)]
    assert took_part["slow sites waited for"] == [["lake", "north", "valley"]]
    assert took_part["slow sites called off"] == [["lake", "north"]] * 2


@pytest.mark.timeout(120)
def test_one_command_tunes_runs_and_reports(
    harness: dict[str, Any],
    sites: Path,
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In this process, which knows of the short rounds."""
    monkeypatch.chdir(tmp_path)
    run = harness["heterogeneity"]
    for module in (run, harness["comparison"]):
        monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(run, "carry_out_all", lambda jobs, _: [run.write(job, *run.carry_out(job)) for job in jobs])
    monkeypatch.setattr(run.console, "file", sys.stdout)
    run.run("own", sites, model, 0, "ours, finished at home", seeds=1, first_seed=4, cores=1)
    tuning, found = (harness["comparison"].lines(tmp_path / "results" / f"own{end}.jsonl") for end in ("-tuning", ""))
    best = max(tuning, key=lambda row: row["score"])
    assert {row["method"] for row in tuning} == {"ours"}  # whose rate the other takes
    assert len(tuning) >= 3
    assert {(row["method"], row["seed"]) for row in found} == {("ours, finished at home", 4)}
    assert {row["rate"] for row in found} == {best["rate"]}
    assert "ours, finished at home" in capsys.readouterr().out
    assert list(tmp_path.rglob("own.png"))


def test_what_the_docs_report_is_named_right(harness: dict[str, Any]) -> None:
    run = harness["heterogeneity"]
    asked = [method for studies in (run.BESIDE, run.APART) for methods in studies.values() for method in methods]
    assert {*asked} <= {*run.METHODS, *run.BASELINES}


@pytest.mark.timeout(60)
def test_a_site_of_hetlora_gives_up_directions_that_fade(
    harness: dict[str, Any], sites: Path, model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    bench = harness["bench"].Bench(harness["bench"].study("own", sites, model), 1e-2)
    method = harness["heterogeneity"].METHODS["HetLoRA"]
    ranks = {}
    for pull in (0.0, 1e3):
        monkeypatch.setattr(harness["peers"], "LAMBDA", pull)
        workers = bench.workers(method)
        list(bench.rounds(method, workers, seed=0))
        ranks[pull] = [worker.overrides.rank for worker in workers.values()]
    assert ranks[0.0] == [2, 4, 32]
    assert ranks[1e3] == [1, 3, 31]


@pytest.mark.timeout(60)
def test_what_is_finished_at_home_is_each_sites_own(
    harness: dict[str, Any], sites: Path, model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    study = replace(harness["bench"].study("own", sites, model), metric="loss")
    bench, method = harness["bench"].Bench(study, 1e-2), harness["heterogeneity"].METHODS["ours, finished at home"]
    workers = bench.workers(method)
    (last,) = bench.rounds(method, workers, seed=0)
    together = bench.measure(workers, method, last.combined.adapter, last.combined.manifest)
    own = bench.finished_at_home(method, workers, 0, last)
    for site, worker in workers.items():
        assert own[site] != together[site]
        assert own[site] == bench.measure(workers, method, *worker.submit())[site]


def test_hetloras_pull_is_the_gradient_of_its_penalty(harness: dict[str, Any]) -> None:
    peers, start = harness["peers"], 3
    a, b = torch.randn(5, 7, requires_grad=True), torch.randn(4, 5, requires_grad=True)
    penalty = peers.LAMBDA * b[:, start:].norm() * a[start:].norm()
    for factor, other, wanted in zip(
        (a, b.T), (b[:, start:], a[start:]), torch.autograd.grad(penalty, (a, b)), strict=True
    ):
        wanted = wanted if factor is a else wanted.T
        torch.testing.assert_close(peers._pulled(torch.ones_like(factor), factor, other, start), 1 + wanted)


def test_texts_are_cut_where_one_says(harness: dict[str, Any], sites: Path, model: Path) -> None:
    study, bench = harness["bench"].study, harness["bench"].Bench
    assert bench(study("own", sites, model, 9), 1e-3).plan.max_length == 9
    assert bench(study("own", sites, model), 1e-3).plan.max_length == 64


def test_a_rate_is_searched_for_until_the_best_is_not_at_an_end(harness: dict[str, Any]) -> None:
    run = harness["heterogeneity"]
    scores: dict[float, float] = {}
    while rates := run.next_rates(scores, lower_is_better=True):
        scores |= {rate: abs(rate - 1.2e-3) for rate in rates}
    assert run.best(scores, lower_is_better=True) == 1.25e-3
    assert len(scores) == run.MOST_RATES
    assert run.next_rates({5e-3: 0.1, 1e-2: 0.3, 2e-2: 0.2}, lower_is_better=False) == []
    assert run.next_rates({5e-3: 0.1, 1e-2: 0.2, 2e-2: 0.3}, lower_is_better=False) == [4e-2]


def test_a_tie_is_what_seeds_cannot_tell_apart(harness: dict[str, Any]) -> None:
    verdict = harness["comparison"].verdict
    assert verdict([0.02, 0.021, 0.019]) == "better"
    assert verdict([-0.02, -0.021, -0.019]) == "worse"
    assert verdict([0.02, -0.01, 0.03]) == "tie"
    assert verdict([0.02]) == "?"
    assert verdict([0.02] * 3) == "better"
    assert verdict([0.01, -0.01] * 8) == "tie"


def test_a_random_base_has_a_rate_of_its_own_and_one_for_every_skew(harness: dict[str, Any]) -> None:
    names = ("banking77-0.1", "banking77-0.3", "banking77-0.1@random", "banking77-0@random", "medquad-types")
    one, same, random, other, whole = (harness["heterogeneity"].tuning_file(name).name for name in names)
    assert one == same != random == other
    assert whole == "medquad-types-tuning.jsonl"


@pytest.mark.timeout(60)
def test_lone_sites_are_tuned_by_the_mean_of_what_each_has_at_home(
    harness: dict[str, Any], sites: Path, model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    run = harness["heterogeneity"]
    monkeypatch.setattr(run, "RESULTS", tmp_path)
    study = harness["bench"].study("own", sites, model)
    found, _ = run.carry_out(run.Job(study, "alone", 1e-3, 0, tuning=True))
    assert [[*row["scores"]] for row in found] == [["lake"], ["north"], ["valley"]]
    for row, score in zip(found, (0.2, 0.4, 0.9), strict=True):
        row["score"] = score
    tiny.jsonl(tmp_path / "own-tuning.jsonl", found)
    assert run.tried("own") == {"alone": {1e-3: pytest.approx(0.5)}}


def test_only_what_trains_as_ours_does_takes_its_rate(
    harness: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = harness["heterogeneity"]
    monkeypatch.setattr(run, "RESULTS", tmp_path)
    tiny.jsonl(tmp_path / "own-tuning.jsonl", [{"method": "ours", "rate": rate, "score": rate} for rate in (0.5, 2.0)])
    rates = run.tuned("own", lower_is_better=False)
    assert rates["ours"] == rates["ours, by examples"] == rates["ours, finished at home"] == 2.0
    assert not {*run.OWN_RATE, *run.BASELINES} & {*rates}


def three_rows_and_one(folder: Path) -> None:
    """Two sites, lake and north, whose rows are only counted."""
    for site, rows in {"lake": 3, "north": 1}.items():
        (folder / site).mkdir()
        for split in ("train", "test"):
            tiny.jsonl(folder / site / f"{split}.jsonl", [{}] * rows)


def test_lower_may_be_better(harness: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two methods, two seeds, two sites, in bits per byte: who is first, who is worst off, who reaches the target."""
    lines = [
        {"method": method, "seed": seed, "rate": 1e-3, "round": number, "score": score + seed, "bytes_up": 10 * number,
         "bytes_down": 1, "scores": {"lake": score + seed, "north": score + seed + 0.5}}
        for method, scores in {"ours": (3.0, 1.0), "FedIT, rank 4": (3.0, 2.0)}.items()
        for seed in (0, 1)
        for number, score in enumerate(scores, 1)
    ]  # fmt: skip
    monkeypatch.setattr(harness["comparison"], "RESULTS", tmp_path)
    tiny.jsonl(tmp_path / "own.jsonl", lines)
    three_rows_and_one(tmp_path)
    study = harness["bench"].Study(
        "own", tmp_path, tmp_path, {"task": "causal_lm"}, "bits_per_byte", lower_is_better=True
    )
    results = harness["comparison"].Results(study)
    assert list(results.final) == ["ours", "FedIT, rank 4"]
    assert results.worst("ours") == [1.5, 2.5]
    assert results.by_rows("ours") == [1.125, 2.125]
    assert results.paired("FedIT, rank 4", "ours") == [-1.0, -1.0]
    assert results.to_target("ours") == [(2, 21), (2, 21)]
    assert results.to_target("FedIT, rank 4") == [(2, 21)]
    table = harness["comparison"].overview([study])
    rows = dict(zip(*(list(column.cells) for column in table.columns), strict=True))
    assert rows["ours"] == "1.500 ± 0.707"
    assert harness["comparison"].spread([1.5]) == "1.500"  # one seed has no spread
    assert rows["FedIT, rank 4"] == "2.500 ± 0.707"  # told apart, so without a mark
    assert rows["pooled"] == "–"


def test_lone_sites_make_one_line_of_what_each_has_at_home(
    harness: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    comparison = harness["comparison"]
    monkeypatch.setattr(comparison, "RESULTS", tmp_path)
    scores = {"lake": {"lake": 0.9, "north": 0.1}, "north": {"lake": 0.2, "north": 0.5}}
    lone = [{"method": "alone", "seed": 0, "trained_at": site, "scores": scores[site]} for site in scores]
    ours = {"method": "ours", "seed": 0, "rate": 1e-3, "score": 0.8, "scores": {"lake": 0.8, "north": 0.8}}
    tiny.jsonl(tmp_path / "own.jsonl", [*lone, ours])
    three_rows_and_one(tmp_path)
    plan = {"task": "sequence_classification"}
    results = comparison.Results(harness["bench"].Study("own", tmp_path, tmp_path, plan, "accuracy"))
    (line,) = results.final[comparison.ALONE].values()
    assert line["scores"] == {"lake": 0.9, "north": 0.5}
    assert line["score"] == pytest.approx(0.8)
    assert results.worst(comparison.ALONE) == [0.5]


@pytest.mark.realdata
@pytest.mark.timeout(120)
def test_the_page_of_the_docs_has_what_was_measured(harness: dict[str, Any]) -> None:
    page = harness["page"]
    text = page.PAGE.read_text()
    assert page.written(text) == text, "run tests/benchmarks/page.py"
