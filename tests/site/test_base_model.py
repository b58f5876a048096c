"""Base models: what is loaded, what is refused, and that a fingerprint stands for the weights and nothing else."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForSequenceClassification, BertModel, LlamaConfig, LlamaForCausalLM

from nvflare_fm.adapter import Adapter, Manifest, RoundTask
from nvflare_fm.errors import ConfigError, ModelError
from nvflare_fm.site import peft_methods
from nvflare_fm.site.model import base_model
from nvflare_fm.site.model.base_model import BaseModel
from nvflare_fm.site.model.fingerprint import fingerprint
from nvflare_fm.site.offer.site_config import ModelSource
from nvflare_fm.site.tasks import registry as tasks
from nvflare_fm.site.worker import Worker
from tests.codes import refused
from tests.site import tiny


def load(folder: Path, task: str = "causal_lm", pin: str = "", **more: Any) -> BaseModel:
    return base_model.load(ModelSource(path=str(folder), fingerprint=pin), tiny.plan(task, **more), tasks[task])


@pytest.fixture
def copy(llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama, tmp_path / "another-name"))


def edit(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_a_fingerprint_does_not_see_names_shards_or_who_saved_it(llama: Path, copy: Path) -> None:
    edit(copy, transformers_version="0.0", _name_or_path="elsewhere", use_cache=False)
    assert fingerprint(copy) == fingerprint(llama)
    shard(copy)
    assert fingerprint(copy) == fingerprint(llama)
    load(copy)


def shard(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    parts = {f"shard-{i}.safetensors": sorted(weights)[i::2] for i in range(2)}
    for file, names in parts.items():
        save_file({n: weights[n] for n in names}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, names in parts.items() for name in names}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_weights_that_are_not_loaded_do_not_count(llama: Path, copy: Path) -> None:
    weights = load_file(copy / "model.safetensors")
    save_file({n: 2 * w for n, w in weights.items()}, copy / "consolidated.safetensors")
    assert fingerprint(copy) == fingerprint(llama)
    shard(copy)
    assert fingerprint(copy) == fingerprint(llama)
    other = load_file(copy / "shard-1.safetensors")
    save_file({n: 2 * w for n, w in other.items()}, copy / "shard-1.safetensors", metadata={"format": "pt"})
    assert fingerprint(copy) != fingerprint(llama)


@pytest.mark.parametrize("name", ["../other.safetensors", "shard.bin", "/tmp/x.safetensors", 3])
def test_an_index_leads_nowhere_else(copy: Path, name: Any) -> None:
    (copy / "model.safetensors").unlink()
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ModelError) as raised:
        fingerprint(copy)
    assert raised.value.code == "index_unusable"


def test_weights_that_a_configuration_points_to_are_not_hashed_in_place_of_others(copy: Path) -> None:
    shutil.copy(copy / "model.safetensors", copy / "other.safetensors")
    edit(copy, transformers_weights="other.safetensors")
    with pytest.raises(ModelError) as raised:
        fingerprint(copy)
    assert raised.value.code == "weights_elsewhere"


OLD = {"transformers_version": "4.46.0", "torch_dtype": "float32", "dtype": None, "tokenizer_class": "AutoTokenizer"}
OLD_LLAMA = OLD | {  # as transformers 4 writes it
    "rope_parameters": None, "rope_theta": 10000.0, "rope_scaling": None, "pretraining_tp": 1, "head_dim": 16,
    "attention_bias": False, "mlp_bias": False, "temperature": 0.6, "eos_token_id": [2, 3], "pad_token_id": None,
}  # fmt: skip
OLD_BERT = OLD | {"position_embedding_type": "absolute", "gradient_checkpointing": False, "finetuning_task": None}


@pytest.mark.parametrize(("kind", "old"), [("llama", OLD_LLAMA), ("bert", OLD_BERT)])
def test_a_configuration_counts_as_it_is_read(tmp_path: Path, kind: str, old: dict[str, Any]) -> None:
    new = tiny.save(tmp_path / "new", kind)
    copied = shutil.copytree(new, tmp_path / "old")
    values = {**json.loads((copied / "config.json").read_text()), **old}
    (copied / "config.json").write_text(json.dumps({k: v for k, v in values.items() if v is not None}))
    assert fingerprint(copied) == fingerprint(new)
    edit(copied, layer_norm_eps=1e-3, rope_theta=5000.0)
    assert fingerprint(copied) != fingerprint(new)


def test_a_setting_that_is_left_out_counts_as_its_default(llama: Path, copy: Path) -> None:
    values = json.loads((copy / "config.json").read_text())
    for key in ("hidden_act", "attention_bias", "mlp_bias", "rms_norm_eps", "rope_parameters"):
        values.pop(key)
    (copy / "config.json").write_text(json.dumps(values))
    assert fingerprint(copy) == fingerprint(llama)


def test_a_release_of_transformers_that_knows_more_settings_gives_the_same_fingerprint(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, to_dict = fingerprint(llama), LlamaConfig.to_dict
    monkeypatch.setattr(LlamaConfig, "to_dict", lambda self: to_dict(self) | {"new": 3, "rope_parameters": {"new": 1}})
    assert fingerprint(llama) == before


def test_tied_weights_count_once_whether_they_are_stored_twice_or_under_the_other_name(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "tied", tie_word_embeddings=True)
    before, weights = fingerprint(folder), load_file(folder / "model.safetensors")
    embedding = weights["model.embed_tokens.weight"]
    assert "lm_head.weight" not in weights
    save_file(weights | {"lm_head.weight": embedding.clone()}, folder / "model.safetensors", metadata={"format": "pt"})
    assert fingerprint(folder) == before
    del weights["model.embed_tokens.weight"]
    save_file(weights | {"lm_head.weight": embedding}, folder / "model.safetensors", metadata={"format": "pt"})
    assert fingerprint(folder) == before
    both = {"lm_head.weight": embedding + 1, "model.embed_tokens.weight": embedding}  # which transformers does not tie
    save_file(weights | both, folder / "model.safetensors", metadata={"format": "pt"})
    assert fingerprint(folder) != before


@pytest.mark.parametrize(
    ("kind", "name"),
    [("llama", "model.layers.0.self_attn.rotary_emb.inv_freq"), ("bert", "bert.embeddings.position_ids"),
     ("bert", "embeddings.position_ids")],
)  # fmt: skip
def test_what_a_model_works_out_itself_does_not_count_where_it_was_stored(tmp_path: Path, kind: str, name: str) -> None:
    folder = tiny.save(tmp_path, kind)
    before, weights = fingerprint(folder), load_file(folder / "model.safetensors")
    save_file(weights | {name: torch.arange(4)}, folder / "model.safetensors", metadata={"format": "pt"})
    assert fingerprint(folder) == before
    save_file(weights | {"something.else": torch.arange(4)}, folder / "model.safetensors", metadata={"format": "pt"})
    assert fingerprint(folder) != before


def test_a_copy_in_another_type_is_another_model(llama: Path, copy: Path) -> None:
    weights = load_file(copy / "model.safetensors")
    save_file({n: w.bfloat16() for n, w in weights.items()}, copy / "model.safetensors", metadata={"format": "pt"})
    assert fingerprint(copy) != fingerprint(llama)


def test_a_fingerprint_sees_one_weight_and_one_setting(llama: Path, copy: Path) -> None:
    weights = load_file(copy / "model.safetensors")
    first = sorted(weights)[0]
    weights[first].view(-1)[0] += 1e-3
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    changed = fingerprint(copy)
    edit(copy, rms_norm_eps=1e-3)
    assert len({fingerprint(llama), changed, fingerprint(copy)}) == 3


def test_two_names_that_swap_their_tensors_are_another_model(llama: Path, copy: Path) -> None:
    weights = load_file(copy / "model.safetensors")
    up, gate = (f"model.layers.0.mlp.{name}_proj.weight" for name in ("up", "gate"))
    weights[up], weights[gate] = weights[gate], weights[up]
    save_file(weights, copy / "model.safetensors")
    assert fingerprint(llama) != fingerprint(copy)


def test_pickled_weights_are_refused(llama: Path, copy: Path) -> None:
    torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    stopped(copy, "no_safetensors")


def test_an_adapter_a_quantized_model_and_an_empty_folder_are_refused(copy: Path, tmp_path: Path) -> None:
    (copy / "adapter_config.json").write_text("{}")
    stopped(copy, "model_is_adapter")
    (copy / "adapter_config.json").unlink()
    edit(copy, quantization_config={"quant_method": "bitsandbytes"})
    stopped(copy, "model_is_quantized")
    stopped(tmp_path / "nothing", "no_config")


def test_code_that_comes_with_a_model_is_not_run(copy: Path) -> None:
    edit(copy, model_type="homemade", auto_map={"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"})
    (copy / "code.py").write_text("raise SystemExit('remote code ran')")
    stopped(copy, "config_unreadable")


def test_half_a_weights_file_is_refused(copy: Path) -> None:
    whole = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with refused("weights_damaged", ModelError):
        fingerprint(copy)
    with pytest.raises(ModelError):
        load(copy)


def stopped(folder: Path, code: str) -> None:
    with refused(code, ModelError) as caught:
        load(folder)
    assert str(folder) not in caught.value.message


@pytest.mark.parametrize("whose", ["site", "plan"])
def test_a_pin_that_does_not_match_is_refused_by_name(llama: Path, whose: str) -> None:
    pins = {"pin": "0" * 64} if whose == "site" else {"fingerprint": "0" * 64}
    with refused("not_the_pinned_weights", ModelError) as caught:
        load(llama, **pins)
    assert fingerprint(llama) in caught.value.message
    assert f"the {whose} " in caught.value.message
    assert "0000" not in caught.value.message
    load(llama, pin=fingerprint(llama), fingerprint=fingerprint(llama))


def test_a_federation_on_another_base_is_refused_by_name(llama: Path, tmp_path: Path) -> None:
    task = RoundTask(tiny.plan(), Adapter(), Manifest("1" * 64, "causal_lm", "lora"))
    with refused("other_base", ModelError) as caught:
        tiny.worker(tmp_path, llama, "causal_lm").train(task)
    assert caught.value.message.startswith("site-1: ")
    assert "1111" in caught.value.local
    assert "1111" not in caught.value.message


def test_sites_in_one_process_share_one_copy(llama: Path) -> None:
    assert load(llama) is load(llama)
    assert load(llama) is not load(llama, quantization="nf4")


def test_the_head_stays_out_of_quantization_and_the_backbone_does_not(bert: Path) -> None:
    base = load(bert, "sequence_classification", quantization="nf4")
    assert base.heads == ("classifier",)
    assert type(base.model.classifier) is torch.nn.Linear
    assert isinstance(base.model.bert.encoder.layer[0].attention.self.query, Linear4bit)


def start(model: Path, **more: Any) -> Adapter:
    plan = tiny.plan("sequence_classification", **more)
    base = load(model, "sequence_classification", **more)
    method = peft_methods.attachment_of(plan.peft)
    with base.lent():
        return method.extract(method.attach(base, Adapter(), plan))


def test_a_fresh_head_is_made_from_the_seed_alone(bert: Path, copy: Path, tmp_path: Path) -> None:
    name = "base_model.model.classifier.weight"
    torch.manual_seed(1)
    first = start(bert).dense[name]
    base_model._loaded.clear()
    torch.manual_seed(2)
    assert torch.equal(first, start(bert).dense[name])
    assert torch.equal(first, start(bert, quantization="nf4").dense[name])
    assert not torch.equal(first, start(bert, seed=5).dense[name])


def classifier(folder: Path, labels: int) -> BertForSequenceClassification:
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 96}
    model = BertForSequenceClassification(BertConfig(vocab_size=320, num_labels=labels, **sizes))
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return model


def test_a_head_that_came_with_the_checkpoint_keeps_its_weights(tmp_path: Path) -> None:
    model = classifier(tmp_path, labels=len(tiny.LABELS))
    kept = start(tmp_path, quantization="nf4").dense["base_model.model.classifier.weight"]
    assert torch.equal(kept, model.classifier.weight)


def test_a_head_for_other_labels_is_made_anew(tmp_path: Path) -> None:
    classifier(tmp_path, labels=7)
    assert start(tmp_path).dense["base_model.model.classifier.weight"].shape == (3, 64)


def test_a_layer_the_checkpoint_lacks_is_trained_like_the_head(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 96}
    BertModel(BertConfig(vocab_size=320, **sizes), add_pooling_layer=False).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    base = load(tmp_path, "sequence_classification", quantization="nf4")
    assert base.heads == ("bert.pooler.dense", "classifier")
    assert "base_model.model.bert.pooler.dense.weight" in start(tmp_path, quantization="nf4").dense


def allowing(folder: Path, model: Path, task: str, **limits: Any) -> Worker:
    """A site that lets jobs train more than others do."""
    rows = tiny.jsonl(folder / f"{task}.jsonl", tiny.rows(task))
    return Worker("site-1", tiny.site(model, rows, limits=limits))


def test_an_embedding_can_be_trained_whole_where_the_site_says_so_twice(llama: Path, tmp_path: Path) -> None:
    plan = tiny.plan(peft={"method": "lora", "rank": 2, "modules_to_save": ["embed_tokens"]}, quantization="nf4")
    worker = allowing(tmp_path, llama, "causal_lm", trainable_modules=["embed_tokens"], train_embeddings=True)
    update = worker.train(RoundTask(plan))
    assert "base_model.model.model.embed_tokens.weight" in update.adapter.dense


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_what_lies_inside_a_module_that_is_trained_whole_is_not_quantized(
    bert: Path, tmp_path: Path, quantization: str
) -> None:
    peft = {"method": "lora", "rank": 2, "modules_to_save": ["pooler"]}
    plan = tiny.plan("sequence_classification", peft=peft, quantization=quantization)
    update = allowing(tmp_path, bert, "sequence_classification", trainable_modules="pooler").train(RoundTask(plan))
    assert "base_model.model.bert.pooler.dense.weight" in update.adapter.dense
    assert not [layer for layer in update.adapter.lora if "pooler" in layer]


@pytest.mark.parametrize("quantization", ["nf4", "fp4", "int8", "bf16", "fp32"])
@pytest.mark.parametrize("task", ["causal_lm", "sequence_classification", "token_classification"])
def test_every_kind_of_weights_trains_on_a_cpu(
    bert: Path, llama: Path, tmp_path: Path, quantization: str, task: str
) -> None:
    model = llama if task == "causal_lm" else bert
    plan = tiny.plan(task, quantization=quantization, training={"local_steps": 8, "batch_size": 12})
    report = tiny.worker(tmp_path, model, task).train(RoundTask(plan)).report
    assert report.after["loss"] < report.before["loss"]
    assert report.quantization == quantization


@pytest.mark.cpu
def test_fp16_without_a_gpu_is_refused(llama: Path) -> None:
    with refused("needs_gpu", ConfigError, "fp16"):
        load(llama, quantization="fp16")


@pytest.mark.cpu
def test_a_small_model_computes_in_fp32_on_a_cpu(llama: Path) -> None:
    assert load(llama, quantization="nf4").compute_dtype == torch.float32


@pytest.mark.parametrize(("has_bf16", "dtype"), [(True, torch.bfloat16), (False, torch.float16)])
def test_a_gpu_computes_in_bf16_where_it_has_that_and_else_in_fp16(
    monkeypatch: pytest.MonkeyPatch, has_bf16: bool, dtype: torch.dtype
) -> None:
    """A T4 emulates bf16 and is slow in it; torch's answers stand in for the card."""
    monkeypatch.setattr(base_model, "device", lambda: torch.device("cuda", 0))
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: has_bf16 or including_emulation
    )
    assert base_model.compute_dtype("auto", "nf4", 64) == dtype
    assert base_model.compute_dtype("fp16", "nf4", 64) == torch.float16


def test_a_model_without_its_own_padding_pads_with_its_end(llama: Path, copy: Path) -> None:
    file = copy / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    settings.pop("pad_token")
    file.write_text(json.dumps(settings))
    tokenizer = base_model.load_tokenizer(copy)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    assert load(copy).model.config.pad_token_id == tokenizer.eos_token_id


def test_a_source_names_exactly_one_place(llama: Path) -> None:
    for source in (ModelSource(), ModelSource(path=str(llama), hub_id="a/b")):
        with refused("model_source", ConfigError, "path", "hub_id"):
            base_model.locate(source)
    with refused("no_revision", ConfigError, "revision"):
        base_model.locate(ModelSource(hub_id="a/b"))


def test_llama_is_what_it_was_before_anyone_trained_on_it(llama: Path) -> None:
    fresh, shared = LlamaForCausalLM.from_pretrained(llama).state_dict(), load(llama).model.state_dict()
    assert all(torch.equal(fresh[n], shared[n].cpu()) for n in fresh)
