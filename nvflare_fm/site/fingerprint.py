"""The identity of a base model: a digest of what it computes, however it is named and sharded."""

import hashlib
import json
import mmap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ..errors import ModelError
from ..files import open_file, read_object
from .mean_pooling import means_tokens

# What may differ between two copies of one model: who saved it, in which type it is loaded, how it is labelled.
_INCIDENTAL = {
    "_name_or_path", "architectures", "dtype", "torch_dtype", "id2label", "label2id", "num_labels", "problem_type",
    "transformers_version", "use_cache",
}  # fmt: skip


def fingerprint(folder: Path) -> str:
    """SHA-256 over the meaningful part of config.json and each tensor's name, type, shape and bytes, in name order.

    Raises:
        ModelError: config.json cannot be read, or a weights file is not a whole safetensors file.
    """
    config = model_config(folder)
    digest = hashlib.sha256(json.dumps(_meaningful(config), sort_keys=True).encode())
    if means_tokens(folder):
        digest.update(b"mean over tokens\n")  # its classifiers read something else than those of the same weights
    with ThreadPoolExecutor() as pool:  # hashlib lets other threads run
        files = list(pool.map(_tensor_digests, sorted(folder.glob("*.safetensors"))))
    for line in sorted(line for lines in files for line in lines):
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


def _meaningful(config: Any) -> Any:
    if not isinstance(config, dict):
        return config
    return {k: _meaningful(v) for k, v in config.items() if k not in _INCIDENTAL and v is not None}


def _tensor_digests(file: Path) -> list[str]:
    """One line a tensor. The file's layout: 8 bytes of header length, a JSON header, the tensors' bytes."""
    try:
        with open_file(file) as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
            data = 8 + int.from_bytes(content[:8], "little")
            if data > len(content):
                raise ValueError("its header ends beyond the file")
            header = json.loads(content[8:data])
            header.pop("__metadata__", None)
            return [_line(content, data, name, tensor) for name, tensor in header.items()]
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
