"""What this package does on a GPU, in about eight minutes: a JSON line for each measurement, whatever fails on the way.

    python tests/gpu/check.py                            on a machine with a GPU, in the project's root
    python tests/gpu/check.py --tiny                     the same parts with tiny models, on a CPU
    python tests/gpu/check.py --only step1,mixed --budget 200

Models are made up: random weights in the shapes of Llama 3.2 1B and Llama 3 8B. Each part runs in a process of its own
with a time limit. results.jsonl, log.txt and the tests' report go to the folder OUT, or to runs/gpu.
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.gpu.measuring import OUT, ROOT, TINY, work


@dataclass(frozen=True)
class Part:
    """A function of a module beside this one, and the seconds it may take."""

    module: str
    seconds: int
    writes: str = ""  # it writes that model, if it is not there
    needs: str = ""


PARTS = {  # in the order of their worth
    "versions": Part("machine", 60),
    "model1": Part("offers", 60, writes="1b"),
    "step1": Part("steps", 120),
    "tests": Part("machine", 130),  # meanwhile the larger model is written
    "federation": Part("rounds", 110),
    "mixed": Part("rounds", 80),
    "step8": Part("steps", 130, needs="8b"),
    "memory": Part("memory", 120),
    "oom": Part("memory", 60),
    "methods": Part("rounds", 90),
    "merge": Part("merging", 70),
    "memory8": Part("memory", 100, needs="8b"),
    "model8": Part("offers", 120, writes="8b"),
}
_SLOWER = 6 if TINY else 1  # a CPU, even for tiny models


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--tiny", action="store_true", help="tiny models, few steps: to try the parts on a CPU")
    options.add_argument("--budget", type=float, default=480, help="seconds, after which no part is started")
    options.add_argument("--only", default="", help=f"parts, separated by commas: {', '.join(PARTS)}")
    options.add_argument("--part", choices=PARTS, help="one part, in this very process")
    given = options.parse_args()
    if given.part:
        run(given.part)
        return 0
    chosen = [name for name in given.only.split(",") if name] or [name for name in PARTS if name != "model8"]
    if unknown := set(chosen) - set(PARTS):
        options.error(f"no such part: {sorted(unknown)[0]}")
    OUT.mkdir(parents=True, exist_ok=True)
    work()
    return all_of(chosen, time.monotonic() + given.budget)


def run(name: str) -> None:
    part = PARTS[name]
    module = importlib.import_module(f"tests.gpu.{part.module}")
    if part.writes:
        module.model(part.writes)
    else:
        getattr(module, name)()


def all_of(chosen: list[str], until: float) -> int:
    """Runs the parts one after the other; 1 if one of them did not end well."""
    ended, writing = [], None
    large = [name for name in chosen if PARTS[name].needs]
    for name in chosen:
        if large and not writing and name not in ("versions", "model1", "step1"):
            writing = Child("model8")
        left = until - time.monotonic()
        if writing and PARTS[name].needs:
            ended.append(writing.wait(min(PARTS["model8"].seconds * _SLOWER, left)))
            writing, large, left = None, [], until - time.monotonic()
        if left < 10:
            emit({"part": name, "what": "left out", "why": "no time is left"})
            continue
        ended.append(Child(name).wait(min(PARTS[name].seconds * _SLOWER, left)))
    if writing:
        ended.append(writing.wait(until - time.monotonic()))
    return int(not all(ended))


class Child:
    """One part in a process of its own; its JSON lines go on to us, all it prints to the log."""

    def __init__(self, part: str) -> None:
        self.part, self.began, self.tail = part, time.monotonic(), [""]
        command = [sys.executable, __file__, "--part", part, *(["--tiny"] if TINY else [])]
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            errors="replace", env=os.environ | {"PYTHONUNBUFFERED": "1"},
        )  # fmt: skip
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def wait(self, limit_s: float) -> bool:
        """Whether it ends well, and in time."""
        try:
            rc: int | str = self.process.wait(max(1.0, limit_s))
        except subprocess.TimeoutExpired:
            rc = f"stopped after {limit_s:.0f} s"
            self._kill()
        self.reader.join(5)
        said = {"part": self.part, "what": "end", "rc": rc, "seconds": round(time.monotonic() - self.began, 1)}
        emit(said if rc == 0 else {**said, "tail": self.tail})
        return rc == 0

    def _read(self) -> None:
        assert self.process.stdout
        with (OUT / "log.txt").open("a") as log:
            for line in self.process.stdout:
                log.write(f"{self.part}: {line}")
                log.flush()
                if line.startswith('{"what": '):
                    emit({"part": self.part, **json.loads(line)})
                elif line.strip():
                    self.tail = [*self.tail[-7:], line.rstrip()[:300]]

    def _kill(self) -> None:
        import psutil

        ours = psutil.Process(self.process.pid)
        for process in [*ours.children(recursive=True), ours]:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        self.process.wait()


def emit(said: dict[str, object]) -> None:
    line = json.dumps(said)
    print(line, flush=True)
    with (OUT / "results.jsonl").open("a") as file:
        file.write(f"{line}\n")


if __name__ == "__main__":
    sys.exit(main())
