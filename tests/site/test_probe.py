"""What cannot work with a base model is refused when it is loaded, in words, and never in the middle of training."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BertConfig, Gemma3TextConfig, LlamaModel, RobertaConfig

from nvflare_fm.adapter import RoundTask
from nvflare_fm.errors import ConfigError, ModelError
from nvflare_fm.site import base_model
from nvflare_fm.site.checkup import checkup
from nvflare_fm.site.site_config import ModelSource
from nvflare_fm.site.tasks import registry as tasks
from tests.site import tiny, zoo

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
LOOKING_AHEAD: dict[str, Callable[[int], Any]] = {
    "bert": lambda n: BertConfig(vocab_size=n, **SIZES),  # with the small weights that models are made with
    "roberta": lambda n: RobertaConfig(vocab_size=n, **SIZES, initializer_range=0.2),
    "gemma3": lambda n: Gemma3TextConfig(
        vocab_size=n, **SIZES, num_key_value_heads=2, head_dim=8, use_bidirectional_attention=True
    ),
}


def code(folder: Path, task: str = "causal_lm", **more: Any) -> str:
    """Of the error that loading ends with."""
    with pytest.raises(ModelError) as raised:
        base_model.load(ModelSource(path=str(folder)), tiny.plan(task, **more), tasks[task])
    assert str(folder) not in raised.value.message
    return raised.value.code


@pytest.mark.parametrize("quantization", ["fp32", "bf16", "nf4", "int8"])
@pytest.mark.parametrize("kind", LOOKING_AHEAD)
def test_a_model_that_looks_ahead_is_no_causal_language_model(tmp_path: Path, kind: str, quantization: str) -> None:
    torch.manual_seed(0)
    words = tiny.tokenizer()
    config = LOOKING_AHEAD[kind](len(words))
    if quantization == "int8":  # whose own noise is more than small weights make of a token
        config.initializer_range = 0.2
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    assert code(tmp_path, quantization=quantization) == "looks_ahead"


def test_a_language_model_without_its_head_is_refused(bert: Path, tmp_path: Path) -> None:
    assert code(bert) == "no_language_model_head"
    config = AutoModelForCausalLM.from_pretrained(tiny.save(tmp_path / "whole")).config
    LlamaModel(config).save_pretrained(tmp_path / "bare")
    tiny.tokenizer().save_pretrained(tmp_path / "bare")
    assert code(tmp_path / "bare") == "no_language_model_head"


@pytest.mark.parametrize(("family", "task"), [("distilbert", "causal_lm"), ("gemma3", "token_classification")])
def test_a_task_that_transformers_has_no_head_for_is_named(tmp_path: Path, family: str, task: str) -> None:
    assert code(zoo.save(tmp_path, family), task) == "no_such_head"


@pytest.fixture(scope="module")
def offered(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return cache(lambda family: zoo.save(tmp_path_factory.mktemp(family), family))


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_each_method_trains_a_family_or_says_why_not(
    offered: Callable[[str], Path], tmp_path: Path, family: str
) -> None:
    task, refused = zoo.tasks(family)[-1], {}
    for method in ("ia3", "prompt_tuning", "prefix_tuning"):
        training, quiet = {"local_steps": 1, "batch_size": 2}, {"before": False, "after": False}
        plan = tiny.plan(task, peft={"method": method}, training=training, evaluation=quiet)
        try:
            tiny.worker(tmp_path, offered(family), task).train(RoundTask(plan))
        except ConfigError as error:
            refused[method] = error.message
    assert all("PEFT" in said for said in refused.values())
    assert len(refused) < 3 or family in ("distilbert", "modernbert")


def test_a_checkup_with_the_default_task_on_an_encoder_says_what_to_do(bert: Path, tmp_path: Path) -> None:
    file = tiny.jsonl(tmp_path / "rows.jsonl", tiny.rows("causal_lm"))
    site = tmp_path / "fm_site.yaml"
    site.write_text(f"models: {{base: {{path: {bert}}}}}\ndata: {{notes: {{train: {file}}}}}\n")
    found = [finding for finding in checkup(site, tiny.plan(quantization="nf4")) if finding.what.startswith("data")]
    assert [finding.good for finding in found] == [False]
    assert "classification" in found[0].said
