"""What a site's machine has for training: versions, devices with their driver, free disk."""

import platform
import re
import shutil
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import torch
from packaging.requirements import Requirement

from ... import __version__
from .finding import Finding

SHOWN = ("nvflare", "torch", "transformers", "peft", "bitsandbytes")
LEAST_FREE_GB = 2.0  # a job's adapters, logs and messages on disk; models are not counted
_DRIVER = Path("/proc/driver/nvidia/version")


def machine(kit: Path) -> Iterator[Finding]:
    """Check a machine's versions, device and disk.

    Args:
        kit: the folder whose disk jobs write to.
    """
    yield versions()
    yield device()
    yield disk(kit)


def versions() -> Finding:
    """Of Python and the packages that decide what a job does here, held against what this package asks for."""
    wrong = [text for need in _needs() if (text := _unmet(need))]
    if wrong:
        return Finding("versions", False, f'{"; ".join(wrong)}: run pip install "nvflare_fm[site]=={__version__}"')
    shown = [f"{name} {found}" for name in SHOWN if (found := _installed(name))]
    return Finding("versions", True, ", ".join([f"nvflare_fm {__version__}", *shown, f"Python {_python()}"]))


def device() -> Finding:
    """The devices a trainer can use. A driver that torch makes no use of is a mistake: training would take a CPU."""
    driver = _driver()
    if torch.cuda.is_available():
        found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        names = ", ".join(f"{each.name} with {each.total_memory / 2**30:.0f} GiB" for each in found)
        return Finding("device", True, f"{names}; driver {driver or 'unknown'}, CUDA {torch.version.cuda}")
    if driver:
        text = f"NVIDIA driver {driver} is here, and torch {torch.__version__} cannot use it: install a torch for CUDA"
        return Finding("device", False, f"{text}, or update the driver, if the site is to train on its GPU")
    return Finding("device", True, f"no GPU; the CPU with {torch.get_num_threads()} threads")


def disk(kit: Path) -> Finding:
    """Check the free space on the disk that jobs write to."""
    free_gb = shutil.disk_usage(kit).free / 1e9
    if free_gb < LEAST_FREE_GB:
        return Finding("disk", False, f"{free_gb:.1f} GB free in {kit}; jobs want at least {LEAST_FREE_GB:g} GB there")
    return Finding("disk", True, f"{free_gb:.1f} GB free in {kit}")


def _needs() -> list[Requirement]:
    try:
        text = metadata.requires("nvflare_fm") or []
    except metadata.PackageNotFoundError:  # a checkout on the path, not installed
        return []
    needs = [Requirement(line) for line in text]
    return [need for need in needs if need.marker is None or need.marker.evaluate({"extra": "site"})]


def _unmet(need: Requirement) -> str:
    found = _installed(need.name)
    if found is None:
        return f"{need.name} is not installed"
    return "" if need.specifier.contains(found, prereleases=True) else f"{need.name} is {found}, not {need.specifier}"


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _driver() -> str:
    """Of the kernel module, such as 550.54.15; nothing where there is none."""
    try:
        found = re.search(r"Kernel Module\D*([\d.]+)", _DRIVER.read_text())
    except OSError:
        return ""
    return found[1] if found else "unknown"


def _python() -> str:
    return platform.python_version()
