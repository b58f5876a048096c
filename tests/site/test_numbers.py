"""Numbers and any number of labels for a text: transformers' losses, others' metrics, and rows that are neither."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import pearsonr
from sklearn.metrics import f1_score, mean_absolute_error, r2_score, root_mean_squared_error

from nvflare_fm.adapter import RoundTask
from nvflare_fm.config import RoundPlan
from nvflare_fm.errors import DataError
from nvflare_fm.site.data import loading as data
from nvflare_fm.site.data.check import inspect
from nvflare_fm.site.model import base_model
from nvflare_fm.site.offer.site_config import DataSource, ModelSource
from nvflare_fm.site.tasks import BadRow, registry
from nvflare_fm.site.worker import Worker
from tests.codes import refused
from tests.site import tiny

WORDS = tiny.tokenizer()
FINITE = st.floats(-1e6, 1e6)


def regression(count: int = 1, **more: Any) -> RoundPlan:
    return tiny.plan("regression", labels=[f"number {i}" for i in range(count)], **more)


def target(task: str, row: dict[str, Any], plan: RoundPlan) -> Any:
    (example,) = registry[task].encode({"text": "he is ill", **row}, WORDS, plan).examples
    return example["labels"]


@given(numbers=st.lists(FINITE, min_size=1, max_size=4), as_text=st.booleans(), standard=st.data())
def test_numbers_are_learned_in_scales_from_the_mean(
    numbers: list[float], as_text: bool, standard: st.DataObject
) -> None:
    mean = [standard.draw(FINITE) for _ in numbers]
    scale = [standard.draw(st.floats(1e3, 1e6)) for _ in numbers]
    row: list[Any] = [repr(number) for number in numbers] if as_text else list(numbers)
    plan = regression(len(numbers), target_mean=mean, target_scale=scale)
    found = target("regression", {"labels": row}, plan)
    assert found == pytest.approx([(n - m) / s for n, m, s in zip(numbers, mean, scale, strict=True)])
    if len(numbers) == 1:
        assert target("regression", {"label": row[0]}, plan) == found
        assert target("regression", {"label": row[0]}, regression(target_scale=[1e6])) == [numbers[0] / 1e6]


NO_NUMBERS: dict[str, list[Any]] = {
    "value_missing": [None, "", "  "],
    "not_a_number": ["warm", "36,6", "1,234.5", "36.6 C", "nan", "inf", "0x1f", "1_000", "٣", True, {"a": 1}, [[1.0]]],
    "number_too_large": [math.nan, math.inf, -1e7, "1e9", "1e999", 10**400],
    "number_count": [[1.0, 2.0], []],
    "number_too_far": [2e4],
}


@pytest.mark.parametrize(("value", "code"), [(value, code) for code in NO_NUMBERS for value in NO_NUMBERS[code]])
def test_what_is_no_number_is_a_bad_row(value: Any, code: str) -> None:
    with refused(code, BadRow):
        target("regression", {"label": value}, regression())


TRUTHS = st.integers(2, 6).flatmap(
    lambda n: st.lists(st.lists(st.integers(-9, 9).map(float), min_size=2, max_size=2), min_size=n, max_size=n)
)


@given(truth=TRUTHS, seed=st.integers(0, 99))
def test_errors_are_in_the_units_of_the_rows_and_as_others_count_them(truth: list[list[float]], seed: int) -> None:
    plan = regression(2, target_mean=[3.0, -1.0], target_scale=[2.0, 0.5])
    answer = torch.randn(len(truth), 2, generator=torch.Generator().manual_seed(seed))
    mean, scale = torch.tensor(plan.target_mean), torch.tensor(plan.target_scale)
    columns = {"answer": answer, "label": (torch.tensor(truth) - mean) / scale}
    found = registry["regression"].metrics(columns, plan)
    said = (answer.double() * scale + mean).numpy()
    assert found["mae"] == pytest.approx(mean_absolute_error(truth, said), rel=1e-5)
    assert found["rmse"] == pytest.approx(
        root_mean_squared_error([n for row in truth for n in row], said.ravel()), rel=1e-5
    )
    varied = all(len({row[i] for row in truth}) > 1 for i in (0, 1))
    assert {"r2", "pearson"} <= found.keys() if varied else not {"r2", "pearson"} & found.keys()
    if varied:
        assert found["r2"] == pytest.approx(r2_score(truth, said), rel=1e-4, abs=1e-5)
        each = [pearsonr([row[i] for row in truth], said[:, i])[0] for i in (0, 1)]
        assert found["pearson"] == pytest.approx(sum(each) / 2, rel=1e-4, abs=1e-5)


LABEL_LISTS = st.lists(st.sampled_from(tiny.LABELS), unique=True, max_size=3)


@given(labels=LABEL_LISTS, written=st.sampled_from(["list", "json", "python", "places"]))
def test_each_label_that_is_listed_is_a_yes_and_the_others_are_a_no(labels: list[str], written: str) -> None:
    forms: dict[str, Any] = {
        "list": labels,
        "json": json.dumps(labels),
        "python": repr(labels),
        "places": [tiny.LABELS.index(label) for label in labels],
    }
    found = target("multi_label", {"labels": forms[written]}, tiny.plan("multi_label"))
    assert found == [float(label in labels) for label in tiny.LABELS]


NO_LISTS: dict[str, list[Any]] = {
    "value_missing": [None, "", [None]],
    "labels_no_list": ["ill", "[ill", {"ill": 1}, 1, "[" * 5000],
    "label_twice": [["ill", "ill"], [1, "ill"], [0, 1, 1]],
    "unknown_label": [["worse"], [True]],
    "multi_label": [[["ill"]]],
    "too_many_labels": [["calm", "ill", "well", "calm"]],
}


@pytest.mark.parametrize(("labels", "code"), [(labels, code) for code in NO_LISTS for labels in NO_LISTS[code]])
def test_what_is_no_list_of_the_plans_labels_is_a_bad_row(labels: Any, code: str) -> None:
    with refused(code, BadRow) as caught:
        target("multi_label", {"labels": labels}, tiny.plan("multi_label"))
    assert "worse" not in str(caught.value)


@given(seed=st.integers(0, 999), count=st.integers(1, 6), rare=st.floats(0, 1))
def test_scores_over_labels_leave_out_those_that_no_text_has(seed: int, count: int, rare: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    truth = (torch.rand(count, 3, generator=generator) < rare).float()
    answer = torch.randn(count, 3, generator=generator)
    task = registry["multi_label"]
    found = task.metrics(task.score(answer, truth), tiny.plan("multi_label"))
    ours, said = truth.numpy().astype(int), (answer > 0).numpy().astype(int)
    assert found["micro_f1"] == pytest.approx(f1_score(ours, said, average="micro", zero_division=0))
    present = [i for i in range(3) if ours[:, i].any()]
    if present:
        each = [f1_score(ours[:, i], said[:, i], zero_division=0) for i in present]
        assert found["macro_f1"] == pytest.approx(sum(each) / len(each))
    assert ("mean_average_precision" in found) == bool(present)
    assert found["loss"] == pytest.approx(
        float(torch.nn.BCEWithLogitsLoss()(answer, truth)), rel=1e-5
    )  # the mean over texts and labels


CASES: list[tuple[str, int, str]] = [("regression", 1, "llama"), ("regression", 2, "bert"), ("multi_label", 3, "bert")]


@pytest.mark.parametrize(("task", "count", "kind"), CASES)
def test_the_loss_is_transformers_own(task: str, count: int, kind: str, request: pytest.FixtureRequest) -> None:
    plan = tiny.plan(task, labels=[f"label {i}" for i in range(count)])
    kept = base_model.load(ModelSource(path=str(request.getfixturevalue(kind))), plan, registry[task])
    rows = [{"input_ids": [5 + i, 9, 11 + i][: 2 + i % 2], "labels": [float((i + j) % 2) for j in range(count)]}
            for i in range(3)]  # fmt: skip
    batch = registry[task].batch(rows, 0)
    with torch.no_grad():
        ours = registry[task].loss(kept.model, kept, batch, plan) / registry[task].items(batch)
        labels = torch.tensor([row["labels"] for row in rows])
        theirs = kept.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss
    assert float(ours) == pytest.approx(float(theirs), rel=1e-5)


@pytest.mark.parametrize("peft", ["lora", "ia3"])
@pytest.mark.parametrize(("task", "better"), [("regression", "mae"), ("multi_label", "mean_average_precision")])
def test_a_round_on_a_quantized_base_makes_a_site_better(
    bert: Path, tmp_path: Path, task: str, better: str, peft: str
) -> None:
    more = {"target_mean": [40.0], "target_scale": [10.0]} if task == "regression" else {}
    training = {"local_steps": 40, "batch_size": 12, "learning_rate": 5e-3}
    plan = tiny.plan(task, quantization="nf4", peft={"method": peft}, training=training, **more)
    worker = tiny.worker(tmp_path, bert, task)
    update = worker.train(RoundTask(plan))
    report = update.report
    assert report.after["loss"] < 0.8 * report.before["loss"]
    assert (report.after[better] < report.before[better]) == (task == "regression")
    again = worker.validate(RoundTask(plan, update.adapter, update.manifest))
    assert again == pytest.approx(report.after, rel=1e-4)
    one_by_one = worker.validate(
        RoundTask(plan.model_copy(update={"evaluation": plan.evaluation.model_copy(update={"batch_size": 1})}),
                  update.adapter)
    )  # fmt: skip
    assert one_by_one == pytest.approx(again, rel=1e-2, abs=1e-2)


@pytest.mark.parametrize("task", ["regression", "multi_label"])
def test_accumulated_small_batches_are_one_large_batch(bert: Path, tmp_path: Path, task: str) -> None:
    def trained(**sizes: int) -> Any:
        training = {"local_steps": 2, "optim": "sgd", "learning_rate": 1e-3, "max_grad_norm": 1e9, **sizes}
        plan = tiny.plan(task, training=training, evaluation={"before": False, "after": False})
        return tiny.worker(tmp_path, bert, task).train(RoundTask(plan))

    large, small = trained(batch_size=8), trained(batch_size=2, gradient_accumulation_steps=4)
    theirs = small.adapter.tensors()
    for name, tensor in large.adapter.tensors().items():
        torch.testing.assert_close(tensor, theirs[name], atol=1e-5, rtol=1e-3)
    assert small.report.loss == pytest.approx(large.report.loss, rel=1e-4)


def test_a_site_whose_rows_are_for_another_task_is_told_so(tmp_path: Path) -> None:
    for task, row, code in (
        ("sequence_classification", {"text": "a", "labels": ["ill"]}, "multi_label"),
        ("sequence_classification", {"text": "a", "label": 36.6}, "regression"),
        ("regression", {"text": "a", "category": 3}, "column_missing"),
        ("multi_label", {"text": "a", "label": "ill"}, "column_missing"),
        ("preference", {"prompt": "a", "completion": "b"}, "column_missing"),
        ("regression", {"text": "a", "label": "warm"}, "bad_rows"),
    ):
        source = DataSource(train=str(tiny.jsonl(tmp_path / "a.jsonl", [row] * 3)))
        with pytest.raises(DataError) as caught:
            data.load(source, tiny.plan(task), registry[task], WORDS)
        assert caught.value.code == code, (task, caught.value)


FILES: dict[str, tuple[list[dict[str, Any]], dict[str, str], set[str]]] = {
    "regression": (
        [{"note": f"he is ill and walks {i}", "age": 20 + i % 7} for i in range(12)],
        {"text": "note", "label": "age"},
        set(),
    ),
    "multi_label": (
        [{"note": f"he is ill {i}", "codes": ["a", "b"][: i % 3]} for i in range(12)],
        {"text": "note", "labels": "codes"},
        {"a", "b"},
    ),
    "preference": ([{"prompt": f"how {i}? ", "chosen": "well", "rejected": "ill"} for i in range(12)], {}, set()),
}


@pytest.mark.parametrize("task", FILES)
def test_data_check_finds_columns_and_labels_and_counts_rows(tmp_path: Path, task: str) -> None:
    rows, columns, labels = FILES[task]
    columns = {} if task == "regression" else columns  # any column may hold numbers: the user says which
    given = FILES[task][1] if task == "regression" else {}
    found = inspect(DataSource(train=str(tiny.jsonl(tmp_path / "a.jsonl", rows)), columns=given), task)
    assert found.columns == (given or columns)
    assert (found.good, found.reasons.total()) == (12, 0)
    assert set(found.labels) == labels


def test_several_numbers_are_counted_by_data_check(tmp_path: Path) -> None:
    rows = [{"text": "a", "labels": [1, 2.5]}] * 3 + [{"text": "a", "labels": [1]}]
    found = inspect(DataSource(train=str(tiny.jsonl(tmp_path / "a.jsonl", rows))), "regression")
    assert (found.good, found.reasons.total()) == (3, 1)


def test_a_site_that_lacks_a_number_of_the_plan_is_told_how_many_there_are(bert: Path, tmp_path: Path) -> None:
    file = tiny.jsonl(tmp_path / "a.jsonl", [{"text": "a", "labels": [1.0]}] * 3)
    with pytest.raises(DataError) as caught:
        Worker("site-1", tiny.site(bert, file)).train(RoundTask(regression(2)))
    assert caught.value.code == "bad_rows"
