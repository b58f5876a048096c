"""What the parts share: where they work, the clock and the memory of the device, and a JSON line for a measurement."""

import contextlib
import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
OUT = Path(os.environ.get("OUT") or ROOT / "runs" / "gpu")
TINY = "--tiny" in sys.argv
GIB = 2**30


def work() -> Path:
    """The folder of models and rows: where there is most room, for the larger model takes 16 GB. Kept between runs."""
    (ROOT / "runs").mkdir(exist_ok=True)
    places = [place for place in (tempfile.gettempdir(), str(ROOT / "runs")) if os.access(place, os.W_OK)]
    roomiest = max(places, key=lambda place: shutil.disk_usage(place).free)
    folder = Path(os.environ.setdefault("GPU_WORK", f"{roomiest}/nvflare-fm-gpu"))  # for our children too
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def say(what: str, **values: Any) -> None:
    """A measurement, for `check.py` to pass on."""
    rounded = {key: float(f"{value:.5g}") if isinstance(value, float) else value for key, value in values.items()}
    print(json.dumps({"what": what, **rounded}, default=str), flush=True)


@contextlib.contextmanager
def attempt(what: str) -> Iterator[None]:
    """One measurement; the others go on without it, and what it failed with is said."""
    try:
        yield
    except Exception as error:
        traceback.print_exc()
        say("failed", which=what, error=told(error), where=where(error))


def told(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error)[:300]}"


def where(error: BaseException) -> str:
    """The last line of this package that an error came through."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "nvflare_fm/" in f.filename]
    return f"{frames[-1].filename.rpartition('nvflare_fm/')[2]}:{frames[-1].lineno}" if frames else ""


def on_gpu() -> bool:
    return torch.cuda.is_available()


def now() -> float:
    """The clock, when the device has done all that it was asked."""
    if on_gpu():
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds(job: Callable[[], Any]) -> float:
    began = now()
    job()
    return now() - began


def allocated() -> int:
    return torch.cuda.memory_allocated() if on_gpu() else 0


def emptied() -> None:
    """Nothing is on the device that a part does not put there."""
    from nvflare_fm.site.model import base_model

    base_model._loaded.clear()
    gc.collect()
    if on_gpu():
        torch.cuda.empty_cache()


@contextlib.contextmanager
def gpu_watched() -> Iterator[list[int]]:
    """The MiB in use on the whole GPU, by all processes, once a second."""
    seen, over = [0], threading.Event()
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]

    def watch() -> None:
        while shutil.which("nvidia-smi") and not over.wait(1):
            done = subprocess.run(query, capture_output=True, text=True)
            if done.returncode == 0:
                seen.extend(int(line) for line in done.stdout.split())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield seen
    finally:
        over.set()
        watcher.join()
