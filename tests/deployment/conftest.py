"""Three clinics and a company, provisioned and running, with models and data to refuse."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from nvflare_fm.flare.recipe import FedPEFTRecipe
from nvflare_fm.site.model.fingerprint import fingerprint
from tests.deployment.system import SITES, System, free_port, project, provision
from tests.integration.federation import ASK_OFTEN
from tests.site import tiny

SECRET = "Xanthelasma of ward Quarantine-9"  # in a row that cannot be used, and in a column nobody asks for
LABELS = ("serene", "ailing", "hearty")  # what a job calls tiny's labels
UNKNOWN = "Syringomyelia-Q95"  # a label that only the sites' own rows have
PLAN: dict[str, Any] = {
    "quantization": "nf4",
    "max_length": 48,
    "peft": {"method": "lora", "rank": 4, "lora_alpha": 8},
    "training": {"local_steps": 6, "batch_size": 8, "learning_rate": 2e-2},
    "negotiable": ["batch_size"],
    "template": "lora_instruction_tuning",
}


def rows(shift: int) -> list[dict[str, Any]]:
    return [row | {"ward": SECRET} for row in tiny.rows("causal_lm", 32, shift)] + [{"prompt": SECRET}]


def visits(shift: int) -> list[dict[str, Any]]:
    """Rows to classify, one of them with a label that no job knows."""
    names = dict(zip(tiny.LABELS, LABELS, strict=True))
    known = tiny.rows("sequence_classification", 32, shift)
    return [row | {"label": names[row["label"]], "ward": SECRET} for row in known] + [known[0] | {"label": UNKNOWN}]


def pickled(folder: Path, model: Path) -> Path:
    """A model whose weights are a pickle."""
    folder.mkdir()
    (folder / "config.json").write_text((model / "config.json").read_text())
    torch.save({"weight": torch.zeros(2)}, folder / "pytorch_model.bin")
    return folder


def said(folder: Path, name: str, models: Mapping[str, Any], shift: int) -> dict[str, Any]:
    """What a clinic's `fm_site.yaml` says."""
    data = folder / name / "data"
    data.mkdir(parents=True)
    tiny.jsonl(data / "notes.jsonl", rows(shift))
    tiny.jsonl(data / "few.jsonl", rows(shift)[:5])
    tiny.jsonl(data / "visits.jsonl", visits(shift))
    tiny.jsonl(data / "coded.jsonl", [row | {"label": f"{UNKNOWN}-{row['label']}"} for row in visits(shift)])
    tiny.jsonl(folder / name / "other.jsonl", rows(shift))
    (data / "link.jsonl").symlink_to("../other.jsonl")
    return {
        "models": models,
        "data": {file.stem: {"folder": str(data), "train": file.name} for file in data.iterdir()},
        "limits": {
            "threads": 1,
            "max_rank": 8,
            "max_batch_size": 4,
            "quantizations": ["nf4", "fp32"],
            "pinned_only": True,
        },
        "privacy": {
            "min_examples": 20,
            "min_metric_rows": 1,
            "label_statistics": ["features"],
        },  # three rows are held out
        "welcome": {"orgs": ["company"]},
    }


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="session")
def system(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Iterator[System]:
    folder, nothing = tmp_path_factory.mktemp("deployment"), "0" * 64
    models = {
        "base": {"path": str(base), "fingerprint": fingerprint(base)},
        "swapped": {"path": str(base), "fingerprint": nothing},
        "pickled": {"path": str(pickled(folder / "pickled", base)), "fingerprint": nothing},
    }
    sites = {name: said(folder, name, models, 9 * i) for i, name in enumerate(SITES)}
    running = System(provision(folder, project(free_port(), sites)))
    try:
        yield running.start(list(SITES))
    finally:
        left = running.stop()
    assert not left, f"the system did not stop by itself: {left}"


@pytest.fixture(scope="session")
def job_folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("jobs")


@pytest.fixture(scope="session")
def job(job_folders: Path) -> Callable[..., Path]:
    """Exports a job folder; `sites` says what each clinic is asked differently."""

    def export(name: str, rounds: int = 1, **more: Any) -> Path:
        recipe = FedPEFTRecipe(name, num_rounds=rounds, **(PLAN | more))
        recipe._job.to_server(ASK_OFTEN)
        recipe.export(str(job_folders))
        return job_folders / name

    return export


def edited(job: Path, file: str, edit: Callable[[Any], None], app: str = "*") -> Path:
    """The job with one of its configurations changed by hand."""
    [config] = job.glob(f"{app}/config/{file}")
    values = json.loads(config.read_text())
    edit(values)
    config.write_text(json.dumps(values))
    return job
