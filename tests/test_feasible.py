"""What no site could carry out is refused while a job is made, with the nearest name that would do."""

from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from nvflare_fm.cli import app
from nvflare_fm.config import Aggregation, RoundPlan, SiteOverrides
from nvflare_fm.errors import ConfigError
from nvflare_fm.flare.controller import FedPEFT
from nvflare_fm.flare.recipe import EvaluateAdapterRecipe, FedPEFTRecipe
from nvflare_fm.job.feasible import check_best, check_sites
from nvflare_fm.job.settle import settle
from nvflare_fm.job.tasks import TASKS
from nvflare_fm.registry import nearest
from nvflare_fm.site.tasks import registry as tasks
from tests.codes import refused

CLASSIFY = {"task": "sequence_classification", "labels": ["calm", "ill"]}
REFUSED: list[tuple[dict[str, Any], str, str]] = [
    (
        {"task": "sequence_clasification", "labels": ["a", "b"]},
        "unknown_task",
        'did you mean "sequence_classification"',
    ),
    ({"task": "classification"}, "unknown_task", "known: ["),
    (CLASSIFY | {"labels": ["calm"]}, "too_few_labels", "the plan has 1"),
    (CLASSIFY | {"labels": []}, "too_few_labels", "the plan has 0"),
    ({"task": "token_classification", "labels": ["O"]}, "too_few_labels", "at least two"),
    (CLASSIFY | {"labels": ["ill", "calm", "ill "]}, "duplicate_label", "list each class once"),
    (CLASSIFY | {"labels": ["ill", " "]}, "empty_label", "a label is empty"),
    ({"task": "regression"}, "too_few_labels", "list a name for each number"),
    ({"task": "multi_label"}, "too_few_labels", "at least one label"),
    ({"task": "regression", "labels": ["age"], "target_mean": [1.0, 2.0]}, "wrong_count", "labels names 1"),
    (CLASSIFY | {"target_scale": [1.0, 2.0]}, "no_numbers", "target_scale is for regression"),
    ({"model": "/srv/x"}, "not_an_alias", "model is a path"),
    ({"data": "../notes.jsonl"}, "not_an_alias", "data is a way out of a folder"),
    ({"model": "meta-llama/Llama-3.1-8B"}, "not_an_alias", "model is a hub id"),
    ({"model": ""}, "not_an_alias", "model is "),
]


@pytest.mark.parametrize(("plan", "code", "said"), REFUSED)
def test_a_plan_that_no_site_can_carry_out_is_refused_wherever_it_is_read(
    plan: dict[str, Any], code: str, said: str
) -> None:
    for made in (
        lambda: settle(RoundPlan(**plan), Aggregation()),
        lambda: FedPEFT(plan=plan, key_metric="", key_metric_mode="min"),
        lambda: FedPEFTRecipe("job", key_metric="", **plan),
    ):
        with pytest.raises(ConfigError) as caught:
            made()
        assert (caught.value.code, said in caught.value.message) == (code, True), caught.value.message


def test_a_path_is_no_alias_for_a_single_site_either() -> None:
    for made in (
        lambda: settle(RoundPlan(), Aggregation(), {"oak": SiteOverrides(data="/srv/x")}),
        lambda: FedPEFTRecipe("job", sites={"oak": {"data": "/srv/x"}}),
    ):
        with refused("not_an_alias", ConfigError, "oak", "data") as caught:
            made()
        assert caught.value.code == "not_an_alias"


@pytest.mark.parametrize("task", TASKS)
def test_the_metrics_are_those_that_the_tasks_report_and_the_better_end_is_right(task: str) -> None:
    known = TASKS[task]
    labels = ("O", "B-x", "I-x") if known.least_labels else ()
    truth, wrong = torch.tensor([1, 2, 0, 1]), torch.tensor([0, 0, 1, 0])
    if not known.exclusive:  # each text has three answers
        truth = torch.nn.functional.one_hot(truth, 3).float()
        wrong = 1 - truth
    common = {"tokens": torch.tensor([4]), "bytes": torch.tensor([9]), "words": torch.tensor([4]), "label": truth}
    plan = RoundPlan(task=task, labels=labels)
    best, worst = (
        tasks[task].metrics({**common, "answer": answer, "nats": torch.full((4,), nats), "margin": 1 / nats - 1}, plan)
        for answer, nats in ((truth, torch.tensor(0.1)), (wrong, torch.tensor(2.0)))
    )
    assert set(best) == set(known.metrics)
    for metric, mode in known.metrics.items():
        assert (best[metric] < worst[metric]) == (mode == "min"), metric


def test_every_task_has_its_promises() -> None:
    assert set(TASKS) == set(tasks)
    assert all(tasks[name].promises is TASKS[name] for name in tasks)
    for known in TASKS.values():  # what one promise implies of another
        assert known.classes >= known.exclusive
        assert known.per_token >= known.learns_text
        assert bool(known.least_labels) == (known.classes or known.numbers) == (not known.learns_text)


@pytest.mark.parametrize(
    ("task", "metric", "mode", "code", "said"),
    [
        ("causal_lm", "acuracy", "max", "unknown_metric", "known: ['bits_per_byte', 'loss', 'perplexity']"),
        ("sequence_classification", "f1", "max", "unknown_metric", 'did you mean "macro_f1"'),
        ("token_classification", "macro_f1", "max", "unknown_metric", 'did you mean "f1"'),
        ("sequence_classification", "accuracy", "min", "wrong_mode", "set key_metric_mode to max"),
        ("causal_lm", "loss", "max", "wrong_mode", "set key_metric_mode to min"),
    ],
)
def test_a_metric_that_cannot_choose_the_best_is_refused(
    task: str, metric: str, mode: str, code: str, said: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        check_best(task, metric, mode)
    assert (caught.value.code, said in caught.value.message) == (code, True), caught.value.message
    plan = {"labels": ["a", "b"]} if TASKS[task].least_labels else {}
    with pytest.raises(ConfigError):
        FedPEFTRecipe("job", task=task, key_metric=metric, key_metric_mode=mode, **plan)
    check_best(task, "", mode)


def test_a_job_is_not_made_to_wait_for_sites_it_does_not_have(tmp_path: Path) -> None:
    for made in (
        lambda: check_sites(["a", "b"], 3),
        lambda: FedPEFTRecipe("job", min_sites=3, sites={"a": {}, "b": {}}),
        lambda: EvaluateAdapterRecipe("job", tmp_path, min_sites=2, sites={"a": {}}),
    ):
        with pytest.raises(ConfigError) as caught:
            made()
        assert caught.value.code == "too_few_sites"
    with refused("unknown_site", ConfigError, '"north"'):
        check_sites(["north", "south"], 1, ["nort"])
    check_sites([], 9, ["any"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["lora_mixed_hardware", "sites.a.rank=2", "min_responses=2"], "[too_few_sites]"),
        (["lora_mixed_hardware", "min_clients=4"], "[too_few_sites]"),
        (["lora_mixed_hardware", 'guard=[{"rule": "geometric_median", "f": 2}]'], "[too_few_for_guard]"),
        (
            ["lora_text_classification", "sites_per_round=4", 'guard=[{"rule": "multi_krum", "f": 1}]'],
            "[too_few_for_guard]",
        ),
        (["lora_mixed_hardware", "mandatory_clients=clinik"], "[unknown_site]"),
        (["lora_mixed_hardware", "sites.a.model=/srv/x", "min_responses=1", "min_clients=1"], "a: model is a path"),
        (["lora_text_classification", "labels=ill"], "[too_few_labels]"),
        (["lora_text_classification", "labels=ill,calm,ill"], "[duplicate_label]"),
        (["lora_text_classification", "key_metric=f1"], 'did you mean "macro_f1"'),
        (["lora_text_classification", "task=sequence_classifcation"], "[unknown_task]"),
        (["lora_text_classification", "model=/srv/x"], "model is a path"),
        (["lora_text_classification", "lr=1e-3"], 'did you mean "learning_rate"'),
        (["lora_text_classification", "r=4"], 'did you mean "rank"'),
        (["lora_text_classification", "epochs=4"], "local_epochs"),
    ],
)
def test_a_template_refuses_it_too_and_writes_nothing(tmp_path: Path, words: list[str], said: str) -> None:
    refused = CliRunner().invoke(app, ["new", *words, "-o", str(tmp_path / "job")])
    assert refused.exit_code == 1
    assert said in str(refused.exception)
    assert not (tmp_path / "job").exists()


def test_what_a_setting_is_called_elsewhere_leads_to_its_name_here() -> None:
    assert nearest("lr", ["learning_rate", "rank"]) == 'did you mean "learning_rate"? '
    assert nearest("lr", ["rank"]) == ""
    with refused("wrong_setting", ConfigError, '"learning_rate"'):
        RoundPlan.read({"training": {"lr": 1e-3}}, "plan")
    with refused("wrong_setting", ConfigError, '"rank"'):
        settle(RoundPlan.read({"peft": {"method": "lora", "r": 4}}, "plan"), Aggregation())
