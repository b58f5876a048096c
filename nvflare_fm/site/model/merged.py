"""A base model with an adapter merged into it, as a folder that transformers loads: in 16 bits, never into fewer.

An update is smaller than the steps of 4 bits: at 1 % of the weights' norm, at most 1.4 % of it survives in NF4.
"""

import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.utils import get_peft_model_state_dict
from transformers import AutoConfig

from ...adapter import Adapter, Manifest
from ...config import RoundPlan
from ...errors import ConfigError, ModelError
from ..offer.site_config import ModelSource
from ..tasks import registry as tasks
from ..worker import quiet
from .base_model import load_tokenizer, locate
from .fingerprint import fingerprint

_TOKENIZER = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.jinja",
)
_NOTHING_TO_MERGE = ("prompt_tuning", "prefix_tuning")


def merge(folder: Path, base: Path, adapter: Adapter, manifest: Manifest, out: Path) -> None:
    """Write the merged model, its tokenizer and its labels into an empty folder.

    Args:
        folder: of the adapter, as PEFT loads it.
        base: folder of the base model it was trained on.
        adapter, manifest: what the adapter's folder holds.
        out: exists and is empty.
    Raises:
        ConfigError: the PEFT method adds no change to the weights, or the adapter is a half.
        ModelError: the base model is another one, or quantized, or the adapter does not fit it.
    """
    if manifest.peft in _NOTHING_TO_MERGE:
        raise ConfigError(f"{manifest.peft} changes no weights: export it without --merge", code="changes_no_weights")
    if not adapter.lora and any(".lora_A." in name for name in adapter.dense):
        raise ConfigError(
            "this adapter holds the factors that all sites share; the other ones are each site's own: merge the site's "
            "own_adapter instead",
            code="half_an_adapter",
        )
    quiet()
    check_base(base, manifest)
    bare = _bare(base, manifest)
    try:
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # of missing keys: see `_check_whole`
            model = PeftModel.from_pretrained(bare, str(folder))
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError("the adapter does not fit this base model", str(error)[:300], code="adapter_misfit") from None
    _check_whole(model, adapter)
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # of heads no longer tied: PEFT unties them
        merged = model.merge_and_unload(safe_merge=True).to(bare.dtype)
    merged.save_pretrained(out)
    for file in (file for pattern in _TOKENIZER for file in base.glob(pattern) if file.is_file()):
        shutil.copyfile(file, out / file.name)  # as they are: read and written again, they may make other tokens


def check_base(base: Path, manifest: Manifest) -> None:
    """Check that a folder holds the base model that an adapter was trained on.

    Raises:
        ModelError: it holds another one, or none.
    """
    found = fingerprint(locate(ModelSource(path=str(base))))
    if found != manifest.base:
        raise ModelError(
            "this is not the base model that the adapter was trained on: its fingerprint is another",
            f"{base}: {found}, the adapter: {manifest.base}",
            code="other_base",
        )


def _bare(folder: Path, manifest: Manifest) -> Any:
    """The base model in 16 bits, with a head for the adapter's labels that the adapter's own will replace."""
    task = tasks[manifest.task]
    plan = RoundPlan.read({"task": manifest.task, "labels": manifest.labels}, "the adapter's provenance")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        for name, value in task.model_config(plan).items():
            setattr(config, name, value)
        if not task.promises.learns_text and config.pad_token_id is None:
            config.pad_token_id = load_tokenizer(folder).pad_token_id  # where a text ends, which its class reads
        return task.model_class(folder).from_pretrained(
            folder,
            config=config,
            dtype=torch.float16 if config.dtype == torch.float16 else torch.bfloat16,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            ignore_mismatched_sizes=True,
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError("the base model cannot be loaded", f"{folder}: {error}", code="base_unreadable") from None


def _check_whole(model: PeftModel, adapter: Adapter) -> None:
    """Whether every tensor of the adapter has found its place: where the names differ, PEFT only warns."""
    placed = get_peft_model_state_dict(model, save_embedding_layers=False)
    for name, tensor in adapter.tensors().items():
        found = placed.get(name)
        if found is None or found.shape != tensor.shape or not torch.equal(found, tensor.to(found)):
            raise ModelError(
                f"the adapter does not fit this base model: {name!r} has no place there", code="adapter_misfit"
            )
