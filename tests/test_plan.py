"""What a job will cost, held against what it does cost: bytes to the last one, weights to a few per cent."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig
from typer.testing import CliRunner

from nvflare_fm import transforms
from nvflare_fm.adapter import RoundTask
from nvflare_fm.aggregation.combine import combine
from nvflare_fm.cli import app
from nvflare_fm.config import Aggregation, EvaluationSettings, TaskPlan, TrainingSettings
from nvflare_fm.errors import ConfigError, ModelError
from nvflare_fm.flare.jobs.forecast import EVERY, Forecast, forecast
from nvflare_fm.flare.jobs.job import read_job
from nvflare_fm.flare.recipe import EvaluateAdapterRecipe, FedPEFTRecipe
from nvflare_fm.job.cost import (
    FLOAT32,
    LOGITS_AT_ONCE,
    AdapterShape,
    BaseShape,
    activation_bytes,
    measuring_bytes,
    rank_that_fits,
    trained_bytes,
)
from nvflare_fm.job.settle import settle
from nvflare_fm.site.check.rehearsal import seconds_per_step
from nvflare_fm.site.model.shapes import shapes
from nvflare_fm.site.tasks import registry as tasks
from nvflare_fm.site.worker import Worker
from nvflare_fm.transforms.packed import pack
from tests.codes import refused
from tests.encryption import kits
from tests.flare.messages import LAYERS, MANIFEST, adapter
from tests.site import tiny

BASE = BaseShape(quantized=64 * 64 * 8, rows=64 * 8, kept=5000, depth=2, hidden=64, inner=96, heads=0, answers=320)
SHAPE = AdapterShape({"a": (6, 5), "b": (1, 7)}, dense=(3,))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {kind: tiny.save(folder / kind, kind) for kind in ("llama", "bert")}


METHODS: list[dict[str, Any]] = [
    {"method": "lora", "rank": 3, "lora_alpha": 6},
    {"method": "lora", "rank": 4, "target_modules": ["q_proj", "query", "down_proj", "dense"]},
    {"method": "lora", "rank": 4, "use_dora": True},
    {"method": "ia3"},
    {"method": "vera", "r": 5},
    {"method": "head"},
]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: "-".join(map(str, m.values())))
@pytest.mark.parametrize("task", ["causal_lm", "sequence_classification", "token_classification"])
def test_bytes_up_are_those_of_the_update_a_site_sends(
    task: str, method: dict[str, Any], models: dict[str, Path], tmp_path: Path
) -> None:
    if method["method"] == "head" and task == "causal_lm":
        pytest.skip("has no head of its own")
    model = models["llama" if task == "causal_lm" else "bert"]
    plan = tiny.plan(task, peft=method, training={"local_steps": 1, "batch_size": 2})
    update = tiny.worker(tmp_path, model, task).train(RoundTask(plan))
    _, shape = shapes(model, plan)
    rank = plan.peft.get("rank", 0)
    assert shape.size(rank) == update.adapter.bytes()
    for name in transforms.registry:
        chain = transforms.read((name,), "uplink").keyed(kits()[1])
        travelled = pack(update.adapter, chain, "alder").parcel.bytes
        assert shape.size(rank, chain) == pytest.approx(travelled, rel=5e-3 if chain.encrypts else 0)


@pytest.mark.parametrize("merge", ["exact", "svd", "zero_pad"])
def test_bytes_down_are_those_of_the_merged_adapter(merge: str, models: dict[str, Path], tmp_path: Path) -> None:
    how = Aggregation(merge=merge, max_rank=8)
    plans = [tiny.plan(peft={"method": "lora", "rank": rank}, training={"local_steps": 1}) for rank in (2, 5)]
    sent = [
        tiny.worker(tmp_path, models["llama"], "causal_lm", f"site-{i}").train(RoundTask(plan))
        for i, plan in enumerate(plans)
    ]
    merged = combine(RoundTask(plans[0]).adapter, None, sent, how, max_rank=8)
    _, shape = shapes(models["llama"], plans[0])
    widest = settle(plans[0], how).merged_rank([2, 5])
    assert widest == (5 if merge == "zero_pad" else 8)
    assert shape.size(widest) == merged.adapter.bytes()


@pytest.mark.parametrize("quantization", ["nf4", "fp4", "int8", "bf16", "fp32"])
@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_the_weights_take_what_was_told(quantization: str, kind: str, models: dict[str, Path], tmp_path: Path) -> None:
    from nvflare_fm.site.model import base_model
    from nvflare_fm.site.offer.site_config import ModelSource

    task = "causal_lm" if kind == "llama" else "sequence_classification"
    plan = tiny.plan(task, quantization=quantization, compute_dtype="fp32")
    base = base_model.load(ModelSource(path=str(models[kind])), plan, tasks[task])
    told, _ = shapes(models[kind], plan)
    assert told.size(plan) == pytest.approx(
        base.model.get_memory_footprint(), rel=0.03, abs=2**13
    )  # BERT's position numbers


@given(rank=st.integers(1, 9), widest=st.integers(1, 9))
def test_a_weak_site_sends_less_and_never_holds_more_than_all(rank: int, widest: int) -> None:
    plan = tiny.plan()
    assert SHAPE.size(rank) == 4 * (3 + 19 * rank)
    own = trained_bytes(SHAPE, plan, rank, rank)
    assert trained_bytes(SHAPE, plan, rank, widest) == own + 4 * 19 * max(0, widest - rank)


def test_an_optimizer_without_state_takes_less_and_fedprox_takes_more() -> None:
    def held(**training: Any) -> int:
        return trained_bytes(SHAPE, tiny.plan(training={"local_steps": 1, **training}), 4, 4)

    assert held(optim="sgd") < held(optim="paged_adamw_8bit") < held() < held(proximal_mu=0.1)


def test_checkpointing_shorter_texts_and_smaller_batches_take_less() -> None:
    def kept(max_length: int = 64, **training: Any) -> int:
        deep = BaseShape(**{**vars(BASE), "depth": 12})
        return activation_bytes(deep, SHAPE, tiny.plan(max_length=max_length, training={"local_steps": 1, **training}))

    assert kept(gradient_checkpointing=True) < kept() / 2
    assert kept(max_length=32) == pytest.approx(kept() / 2, rel=0.01)
    assert kept(batch_size=4) == pytest.approx(kept(batch_size=8) / 2, rel=0.01)


@given(words=st.integers(2, 300_000), texts=st.integers(1, 64))
def test_the_logits_told_are_those_that_are_held(words: int, texts: int) -> None:
    """A loss holds three copies of them, or seven where it picks them; both are bounded where the head is apart."""
    plan = tiny.plan(training={"batch_size": texts}, evaluation={"batch_size": 1})
    for apart, copies in ((True, 3), (False, 7)):
        base = replace(BASE, depth=0, hidden=0, inner=0, answers=words, head_is_apart=apart)
        step, of_all = activation_bytes(base, SHAPE, plan), FLOAT32 * copies * words * texts * 48
        assert step == of_all or (apart and of_all > step > FLOAT32 * copies * (LOGITS_AT_ONCE - words))
        assert step <= FLOAT32 * copies * max(LOGITS_AT_ONCE, words) or not apart
        assert measuring_bytes(base, plan) == min(words * 48, step // (FLOAT32 * copies)) * FLOAT32 * 2.5


def test_an_8b_model_in_nf4_trains_two_texts_of_2048_tokens_in_12_gib(tmp_path: Path) -> None:
    sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
    LlamaConfig(**sizes, num_key_value_heads=8, vocab_size=128256, max_position_embeddings=8192).save_pretrained(
        tmp_path
    )
    training = {"batch_size": 2, "gradient_checkpointing": True}
    plan = tiny.plan(quantization="nf4", max_length=2048, peft={"method": "lora", "rank": 16}, training=training)
    base, adapter = shapes(tmp_path, plan)
    assert base.head_is_apart
    beside = base.size(plan) + trained_bytes(adapter, plan, 16, 16)
    assert beside + activation_bytes(base, adapter, plan) < 12 * 2**30
    assert measuring_bytes(base, plan) < activation_bytes(base, adapter, plan)
    assert activation_bytes(replace(base, head_is_apart=False), adapter, plan) > 12 * 2**30


def exported(folder: Path, **settings: Any) -> Path:
    FedPEFTRecipe("job", **settings).export(str(folder))
    return folder / "job"


def told(job: Path, model: Path | None = None, **rates: float) -> Forecast:
    return forecast(job, model, rates, measure=False)


def test_each_site_is_told_its_own_cost(tmp_path: Path, models: dict[str, Path]) -> None:
    sites = {"alder": {"rank": 2, "quantization": "fp32"}, "birch": {"batch_size": 2}}
    job = exported(tmp_path, sites=sites, peft={"method": "lora", "rank": 4}, training={"local_steps": 10})
    alder, birch = told(job, models["llama"], alder=0.5).costs
    assert (alder.site, alder.rank, alder.quantization, alder.rows_per_step) == ("alder", 2, "fp32", 8)
    assert (birch.site, birch.rank, birch.quantization, birch.rows_per_step) == ("birch", 4, "nf4", 2)
    assert alder.bytes_up
    assert birch.bytes_up == 2 * alder.bytes_up == birch.bytes_down == alder.bytes_down
    assert (alder.seconds, birch.seconds) == (5.0, None)
    assert alder.base_bytes
    assert birch.base_bytes
    assert alder.base_bytes > 2 * birch.base_bytes
    assert any("not quantized" in note for note in told(job, models["llama"]).notes)


def test_a_site_is_told_its_noise_and_what_all_rounds_cost(tmp_path: Path, models: dict[str, Path]) -> None:
    training = {"local_steps": 10, "batch_size": 50}
    job = exported(
        tmp_path, privacy={"epsilon": 8.0}, training=training, peft={"method": "lora", "rank": 4}, num_rounds=2,
        sites={"alder": {}, "birch": {"rank": 2}},
    )  # fmt: skip
    found = forecast(job, models["llama"], {}, measure=False, records={"": 40.0})
    alder, birch = found.noise
    assert (alder.site, alder.records, alder.records_per_step, alder.steps) == ("alder", 40, 40, 20)
    assert alder.epsilon_prv <= 8 < alder.epsilon_rdp
    file = tiny.jsonl(tmp_path / "rows.jsonl", tiny.rows("causal_lm", 40))
    site = Worker("alder", tiny.site(models["llama"], file, data={
        "notes": {"train": str(file), "validation": str(file)}}))  # fmt: skip
    update = site.train(RoundTask(TaskPlan.read(dict(read_job(job).plan) | {"quantization": "fp32"}, "test"),
                                  total_rounds=2))  # fmt: skip
    assert update.protection is not None
    assert update.protection.events[0].noise_multiplier == alder.noise_multiplier
    numbers = sum(tensor.numel() for tensor in update.adapter.tensors().values())
    assert alder.ratio == pytest.approx(alder.noise_multiplier * numbers**0.5 / 40)
    assert birch.ratio == pytest.approx(alder.ratio / 2**0.5)
    assert told(job).noise == []
    assert any("--records" in note for note in told(job).notes)
    assert forecast(job, None, {}, measure=False, records={"birch": 40.0}).noise[0].ratio is None


@pytest.mark.parametrize(
    ("code", "privacy", "records"),
    [
        ("no_privacy", {}, {"": 40.0}),
        ("no_number", {"noise_multiplier": 1.0}, {"": 40.5}),
        ("no_number", {"noise_multiplier": 1.0}, {"": 1e30}),
        ("unknown_site", {"noise_multiplier": 1.0}, {"oak": 40.0}),
        ("delta_too_large", {"noise_multiplier": 1.0, "delta": 0.01}, {"": 100.0}),
    ],
)
def test_records_that_make_no_sense_are_refused(
    tmp_path: Path, code: str, privacy: dict[str, float], records: dict[str, float]
) -> None:
    with pytest.raises(ConfigError) as refused:
        forecast(exported(tmp_path, privacy=privacy), None, {}, measure=False, records=records)
    assert refused.value.code == code


CLIENTS = {"merge": "freeze_a", "key_metric": "", "num_rounds": 20}
CLIENTS |= {"peft": {"method": "lora", "rank": 3}, "client_privacy": {"epsilon": 8.0, "expected_sites": 50}}


def test_a_job_that_protects_each_site_as_a_whole_is_told_its_noise_from_the_adapter_it_brings(tmp_path: Path) -> None:
    from nvflare_fm.export.folder import Saved, write_adapter

    brought = write_adapter(tmp_path / "earlier", Saved(adapter(1), MANIFEST))
    job = exported(tmp_path, initial_adapter=brought, **CLIENTS)
    found = told(job).plain()["client_noise"]
    assert (found["numbers"], found["rounds"], found["expected_sites"]) == (2 * 6 * 3 + 2, 20, 50)
    assert found["epsilon"] == pytest.approx(8.0)
    assert found["ratio"] == pytest.approx(found["noise_multiplier"] * 38**0.5 / 50)
    assert found["per_number"] == pytest.approx(found["ratio_of_all"] / 38**0.5)
    assert any("costs a good part" in note for note in told(job).notes)
    shown = CliRunner().invoke(app, ["plan", str(job)], env={"COLUMNS": "150"}).stdout
    assert f"{found['ratio']:.3g} : 1" in shown
    assert (
        "client_noise" not in told(exported(tmp_path / "open", initial_adapter=brought, peft=CLIENTS["peft"])).plain()
    )


@pytest.mark.parametrize(
    ("code", "more"),
    [
        ("client_start", {"initial_adapter": ""}),
        ("client_best", {"key_metric": "loss"}),
        ("client_alone", {"cross_site_evaluation": True}),
        ("client_noise_hopeless", {"client_privacy": {"noise_multiplier": 1000.0, "expected_sites": 2}}),
    ],
)
def test_a_job_that_would_not_protect_each_site_or_teach_nothing_is_refused(
    tmp_path: Path, code: str, more: dict[str, Any]
) -> None:
    from nvflare_fm.export.folder import Saved, write_adapter

    brought = write_adapter(tmp_path / "earlier", Saved(adapter(1), MANIFEST))
    with refused(code, ConfigError):
        told(exported(tmp_path, **{"initial_adapter": brought, **CLIENTS, **more}))


def test_a_plan_with_privacy_holds_a_gradient_for_each_row() -> None:
    def held(**more: Any) -> int:
        plan = TaskPlan.read({"training": {"batch_size": 3}, "rest": "none", **more}, "test")
        return trained_bytes(SHAPE, plan, 2, 2)

    assert held(privacy={"epsilon": 1.0}) - held() == FLOAT32 * (2 * 3 + 7) * SHAPE.numbers(2)


@given(rank=st.integers(1, 9))
def test_the_numbers_trained_are_those_of_the_factors_that_are(rank: int) -> None:
    assert SHAPE.trained(rank, "AB") == SHAPE.numbers(rank)
    assert SHAPE.trained(rank, "A") + SHAPE.trained(rank, "B") == SHAPE.numbers(rank) + sum(SHAPE.dense)
    assert SHAPE.trained(rank, "B") == 3 + rank * 7


def test_what_is_not_known_is_said_and_not_made_up(tmp_path: Path) -> None:
    forecast = told(exported(tmp_path, training={"local_steps": 0}))
    (cost,) = forecast.costs
    assert cost.site == EVERY
    unknown = (cost.memory_bytes, cost.seconds, cost.steps, cost.bytes_up, cost.bytes_down)
    assert unknown == (None,) * 5
    assert any("--model" in note for note in forecast.notes)
    assert any("local_epochs" in note for note in forecast.notes)


def test_an_adapter_that_the_job_brings_tells_the_bytes_without_a_model(tmp_path: Path) -> None:
    from nvflare_fm.export.folder import Saved, write_adapter

    plan = TaskPlan.read({"peft": {"method": "lora", "rank": 3}}, "test")
    brought = write_adapter(tmp_path / "earlier", Saved(adapter(1), MANIFEST, 4, plan))
    size = adapter(1).bytes()
    job = exported(tmp_path, initial_adapter=brought, peft={"method": "lora", "rank": 3}, downlink=["int8"])
    (cost,) = told(job).costs
    down = pack(adapter(1), transforms.read(("int8",), "downlink"), "the server").parcel.bytes
    assert (cost.bytes_down_first, cost.bytes_down, cost.bytes_up) == (down, down, size)
    EvaluateAdapterRecipe("measure", brought).export(str(tmp_path))
    only_measured = told(tmp_path / "measure")
    assert (only_measured.rounds, only_measured.costs[0].bytes_down, only_measured.costs[0].bytes_up) == (0, size, 0)
    assert len(LAYERS) == 2


def test_a_resumed_job_has_only_the_rounds_that_are_left(tmp_path: Path) -> None:
    from nvflare_fm.export.folder import Saved, write_adapter

    brought = write_adapter(tmp_path / "earlier", Saved(adapter(1), MANIFEST, 4))
    peft = {"method": "lora", "rank": 3}
    assert told(exported(tmp_path / "a", initial_adapter=brought, resume=True, num_rounds=7, peft=peft)).rounds == 2
    with refused("no_round_left", ConfigError, "num_rounds"):
        told(exported(tmp_path / "b", initial_adapter=brought, resume=True, num_rounds=5, peft=peft))


def test_an_adapter_of_another_task_is_found_out_before_the_job_is_sent(tmp_path: Path) -> None:
    from nvflare_fm.export.folder import Saved, write_adapter

    brought = write_adapter(tmp_path / "earlier", Saved(adapter(1), MANIFEST))
    job = exported(tmp_path, initial_adapter=brought, task="sequence_classification", labels=["a", "b"])
    with refused("other_adapter", ConfigError, "'causal_lm'", "'sequence_classification'"):
        told(job)


def test_a_job_with_a_wrong_setting_a_wrong_model_or_no_job_at_all_is_refused(tmp_path: Path) -> None:
    job = exported(tmp_path, num_rounds=7)
    with refused("unknown_site", ConfigError, "'oak'"):
        told(job, oak=1.0)
    with refused("no_config", ModelError, "config.json"):
        told(job, tmp_path)
    with refused("no_job", ConfigError, "meta.conf"):
        told(tmp_path / "nothing")
    server = next(job.rglob("config_fed_server.json"))
    server.write_text(server.read_text().replace('"num_rounds"', '"num_ronds"'))
    with refused("wrong_setting", ConfigError, "num_ronds"):
        told(job)
    server.write_text("{")
    with refused("not_json", ConfigError, "config_fed_server.json"):
        told(job)


@pytest.mark.parametrize("task", ["causal_lm", "sequence_classification", "token_classification"])
def test_a_few_steps_tell_the_seconds(task: str, models: dict[str, Path]) -> None:
    plan = tiny.plan(task, training={"local_steps": 500, "batch_size": 2})
    assert 0 < seconds_per_step(models["llama" if task == "causal_lm" else "bert"], plan) < 5


def test_a_plan_can_be_read_by_a_program(tmp_path: Path, models: dict[str, Path]) -> None:
    plain = json.loads(json.dumps(told(exported(tmp_path), models["llama"]).plain()))
    assert plain["sites"][0]["memory_bytes"] == sum(
        plain["sites"][0][part] for part in ("base_bytes", "trained_bytes", "activation_bytes")
    )


@given(rank=st.integers(1, 12), widest=st.integers(1, 12), slack=st.floats(-1, 1))
def test_the_rank_that_fits_is_the_largest_whose_memory_is_there(rank: int, widest: int, slack: float) -> None:
    plan = tiny.plan()
    fixed = BASE.size(plan) + max(activation_bytes(BASE, SHAPE, plan), measuring_bytes(BASE, plan))
    has = fixed + trained_bytes(SHAPE, plan, rank, widest) + slack
    fits = rank_that_fits(has, BASE, SHAPE, plan, widest)
    held = [r for r in range(1, widest + 1) if fixed + trained_bytes(SHAPE, plan, r, widest) <= has]
    assert fits == max(held, default=0)


@pytest.mark.parametrize(("before", "after"), [(True, True), (True, False), (False, True), (False, False)])
def test_measuring_counts_where_it_takes_more_than_a_step_and_where_there_is_any(before: bool, after: bool) -> None:
    plan = TaskPlan(
        peft={"method": "lora", "rank": 4},
        max_length=64,
        training=TrainingSettings(batch_size=1),
        evaluation=EvaluationSettings(before=before, after=after, batch_size=256),
    )
    step, measured = activation_bytes(BASE, SHAPE, plan), measuring_bytes(BASE, plan)
    assert measured > step
    has = BASE.size(plan) + (measured if before or after else step) + trained_bytes(SHAPE, plan, 2, 4)
    assert rank_that_fits(has, BASE, SHAPE, plan, 4) == 2


def test_a_site_is_told_the_rank_that_fits_into_its_memory(tmp_path: Path, models: dict[str, Path]) -> None:
    job = exported(tmp_path, peft={"method": "lora", "rank": 16}, sites={"alder": {}, "birch": {}})
    memory = {"alder": 64.0, "birch": 0.0001}
    alder, birch = forecast(job, models["llama"], {}, measure=False, memory=memory).costs
    assert (alder.rank_that_fits, birch.rank_that_fits) == (16, 0)
    assert told(job, models["llama"]).costs[0].rank_that_fits is None
    with refused("unknown_site", ConfigError, "--memory", "'oak'"):
        forecast(job, models["llama"], {}, measure=False, memory={"oak": 1.0})
    with refused("no_model", ConfigError, "--memory", "--model"):
        forecast(job, None, {}, measure=False, memory=memory)


@pytest.mark.parametrize("shares", ["AB", "A"])
def test_where_a_alone_is_shared_only_a_is_paid_for(shares: str, models: dict[str, Path], tmp_path: Path) -> None:
    job = exported(
        tmp_path,
        merge="share_a" if shares == "A" else "factor_mean",
        peft={"method": "lora", "rank": 4},
        uplink=["bf16"],
    )
    plan = settle(tiny.plan(), Aggregation(merge="share_a" if shares == "A" else "factor_mean")).plan
    sent = tiny.worker(tmp_path, models["llama"], "causal_lm").train(RoundTask(plan))
    (cost,) = told(job, models["llama"]).costs
    assert 2 * cost.bytes_up == cost.bytes_down == sent.adapter.bytes()


def test_a_row_of_two_texts_costs_what_two_rows_cost() -> None:
    base, shape = BaseShape(10**6, 10**3, 10**4, 2, 64, 128, 0, 1000, head_is_apart=True), AdapterShape({})
    for checkpointing in (False, True):
        training = {"batch_size": 4, "gradient_checkpointing": checkpointing}
        pairs, texts = tiny.plan("preference", training=training), tiny.plan(training=training | {"batch_size": 8})
        assert activation_bytes(base, shape, pairs) == activation_bytes(base, shape, texts)
    wide = tiny.plan("preference", max_length=8192, evaluation={"batch_size": 16})
    assert measuring_bytes(base, wide) == 2 * measuring_bytes(base, tiny.plan(max_length=8192))
