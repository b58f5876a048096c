"""What a machine has is found, and a package, driver or disk that will not do is said with the remedy."""

from collections import namedtuple
from importlib import metadata
from pathlib import Path

import pytest

from nvflare_fm.site.check import machine

Usage = namedtuple("Usage", "total used free")


def test_versions_that_this_package_asks_for_are_fine_and_others_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.versions().good
    real = metadata.version

    def older(name: str) -> str:
        if name == "bitsandbytes":
            raise metadata.PackageNotFoundError(name)
        return "0.1.0" if name == "peft" else real(name)

    monkeypatch.setattr(machine.metadata, "version", older)
    found = machine.versions()
    assert not found.good
    assert "peft is 0.1.0, not " in found.text
    assert "bitsandbytes is not installed" in found.text
    assert "pip install" in found.text


def test_a_driver_that_torch_cannot_use_is_a_mistake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(machine, "_DRIVER", tmp_path / "version")
    assert machine.device().good
    (tmp_path / "version").write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar 5\n")
    found = machine.device()
    assert not found.good
    assert "550.54.15" in found.text
    assert "install a torch for CUDA" in found.text


def test_a_disk_that_is_nearly_full_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda _: Usage(10**12, 10**12, 5 * 10**8))
    found = machine.disk(tmp_path)
    assert not found.good
    assert found.text.startswith("0.5 GB free")
