"""The identity of a base model: a digest of what it computes, however it is named, sharded and written down.

The configuration counts as transformers reads it, a tensor only if transformers loads it. A tensor's type counts:
a copy that was rounded is another model.
"""

import hashlib
import inspect
import json
import mmap
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel

from ...errors import ModelError
from ...files import open_file, read_object
from ..mean_pooling import means_tokens

# What may differ between two copies of one model: who saved it, in which type it is loaded, how it is labelled, which
# token ends a text, and settings that only training or generation by others reads.
_INCIDENTAL = {
    "_name_or_path", "architectures", "auto_map", "bos_token_id", "dtype", "eos_token_id", "finetuning_task",
    "gradient_checkpointing", "id2label", "label2id", "num_labels", "problem_type", "task_specific_params",
    "tokenizer_class", "torch_dtype", "transformers_version", "use_cache",
}  # fmt: skip
_UNSAID = {"position_embedding_type": "absolute"}  # transformers 4 writes it, 5 knows nothing else
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def fingerprint(folder: Path) -> str:
    """SHA-256 over the meaningful part of the configuration and each tensor's name, type, shape and bytes, by name.

    Raises:
        ModelError: transformers cannot read the configuration, or a weights file is not a whole safetensors file.
    """
    config = read_config(folder)
    if getattr(config, "transformers_weights", None):
        raise ModelError(
            f"the base model's config.json names a weights file of its own; call it {WEIGHTS} and take the setting out",
            str(folder),
            code="weights_elsewhere",
        )
    digest = hashlib.sha256(json.dumps(_meaningful(config), sort_keys=True).encode())
    if means_tokens(folder):
        digest.update(b"mean over tokens\n")  # its classifiers read something else than those of the same weights
    named = _names(config)
    with ThreadPoolExecutor() as pool:  # hashlib lets other threads run
        files = list(pool.map(lambda file: _tensor_digests(file, named), weight_files(folder)))
    for line in sorted({line for lines in files for line in lines}):
        digest.update(line.encode())
    return digest.hexdigest()


def model_config(folder: Path) -> dict[str, Any]:
    """Read a base model's `config.json`.

    Raises:
        ModelError: it is missing, or no JSON object.
    """
    try:
        return read_object(folder / "config.json")
    except (OSError, ValueError) as error:
        raise ModelError(
            "the base model's config.json cannot be read; fetch the model again",
            f"{folder}: {error}",
            code="model_config_unreadable",
        ) from None


def read_config(folder: Path) -> Any:
    """A base model's configuration, with what its file leaves out.

    Raises:
        ModelError: transformers cannot read it without code that comes with the model.
    """
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError, TypeError, AttributeError) as error:
        raise ModelError(
            "the base model's config.json cannot be read; is it a model that transformers knows without remote code?",
            f"{folder}: {error}",
            code="config_unreadable",
        ) from None


def weight_files(folder: Path) -> list[Path]:
    """The files that transformers loads: one, or those of an index; others in the folder do not count.

    Raises:
        ModelError: the index cannot be read, or names a file that does not lie beside it.
    """
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        return sorted(folder.glob("*.safetensors"))  # loading will fail, with transformers' own reason
    try:
        names = sorted(set(read_object(folder / INDEX)["weight_map"].values()))
        if not all(Path(name).name == name and name.endswith(".safetensors") for name in names):
            raise ValueError("a name of a file that does not lie beside it")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"the base model's {INDEX} cannot be used; fetch the model again",
            f"{folder}: {error}",
            code="index_unusable",
        ) from None
    return [folder / name for name in names]


def _meaningful(config: Any) -> dict[str, Any]:
    """What differs from the defaults of its class: releases of transformers that know more settings agree then."""
    try:
        defaults = type(config)().to_dict()
    except (ValueError, TypeError, AttributeError, KeyError):  # it has none as a whole
        defaults = {}
    ignored = {"pad_token_id"} if defaults.get("pad_token_id") is None else set()  # the tokenizer's replaces it
    values = _different(config.to_dict(), defaults)
    return {"model_type": config.model_type, **{k: v for k, v in values.items() if k not in ignored}}


def _different(values: Any, defaults: Any) -> Any:
    if not (isinstance(values, dict) and isinstance(defaults, dict)):
        return values
    return {
        key: _different(value, defaults.get(key))
        for key, value in ((str(k), v) for k, v in values.items())
        if key not in _INCIDENTAL and value is not None and value not in (defaults.get(key), _UNSAID.get(key))
    }


def _names(config: Any) -> Callable[[str], str | None]:
    """How a stored tensor is called, or nothing where transformers does not load it. Tied ones are called alike, and
    are one if they are equal. All this the model's class tells; without one, each tensor counts.
    """
    try:
        with torch.device("meta"):
            model = _bare(config)
    except (ValueError, TypeError, AttributeError, KeyError, ImportError):
        return lambda name: name
    tied = dict(model.all_tied_weights_keys)
    computed = {name for name, _ in model.named_buffers()}  # those that are not stored
    patterns = [*(model._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq"]
    stored, prefix = set(model.state_dict()), f"{model.base_model_prefix}."

    def name_of(name: str) -> str | None:
        beside = {name, f"{prefix}{name}", name.removeprefix(prefix)}
        if beside & stored:
            return tied.get(name, name)
        return None if beside & computed or any(re.search(pattern, name) for pattern in patterns) else name

    return name_of


def _bare(config: Any) -> PreTrainedModel:
    """A model of the class that saved it, where that is one of transformers' own, or as like it as is known."""
    named = [getattr(transformers, str(name), None) for name in config.architectures or ()]
    own: list[Any] = [kind for kind in named if inspect.isclass(kind) and issubclass(kind, PreTrainedModel)]
    for kind in own:
        if kind.config_class is type(config):
            return kind._from_config(config)
    kind = AutoModelForCausalLM if type(config) in AutoModelForCausalLM._model_mapping else AutoModel
    return kind.from_config(config, trust_remote_code=False)


def _tensor_digests(file: Path, named: Callable[[str], str | None]) -> list[str]:
    """One line a tensor. The file's layout: 8 bytes of header length, a JSON header, the tensors' bytes."""
    try:
        with open_file(file) as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
            data = 8 + int.from_bytes(content[:8], "little")
            if data > len(content):
                raise ValueError("its header ends beyond the file")
            header = json.loads(content[8:data])
            header.pop("__metadata__", None)
            called = {name: named(name) for name in header}
            return [_line(content, data, own, header[name]) for name, own in called.items() if own is not None]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(
            "a weights file of the base model is not a whole safetensors file; fetch it again",
            f"{file}: {error}",
            code="weights_damaged",
        ) from None


def _line(content: mmap.mmap, data: int, name: str, tensor: dict[str, Any]) -> str:
    start, end = tensor["data_offsets"]
    if not 0 <= start <= end <= len(content) - data:
        raise ValueError(f"{name} lies beyond the file")
    with memoryview(content) as view, view[data + start : data + end] as values:
        return f"{name} {tensor['dtype']} {tensor['shape']} {hashlib.sha256(values).hexdigest()}\n"
