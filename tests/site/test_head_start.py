"""The start of a head at a site: sums of what the head reads, where the site tells them, and the head put in."""

from pathlib import Path
from typing import Any

import pytest
import torch

from nvflare_fm.adapter import Adapter, RoundTask
from nvflare_fm.config import Aggregation, TaskPlan
from nvflare_fm.errors import ConfigError, FmError, PolicyError, WireError
from nvflare_fm.job.settle import settle
from nvflare_fm.simulate import federate
from nvflare_fm.site import head_start
from nvflare_fm.site.model import base_model
from nvflare_fm.site.offer.site_config import ModelSource
from nvflare_fm.site.tasks import registry as tasks
from nvflare_fm.site.worker import Worker
from nvflare_fm.synthesis.features import BIAS, CONSTANT, NAMES, WEIGHT, Sums
from tests.codes import refused
from tests.site import tiny, zoo
from tests.site.test_mean_pooling import OLD, declared
from tests.strategies import identical

TASK = "sequence_classification"
TELLS = {"label_statistics": ["features"]}


def plan(**more: Any) -> TaskPlan:
    return tiny.plan(TASK, head_start="features", **more)


def summing(**more: Any) -> TaskPlan:
    return settle(plan(**more), Aggregation()).summing


def site(folder: Path, model: Path, rows: list[dict[str, Any]] | None = None, **privacy: Any) -> Worker:
    file = str(tiny.jsonl(folder / "rows.jsonl", rows or tiny.rows(TASK)))
    data = {"notes": {"train": file, "validation": file}}
    return Worker("site-1", tiny.site(model, Path(file), data=data, privacy=TELLS | privacy))


@pytest.fixture(scope="module")
def models(llama: Path, bert: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    averaged = declared(bert, tmp_path_factory.mktemp("averaged") / "model", OLD)
    return {"llama": llama, "bert": bert, "averaged": averaged}


@pytest.mark.parametrize("kind", ["llama", "bert", "averaged"])
@pytest.mark.parametrize("quantization", ["fp32", "nf4"])
def test_what_is_summed_is_what_the_head_reads(
    models: dict[str, Path], tmp_path: Path, kind: str, quantization: str
) -> None:
    asked = summing(quantization=quantization, compute_dtype="fp32", evaluation={"batch_size": 5})
    worker = site(tmp_path, models[kind])
    told = Sums.read(worker.train(RoundTask(asked)).adapter.dense)
    base, rows = base_model.load(ModelSource(path=str(models[kind])), asked, tasks[TASK]), worker.rows(asked).train
    layer, whole = base.model.get_submodule(base.heads[0]), Sums.none(3, 64)
    for place, row in enumerate(rows):
        with base.lent(), torch.no_grad():
            alone = head_start.sums(base, rows.select([place]), asked, lambda: False)
            ids = torch.tensor([row["input_ids"]])
            answer = base.model(ids, attention_mask=torch.ones_like(ids)).logits[0].double()
        features = alone.sums[row["labels"]]
        bias = 0.0 if layer.bias is None else layer.bias.double()
        assert torch.allclose(features @ layer.weight.double().T + bias, answer, atol=1e-4)
        whole.add(features[None], [row["labels"]])
    for one, other in zip(vars(told).values(), vars(whole).values(), strict=True):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["llama", "averaged"])
@pytest.mark.parametrize("method", ["lora", "head", "ia3"])
def test_a_federation_starts_from_a_head_that_knows_what_every_site_holds(
    models: dict[str, Path], tmp_path: Path, kind: str, method: str
) -> None:
    workers = {}
    for place, label in enumerate(tiny.LABELS):  # a label at each
        (tmp_path / label).mkdir(exist_ok=True)
        rows = [row for row in tiny.rows(TASK, 36) if row["label"] == label]
        workers[f"site-{place}"] = site(tmp_path / label, models[kind], rows)
        workers[f"site-{place}"].site = f"site-{place}"
    settings = {"local_steps": 1, "batch_size": 4, "learning_rate": 1e-5}
    peft = {"method": method} | ({"rank": 4} if method == "lora" else {})
    scores = {}
    for start in ("features", "random"):
        asked = plan(peft=peft, training=settings).model_copy(update={"head_start": start})
        first, last = federate(workers, asked, Aggregation(), 2)
        scores[start] = [report.before["accuracy"] for report in last.reports.values()]
        assert not {*NAMES, WEIGHT, BIAS, CONSTANT} & {*first.combined.adapter.dense}
    assert min(scores["features"]) > 0.9
    assert sum(scores["random"]) < 2


@pytest.mark.parametrize("swapped", [{"drift"}, {"cedar", "drift"}])
def test_a_federation_goes_on_without_a_site_whose_labels_mean_something_else_unless_many_are_like_it(
    models: dict[str, Path], tmp_path: Path, swapped: set[str]
) -> None:
    labels = tuple(f"label-{place}" for place in range(10))
    workers = {}
    for name in ("alder", "birch", "cedar", "drift"):
        order = labels[1:] + labels[:1] if name in swapped else labels
        texts = [{"text": f"{'abcdefghij'[i % 10] * 9} {i // 10}", "label": order[i % 10]} for i in range(60)]
        (tmp_path / name).mkdir()
        workers[name] = site(tmp_path / name, models["averaged"], texts)
        workers[name].site = name
    asked = plan(labels=labels, training={"local_steps": 1, "batch_size": 4, "learning_rate": 1e-5})
    for done in federate(workers, asked, Aggregation(), 2):
        assert {update.site for update in done.updates} == {*workers} - (swapped if len(swapped) == 1 else set())


@pytest.mark.parametrize("rows", [0, 1, head_start.MOST, head_start.MOST + 1, 10 * head_start.MOST + 3])
def test_of_very_many_rows_some_are_summed_up_from_the_first_to_near_the_last(rows: int) -> None:
    some = head_start.spread(rows)
    assert len(some) <= head_start.MOST
    assert len(some) == rows or len(some) > head_start.MOST // 2
    assert not rows or (some[0] == 0 and some[-1] >= rows - some.step)


def test_a_label_of_few_rows_is_not_told(llama: Path, tmp_path: Path) -> None:
    rows = [row for row in tiny.rows(TASK, 36) if row["label"] != "ill"]
    rows += [row for row in tiny.rows(TASK, 36) if row["label"] == "ill"][:1] * 20  # one row, twenty times
    worker = site(tmp_path, llama, rows, min_metric_rows=4)
    told = Sums.read(worker.train(RoundTask(summing())).adapter.dense)
    assert told.counts.tolist() == [12, 0, 12]
    assert not told.sums[1].any()
    only = site(tmp_path, llama, rows[-20:], min_metric_rows=4, min_update_rows=2)
    with refused("few_rows", PolicyError):
        only.train(RoundTask(summing()))


@pytest.mark.parametrize(
    "privacy",
    [
        {"label_statistics": []},
        {"label_statistics": ["skew"]},
        {"max_epsilon": 3.0},
        {"required_protection": ["encryption"]},
    ],
)
def test_a_site_that_does_not_tell_features_refuses_the_sums_whatever_the_server_says_of_them(
    llama: Path, tmp_path: Path, privacy: dict[str, Any]
) -> None:
    worker = site(tmp_path, llama, **privacy)
    for asked in (summing(), summing().model_copy(update={"label_statistics": ()})):
        with pytest.raises(PolicyError) as raised:
            worker.train(RoundTask(asked))
        assert raised.value.code in ("kept_here", "refused")
        assert "does not tell features" in raised.value.message


def test_where_no_site_tells_the_federation_starts_as_ever(bert: Path, tmp_path: Path) -> None:
    settings = {"local_steps": 1, "batch_size": 4, "learning_rate": 1e-3}
    found = []
    for start in ("features", "random"):
        worker, asked = site(tmp_path, bert, label_statistics=[]), plan(training=settings)
        asked = asked.model_copy(update={"head_start": start})
        *_, last = federate({"site-1": worker}, asked, Aggregation(), 2)
        found.append(last.combined.adapter)
    assert identical(*found)


def test_it_trains_all_the_same_from_the_start_that_others_give(llama: Path, tmp_path: Path) -> None:
    worker, asked = site(tmp_path, llama, label_statistics=[]), settle(plan(), Aggregation()).plan
    assert worker.train(RoundTask(asked, Adapter(dense=GOOD))).report.loss > 0


def test_a_head_of_several_layers_is_refused(tmp_path: Path) -> None:
    model = zoo.save(tmp_path / "model", "roberta")
    with refused("head_not_linear", ConfigError):
        site(tmp_path, model).train(RoundTask(summing()))


@pytest.mark.parametrize("task", ["token_classification", "multi_label", "regression", "causal_lm"])
def test_only_texts_that_have_one_label_each_are_summed_whatever_the_server_asks(
    bert: Path, tmp_path: Path, task: str
) -> None:
    worker = tiny.worker(tmp_path, bert, task)
    with refused("head_start_task", ConfigError):
        worker.train(RoundTask(tiny.plan(task, sums=True)))


GOOD = {WEIGHT: torch.zeros(3, 64), BIAS: torch.zeros(3), CONSTANT: torch.zeros(64)}


@pytest.mark.parametrize(
    "wrong",
    [
        {WEIGHT: torch.zeros(3, 63)},
        {WEIGHT: torch.zeros(2, 64)},
        {BIAS: torch.zeros(2)},
        {CONSTANT: torch.zeros(3)},
        {WEIGHT: torch.full((3, 64), float("nan"))},
    ],
)
def test_a_start_of_another_head_is_refused(bert: Path, tmp_path: Path, wrong: dict[str, torch.Tensor]) -> None:
    worker, asked = site(tmp_path, bert), settle(plan(), Aggregation()).plan
    with refused("adapter_misfit", WireError):
        worker.train(RoundTask(asked, Adapter(dense={**GOOD, **wrong})))


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_the_head_is_as_the_start_says_and_without_a_bias_as_near_as_can_be(
    models: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    start = {WEIGHT: torch.randn(3, 64), BIAS: torch.randn(3), CONSTANT: torch.randn(64)}
    asked = plan(training={"local_steps": 1, "batch_size": 4, "learning_rate": 1e-9})
    told = site(tmp_path, models[kind]).train(RoundTask(settle(asked, Aggregation()).plan, Adapter(dense=start)))
    found = {name.rpartition(".")[2]: told.adapter.dense[name] for name in told.adapter.dense}
    folded = start[WEIGHT] + start[BIAS][:, None] * start[CONSTANT]
    assert torch.allclose(found["weight"], folded if kind == "llama" else start[WEIGHT], atol=1e-5)
    if kind == "bert":
        assert torch.allclose(found["bias"], start[BIAS], atol=1e-5)


def test_what_is_not_the_start_of_a_head_is_taken_for_an_adapter(bert: Path, tmp_path: Path) -> None:
    assert head_start.is_start(Adapter(dense=GOOD))
    worker, asked = site(tmp_path, bert), settle(plan(), Aggregation()).plan
    with pytest.raises(FmError):
        worker.train(RoundTask(asked, Adapter(dense={**GOOD, "more": torch.zeros(1)})))
