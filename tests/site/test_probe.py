"""What cannot work with a base model is refused when it is loaded, in words, and never in the middle of training."""

import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    Gemma3Config,
    Gemma3TextConfig,
    GPTJConfig,
    LlamaModel,
    MixtralConfig,
    MptConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    RobertaConfig,
    SiglipVisionConfig,
)

from nvflare_fm.adapter import RoundTask
from nvflare_fm.config import Aggregation
from nvflare_fm.errors import ConfigError, ModelError
from nvflare_fm.job.cost import remarks
from nvflare_fm.job.settle import settle
from nvflare_fm.simulate import federate
from nvflare_fm.site.check.checkup import checkup
from nvflare_fm.site.check.probe import positions, unreached
from nvflare_fm.site.model import base_model
from nvflare_fm.site.model.shapes import shapes
from nvflare_fm.site.offer.site_config import ModelSource
from nvflare_fm.site.tasks import registry as tasks
from nvflare_fm.site.worker import Worker
from tests.codes import refused
from tests.site import tiny, words, zoo

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
    tokenizer = tiny.tokenizer()
    config = LOOKING_AHEAD[kind](len(tokenizer))
    if quantization == "int8":  # whose own noise is more than small weights make of a token
        config.initializer_range = 0.2
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
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
        peft = {"method": method} | ({} if method == "ia3" else {"num_virtual_tokens": 4})
        plan = tiny.plan(task, peft=peft, training=training, evaluation=quiet)
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
    assert [finding.good for finding in found] == [False], found
    assert "classification" in found[0].text


MORE = {
    "opt": lambda n: OPTConfig(vocab_size=n, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=64, **SIZES),
    "gptj": lambda n: GPTJConfig(vocab_size=n, n_embd=32, n_layer=2, n_head=4, n_positions=64, rotary_dim=8),
    "mpt": lambda n: MptConfig(vocab_size=n, d_model=32, n_heads=4, n_layers=2, max_seq_len=64),
}
TABLES = {"gpt2": 64, "bert": 64, "distilbert": 64, "roberta": 64, "deberta": 64, "opt": 64, "gptj": 64, "mpt": 64}


@pytest.mark.parametrize("family", sorted(zoo.FAMILIES | MORE))
def test_as_long_a_text_comes_through_as_there_are_positions_and_no_longer_one(family: str) -> None:
    config = (zoo.FAMILIES | MORE)[family](320)
    model = AutoModel.from_config(config).eval()
    rows = positions(model)
    assert rows == TABLES.get(family)
    with torch.inference_mode():
        model(input_ids=torch.full((1, rows or 70), 5))
        if rows:
            with pytest.raises((IndexError, RuntimeError, ValueError)):
                model(input_ids=torch.full((1, rows + 1), 5))


@pytest.mark.parametrize("method", ["lora", "prompt_tuning", "prefix_tuning"])
@pytest.mark.parametrize("family", ["gpt2", "roberta"])
def test_texts_too_long_for_a_model_are_refused_by_its_configuration_alone(
    offered: Callable[[str], Path], tmp_path: Path, family: str, method: str
) -> None:
    shutil.copy(offered(family) / "config.json", tmp_path)
    virtual = {"num_virtual_tokens": 10} if method != "lora" else {}
    task, longest = zoo.tasks(family)[-1], 64 - virtual.get("num_virtual_tokens", 0)
    peft = {"method": method, **virtual}
    shapes(tmp_path, tiny.plan(task, max_length=longest, peft=peft))
    with refused("too_long", ConfigError, "max_length", longest) as raised:
        shapes(tmp_path, tiny.plan(task, max_length=longest + 1, peft=peft))
    assert raised.value.code == "too_long"
    if virtual:  # the longest row that is allowed is trained on
        row = {"tokens": ["word"] * 99, "labels": ["ill"] * 99}
        file = str(tiny.jsonl(tmp_path / "rows.jsonl", [row] * 3))
        site = tiny.site(offered(family), Path(file), data={"notes": {"train": file, "validation": file}})
        plan = tiny.plan(task, max_length=longest, peft=peft, training={"local_steps": 1}, quantization="fp32")
        Worker("site-1", site).train(RoundTask(plan))


def test_texts_longer_than_a_model_was_trained_for_are_told_of(offered: Callable[[str], Path]) -> None:
    plan = tiny.plan(max_length=100, quantization="nf4")
    quantized, length = remarks(shapes(offered("qwen3"), plan)[0], plan)
    assert "trained for texts of 64 tokens" in length
    assert "not quantized" in quantized
    assert "experts" not in quantized
    assert remarks(shapes(offered("qwen3"), tiny.plan(max_length=64))[0], tiny.plan(max_length=64)) == []


def given(folder: Path, tokenizer: PreTrainedTokenizerFast, kind: str = "llama", **sizes: Any) -> Path:
    """A model with another tokenizer."""
    tiny.save(folder, kind, **sizes)
    (folder / "special_tokens_map.json").unlink(missing_ok=True)
    tokenizer.save_pretrained(folder)
    return folder


def bare(**tokens: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=words.byte_level(size=320), **tokens)


@pytest.mark.parametrize(
    ("tokens", "task", "expected"),
    [
        ({}, "causal_lm", "no_padding_token"),
        ({"unk_token": "<unk>"}, "causal_lm", "no_end_token"),
        ({"pad_token": "[PAD]", "eos_token": "</s>"}, "causal_lm", "ids_without_rows"),
        ({"pad_token": "<pad>", "eos_token": "[END]"}, "causal_lm", "ids_without_rows"),
        ({"bos_token": "<s>"}, "sequence_classification", "no_padding_token"),
    ],
)
def test_a_tokenizer_whose_tokens_the_model_lacks_is_refused(
    tmp_path: Path, tokens: dict[str, str], task: str, expected: str
) -> None:
    assert code(given(tmp_path, bare(**tokens)), task) == expected


def test_a_row_with_a_token_that_the_model_lacks_is_a_bad_row(tmp_path: Path) -> None:
    tokenizer = bare(pad_token="<pad>", eos_token="</s>")
    tokenizer.add_tokens(["qqxx"])
    folder = given(tmp_path / "model", tokenizer)
    lines = [{"text": f"he took {what}"} for what in ("something", "qqxx", "water", "nothing")]
    file = tiny.jsonl(tmp_path / "rows.jsonl", lines)
    source = {"notes": {"train": str(file), "max_bad_rows": 0.5}}
    worker = Worker("site-1", tiny.site(folder, file, data=source))
    plan = tiny.plan(training={"local_steps": 1, "batch_size": 1})
    assert worker.train(RoundTask(plan)).report.bad_rows == 1


def test_padding_that_positions_are_counted_from_is_the_models(tmp_path: Path) -> None:
    config = RobertaConfig(vocab_size=320, **SIZES, max_position_embeddings=66, pad_token_id=1)
    AutoModel.from_config(config).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)  # which pads with 0
    assert base_model.load_tokenizer(tmp_path).pad_token_id == 1
    task = "token_classification"
    base = base_model.load(ModelSource(path=str(tmp_path)), tiny.plan(task), tasks[task])
    assert base.model.config.pad_token_id == 1
    assert positions(base.model) == 64


def test_weights_of_another_shape_or_name_are_not_made_up(llama: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(llama, tmp_path / "model"))
    weights = load_file(folder / "model.safetensors")
    longer = torch.cat([weights["model.embed_tokens.weight"]] * 2)
    save_file(weights | {"model.embed_tokens.weight": longer}, folder / "model.safetensors", metadata={"format": "pt"})
    assert code(folder) == "weights_do_not_fit"
    renamed = {name.replace("model.", "net."): tensor for name, tensor in weights.items()}
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    assert code(folder) == "weights_do_not_fit"
    assert code(folder, "sequence_classification") == "weights_do_not_fit"


class Expert(nn.Module):
    """A layer that sends each text through the first of its experts, and has one for images."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
        self.sees, self.device = nn.Linear(2, 2), torch.device("cpu")

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.experts[0](input_ids[..., None].float().expand(-1, -1, 2))


def test_an_expert_that_a_short_text_does_not_meet_counts_as_the_others_do() -> None:
    assert unreached(Expert()) == {"sees", "experts"}


def seeing() -> Gemma3Config:
    """A model for images and texts."""
    text = Gemma3TextConfig(vocab_size=320, head_dim=8, num_key_value_heads=2, **SIZES, pad_token_id=0)
    tower = SiglipVisionConfig(**SIZES, image_size=28, patch_size=14)
    ids = {"image_token_index": 300, "boi_token_index": 301, "eoi_token_index": 302}
    return Gemma3Config(
        text_config=text.to_dict(), vision_config=tower.to_dict(), mm_tokens_per_image=4, initializer_range=0.1, **ids
    )


def made(folder: Path, config: Any) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "out_proj"]])
@pytest.mark.parametrize("task", ["causal_lm", "sequence_classification"])
def test_only_what_a_text_goes_through_is_adapted(tmp_path: Path, task: str, targets: Any) -> None:
    folder = made(tmp_path / "model", seeing())
    peft = {"method": "lora", "rank": 2, "target_modules": targets}
    plan = tiny.plan(task, peft=peft, quantization="nf4", training={"local_steps": 2, "learning_rate": 1e-2})
    worker = tiny.worker(tmp_path, folder, task)
    first, second = federate({"site-1": worker}, plan, Aggregation(), 2)
    assert first.combined.adapter.lora
    assert all(pair.B.any() for pair in first.updates[0].adapter.lora.values()), "every layer moves"
    assert not [name for name in second.combined.adapter.tensors() if "vision" in name]
    told = shapes(folder, settle(plan, Aggregation()).plan)[1]
    assert told.layers.keys() == first.combined.adapter.lora.keys()


EXPERTS = {"num_experts_per_tok": 2, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 320, **SIZES}
MIXTURES = {
    "mixtral": lambda: MixtralConfig(num_local_experts=4, **EXPERTS),
    "qwen3": lambda: Qwen3MoeConfig(num_experts=4, moe_intermediate_size=16, **EXPERTS),
}


@pytest.mark.parametrize("kind", MIXTURES)
def test_experts_are_not_left_out_without_a_word(tmp_path: Path, kind: str) -> None:
    folder = made(tmp_path / "model", MIXTURES[kind]())
    worker = tiny.worker(tmp_path, folder, "causal_lm")
    with pytest.raises(ConfigError) as raised:
        worker.train(RoundTask(tiny.plan(quantization="nf4")))
    assert raised.value.code == "experts_not_adapted"
    assert "mlp.experts" in raised.value.message
    peft = {"method": "lora", "rank": 2, "target_modules": ["q_proj", "v_proj"]}
    plan = tiny.plan(quantization="nf4", peft=peft)
    (said,) = remarks(shapes(folder, plan)[0], plan)
    assert "experts" in said
    update = worker.train(RoundTask(plan))
    assert {layer.rpartition(".")[2] for layer in update.adapter.lora} == {"q_proj", "v_proj"}
