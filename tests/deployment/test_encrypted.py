"""A job whose server adds what it cannot read, on provisioned sites with the contexts of NVFlare's HEBuilder."""

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from nvflare_fm.export.folder import read_adapter
from nvflare_fm.record.result import read_result
from nvflare_fm.site.model.own_adapter import GLOBAL
from tests.deployment.system import BIN, ENVIRONMENT, SERVER, SITES, System

pytestmark = pytest.mark.timeout(300)
SMALL = "clinic-b"  # trains at a lower rank than the others
ENCRYPTED: dict[str, Any] = {"uplink": ["ckks"], "merge": "freeze_a"}


@pytest.fixture(scope="session")
def encrypted(system: System, job: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A finished job's id, and what was downloaded of it."""
    submitted = system.submit(
        job("encrypted", 2, sites={n: {"rank": 2} if n == SMALL else {} for n in SITES}, **ENCRYPTED)
    )
    system.wait_for(lambda: system.ended(submitted), 200, "the encrypted job to end")
    return submitted, system.download(submitted, tmp_path_factory.mktemp("encrypted"))


def test_every_site_ends_with_the_same_adapter_that_beats_the_base(
    encrypted: tuple[str, Path], system: System, base: Path
) -> None:
    submitted, result = encrypted
    assert system.ended(submitted) == "FINISHED:COMPLETED"
    rounds = read_result(result).rounds
    assert [sorted(line.sites) for line in rounds if line.trained] == [sorted(SITES)] * 2
    assert all(site.bytes_up > 0 for line in rounds if line.trained for site in line.sites.values())
    found = {site: read_adapter(system.kits / site / submitted / GLOBAL) for site in SITES}
    one = found["clinic-a"].adapter
    assert {saved.round for saved in found.values()} == {1}
    assert all(pair.rank == 4 for pair in one.lora.values())
    for other in found.values():
        assert all(torch.equal(one.tensors()[name], tensor) for name, tensor in other.adapter.tensors().items())
    measured = [line.measured["loss"] for line in rounds]
    assert measured[-1] < measured[0]


def test_the_server_neither_stores_nor_sends_a_tensor_that_it_can_read(
    encrypted: tuple[str, Path], system: System
) -> None:
    submitted, result = encrypted
    server = system.kits / SERVER
    stored = [file for place in (server, result, system.kits.parent / "store") for file in place.rglob("*")]
    tensors = [
        file for file in stored if file.suffix == ".safetensors" and (submitted in file.parts or result in file.parents)
    ]
    assert tensors
    assert {tensor.dtype for file in tensors for tensor in load_file(file).values()} == {torch.uint8}
    adapter = read_adapter(system.kits / "clinic-a" / submitted / GLOBAL).adapter
    readable = (system.kits / "clinic-a" / submitted / GLOBAL / "adapter_model.safetensors").read_bytes()
    secret = [pair.B.contiguous().numpy().tobytes()[:64] for pair in adapter.lora.values()]
    assert all(part in readable for part in secret)  # so it is found where it is
    for file in stored:
        if file.is_file():
            content = file.read_bytes()
            assert not [part for part in secret if part in content], file
    for name in (SERVER, *SITES):
        assert not [part for part in secret for message in system.sent(name) if part in message]


def test_a_site_decrypts_what_the_server_kept(encrypted: tuple[str, Path], system: System, tmp_path: Path) -> None:
    submitted, result = encrypted
    command = [BIN / "nvflare-fm", "decrypt", result / "adapters" / "last", "-o", tmp_path / "mine"]
    done = subprocess.run(
        [*command, "--kit", system.kits / SMALL], env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    mine = read_adapter(tmp_path / "mine")
    theirs = read_adapter(system.kits / "clinic-a" / submitted / GLOBAL)
    assert (mine.manifest, mine.round) == (theirs.manifest, theirs.round)
    assert all(torch.equal(theirs.adapter.tensors()[name], tensor) for name, tensor in mine.adapter.tensors().items())
    refused = subprocess.run(
        [*command[:-1], tmp_path / "other", "--kit", system.kits / SERVER],
        env=ENVIRONMENT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert refused.returncode == 1
    assert "no_context" in refused.stderr
