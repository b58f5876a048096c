"""Real federations of tiny NF4 models in NVFlare's simulator, watched from outside while they run."""

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from nvflare_fm.flare.environments import SimEnv
from nvflare_fm.flare.recipe import FedPEFTRecipe
from nvflare_fm.site.offer.site_config import SiteConfig
from tests.site import tiny

PLAN: dict[str, Any] = {
    "quantization": "nf4",
    "max_length": 48,
    "peft": {"method": "lora", "rank": 4, "lora_alpha": 8},
    "training": {"local_steps": 4, "batch_size": 4, "learning_rate": 1e-2},
}
ASK_OFTEN = {"server": {"task_request_interval": 0.3}}  # NVFlare's clients otherwise rest for 2 s after each answer


def offers(folder: Path, model: Path, names: list[str]) -> dict[str, SiteConfig]:
    """A site for each name, with rows of its own."""
    files = {n: tiny.jsonl(folder / f"{n}.jsonl", tiny.rows("causal_lm", shift=9 * i)) for i, n in enumerate(names)}
    return {name: tiny.site(model, file, limits={"threads": 1}) for name, file in files.items()}


class Federation:
    """One job in the simulator, and what can be seen of it on this machine."""

    def __init__(self, recipe: FedPEFTRecipe, sites: dict[str, SiteConfig], workspace: Path) -> None:
        self.recipe, self.env, self.root = recipe, SimEnv(sites, workspace), workspace / recipe.name
        recipe._job.to_server(ASK_OFTEN)
        self.server = self.root / "server" / "simulate_job"
        self.error: Exception | None = None

    def run(self) -> "Federation":
        try:
            self.recipe.run(self.env)
        except RuntimeError as error:  # the simulation failed
            self.error = error
        return self

    @contextmanager
    def running(self) -> Iterator["Federation"]:
        thread = threading.Thread(target=self.run)
        thread.start()
        try:
            yield self
        except BaseException:  # what was waited for did not happen: nobody waits for the rounds that are left
            self.end()
            raise
        finally:
            thread.join()

    def end(self) -> None:
        for process in psutil.process_iter(["cmdline"]):
            if any(str(self.root) in word for word in process.info["cmdline"] or []):
                process.kill()

    def rounds(self) -> list[dict[str, Any]]:
        file = self.server / "rounds.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def log(self, site: str) -> str:
        file = self.root / site / "log.txt"
        return file.read_text() if file.exists() else ""

    def trainers(self, site: str) -> list[psutil.Process]:
        mark = str(self.root / site / "local")
        found = []
        for process in psutil.process_iter():
            try:
                line = process.cmdline()
            except psutil.Error:
                continue
            if "nvflare_fm.flare.trainer" in line and any(mark in part for part in line):
                found.append(process)
        return found

    def until(self, what: Callable[[], Any], within_s: float) -> float:
        """Waits until `what` holds; returns how long it took."""
        started = time.monotonic()
        while not what():
            assert time.monotonic() - started < within_s, f"did not happen within {within_s} s: {self.error}"
            time.sleep(0.05)
        return time.monotonic() - started


def kill(process: psutil.Process) -> None:
    os.kill(process.pid, signal.SIGKILL)
