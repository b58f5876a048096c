"""What of a base model a job may train, and how much memory it may take: refused before the weights are loaded."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from nvflare_fm.adapter import RoundTask
from nvflare_fm.config import RoundPlan
from nvflare_fm.errors import ConfigError, PolicyError
from nvflare_fm.site import worker
from nvflare_fm.site.model import base_model
from nvflare_fm.site.model.shapes import shapes
from nvflare_fm.site.worker import Worker
from tests.codes import refused
from tests.site import tiny

TARGETS, WHOLE = "target_modules", "modules_to_save"
TASK = {"llama": "causal_lm", "tied": "causal_lm", "bert": "sequence_classification"}


@pytest.fixture(scope="session")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model that answers with the weights of its embedding."""
    return tiny.save(tmp_path_factory.mktemp("tied"), tie_word_embeddings=True)


def asks(kind: str, **peft: Any) -> RoundPlan:
    return tiny.plan(
        TASK[kind],
        peft={"method": "lora", "rank": 2, **peft},
        training={"local_steps": 1, "batch_size": 2},
        evaluation={"before": False, "after": False},
    )


def site(request: pytest.FixtureRequest, folder: Path, kind: str, **limits: Any) -> Worker:
    rows = tiny.jsonl(folder / "rows.jsonl", tiny.rows(TASK[kind]))
    return Worker("site-1", tiny.site(request.getfixturevalue(kind), rows, limits=limits))


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights of no model may be loaded."""
    monkeypatch.setattr(base_model, "_load_weights", lambda *_: pytest.fail("the weights were loaded"))
    monkeypatch.setattr(base_model, "_loaded", {})


@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize(
    ("kind", "setting", "names", "code"),
    [
        ("llama", TARGETS, ["embed_tokens"], "embeddings"),
        ("llama", TARGETS, ["q_proj", "embed_tokens"], "embeddings"),
        ("llama", TARGETS, ["model.embed_tokens"], "embeddings"),
        ("llama", TARGETS, ["lm_head"], "embeddings"),
        ("tied", TARGETS, ["lm_head"], "embeddings"),
        ("tied", TARGETS, ["embed_tokens"], "embeddings"),
        ("bert", TARGETS, ["word_embeddings"], "embeddings"),
        ("bert", TARGETS, ["position_embeddings"], "embeddings"),
        ("llama", WHOLE, ["embed_tokens"], "not_trainable"),
        ("llama", WHOLE, ["lm_head"], "not_trainable"),
        ("llama", WHOLE, ["model"], "not_adaptable"),
        ("llama", WHOLE, ["layers"], "not_adaptable"),
        ("llama", WHOLE, ["norm"], "not_trainable"),
        ("llama", WHOLE, ["k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], "not_trainable"),
        ("llama", WHOLE, ["proj"], "no_such_module"),
        ("bert", WHOLE, ["bert"], "not_adaptable"),
        ("bert", WHOLE, ["embeddings"], "not_trainable"),
        ("bert", WHOLE, ["pooler"], "not_trainable"),
    ],
)
def test_embeddings_and_whole_modules_are_not_trained_unless_the_site_says_so(
    request: pytest.FixtureRequest, tmp_path: Path, kind: str, setting: str, names: list[str], code: str
):
    with pytest.raises((PolicyError, ConfigError)) as refused:
        site(request, tmp_path, kind).train(RoundTask(asks(kind, **{setting: names})))
    assert refused.value.code == code


def test_the_model_that_is_trained_is_looked_at_besides_the_one_made_of_its_configuration(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(worker, "check_shapes", lambda *_: None)
    for setting, name, code in ((TARGETS, "lm_head", "embeddings"), (WHOLE, "embed_tokens", "not_trainable")):
        with pytest.raises(PolicyError) as refused:
            site(request, tmp_path, "llama").train(RoundTask(asks("llama", **{setting: [name]})))
        assert refused.value.code == code


@pytest.mark.parametrize("names", [["embed_tokens"], ["q_proj", "embed_tokens"]])
def test_factors_of_an_embedding_are_refused_where_a_site_allows_them_as_no_rule_adds_them_up(
    request: pytest.FixtureRequest, tmp_path: Path, names: list[str]
):
    with pytest.raises(ConfigError) as refused:
        site(request, tmp_path, "llama", train_embeddings=True).train(RoundTask(asks("llama", **{TARGETS: names})))
    assert refused.value.code == "embedding_factors"


@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize(
    ("kind", "names"),
    [("llama", ["embed_tokens"]), ("llama", ["lm_head"]), ("tied", ["lm_head"]), ("bert", ["bert.embeddings"])],
)
def test_a_module_that_a_site_lists_is_trained_whole_but_for_an_embedding(
    request: pytest.FixtureRequest, tmp_path: Path, kind: str, names: list[str]
):
    with pytest.raises(PolicyError) as refused:
        site(request, tmp_path, kind, trainable_modules=names).train(RoundTask(asks(kind, **{WHOLE: names})))
    assert refused.value.code == "embeddings"


@pytest.mark.parametrize(
    ("kind", "peft", "limits"),
    [
        ("llama", {}, {}),
        ("tied", {}, {}),
        ("bert", {}, {}),
        ("bert", {WHOLE: ["classifier"]}, {}),  # the task's own head, which is trained anyway
        ("llama", {WHOLE: ["model.norm"]}, {"trainable_modules": ["model.norm"]}),
        ("llama", {TARGETS: ["lm_head", "q_proj"]}, {"train_embeddings": True}),
        ("bert", {WHOLE: ["bert.embeddings"]}, {"train_embeddings": True, "trainable_modules": "bert.embeddings"}),
    ],
)
def test_what_a_site_allows_is_trained(
    request: pytest.FixtureRequest, tmp_path: Path, kind: str, peft: dict[str, Any], limits: dict[str, Any]
):
    update = site(request, tmp_path, kind, **limits).train(RoundTask(asks(kind, **peft)))
    assert update.adapter
    for name in peft.get(WHOLE, []):
        assert any(f".{name}." in saved for saved in update.adapter.dense)


@pytest.mark.parametrize("method", ["ia3", "prompt_tuning", "prefix_tuning"])
def test_other_methods_train_no_embedding_by_default(llama: Path, method: str):
    _, adapter = shapes(llama, tiny.plan(peft={"method": method}))
    assert (adapter.whole, adapter.embeddings) == ((), ())
    assert adapter.dense


@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize(
    ("peft", "limits"),
    [
        ({"rank": 64}, {"max_adapter_mib": 0.2}),
        ({"method": "prefix_tuning", "num_virtual_tokens": 200}, {"max_adapter_mib": 0.01}),
        ({}, {"memory_gib": 0.0001}),
    ],
)
def test_more_memory_than_the_site_gives_is_refused_before_any_is_taken(
    request: pytest.FixtureRequest, tmp_path: Path, peft: dict[str, Any], limits: dict[str, float]
):
    plan = tiny.plan(peft={"method": "lora"} | peft)
    with pytest.raises(PolicyError) as refused:
        site(request, tmp_path, "llama", **limits).train(RoundTask(plan))
    assert refused.value.code == "above_limit"
    assert next(iter(limits)) in refused.value.message


@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize("setting", [TARGETS, WHOLE])
def test_a_module_that_is_not_there_is_answered_with_one_that_is(
    request: pytest.FixtureRequest, tmp_path: Path, setting: str
):
    with refused("no_such_module", ConfigError, '"q_proj"') as caught:
        site(request, tmp_path, "llama").train(RoundTask(asks("llama", **{setting: ["q_projj"]})))
    assert caught.value.code == "no_such_module"
    assert "q_projj" not in caught.value.message


@pytest.mark.usefixtures("unloaded")
def test_rows_and_labels_are_looked_at_before_the_weights_too(request: pytest.FixtureRequest, tmp_path: Path):
    worker = site(request, tmp_path, "bert")
    for labels, code in ((("x", "y"), "bad_rows"), ((), "too_few_labels")):
        with refused(code):
            worker.train(RoundTask(asks("bert").model_copy(update={"labels": labels})))


def test_an_embedding_that_the_weights_lack_is_not_trained_unless_the_site_says_so(bert: Path, tmp_path: Path) -> None:
    """Only the loaded weights tell: what they lack is new, and is trained as a head is."""
    folder = shutil.copytree(bert, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    lacking = {name: tensor for name, tensor in weights.items() if "token_type_embeddings" not in name}
    assert len(lacking) == len(weights) - 1
    save_file(lacking, folder / "model.safetensors", metadata={"format": "pt"})
    rows = tiny.jsonl(tmp_path / "rows.jsonl", tiny.rows("sequence_classification"))
    with pytest.raises(PolicyError) as raised:
        Worker("site-1", tiny.site(folder, rows)).train(RoundTask(asks("bert")))
    assert raised.value.code == "embeddings"
    Worker("site-1", tiny.site(folder, rows, limits={"train_embeddings": True})).train(RoundTask(asks("bert")))
