"""Builds our components with whatever a job could say, under Python's audit hook: `python -m tests.flare.watched`.

In a process of its own, because a hook cannot be taken out again. Prints what was seen, as JSON.
"""

import inspect
import json
import logging
import os
import sys
import sysconfig
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_context import FLContext, FLContextManager
from nvflare.apis.workspace import Workspace
from nvflare.app_common.workflows.cross_site_model_eval import CrossSiteModelEval

from nvflare_fm.config import Aggregation, RoundPlan, SiteOverrides
from nvflare_fm.errors import FmError
from nvflare_fm.flare import components
from nvflare_fm.flare.aggregator import AdapterAggregator
from nvflare_fm.flare.executor import TRAINER, PeftExecutor
from nvflare_fm.flare.locator import AdapterLocator, Measurement
from nvflare_fm.flare.persistor import AdapterPersistor
from nvflare_fm.flare.rounds import Rounds
from nvflare_fm.flare.votes import SyntheticVotes
from tests import conftest  # noqa: F401  Hypothesis' profile

CODE = [sysconfig.get_paths()[name] for name in ("stdlib", "purelib", "platlib")] + [str(Path(__file__).parents[2])]
STARTS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "pty.spawn")
CHANGES = (
    *("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "os.chown"),
    *("os.utime", "os.putenv", "os.unsetenv", "shutil.", "os.listxattr", "os.setxattr", "tempfile.", "os.kill"),
)
REACHES = (
    "socket.",
    "urllib.",
    "http.",
    "ftplib.",
    "smtplib.",
    "ctypes.dlopen",
    "os.listdir",
    "os.scandir",
    "glob.glob",
)


class Watch:
    """What Python does in a block, but for reading its own code and what lies in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.on, self.seen = str(folder), False, set[str]()
        sys.addaudithook(self._hook)

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event == "open":
            path, _, flags = args
            writes = bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC))
            self._note(event, path, writes)
        elif event.startswith((*STARTS, *CHANGES, *REACHES)):
            self._note(event, args[0] if args else "", not event.startswith(("os.listdir", "os.scandir")))

    def _note(self, event: str, what: Any, writes: bool) -> None:
        if isinstance(what, int):  # a folder that is open
            what = f"/proc/self/fd/{what}"
        path = os.fsdecode(os.path.realpath(what)) if isinstance(what, str | bytes | os.PathLike) else str(what)
        ours = path.startswith(self.folder) or (not writes and path.startswith(tuple(CODE)))
        if not ours or event.startswith(STARTS):
            self.seen.add(f"{event} {path}")

    def of(self, action: Callable[[], Any]) -> Any:
        self.on = True
        try:
            return action()
        finally:
            self.on = False


def hostile(canary: str) -> dict[type, tuple[Any, ...]]:
    """What someone could write where a value of a type should be."""
    texts = (
        *(canary, "/etc/passwd", "../../canary", "~/.ssh/id_rsa", f"file://{canary}", "http://127.0.0.1:9/x", "a/b"),
        *(f"touch {canary}", f"$(touch {canary})", "; rm -rf /", "--help", "-c", "${secret:HOME}", "{$HOME}", ".."),
        *("${secret:file:/etc/passwd}", "\x00", "\n", "\x1b[2J", "x" * 100_000, "é", "subprocess.Popen", ""),
        *("exact", "svd", "loss", "adam", "min", "max", "B", "nf4", "lora", "prefix_tuning", "causal_lm", "adapter"),
    )
    parts = (
        {"path": "subprocess.Popen", "args": {"args": ["touch", canary]}},
        {"path": components.SERVER[2], "args": {"initial_adapter": canary}},
        {"method": "lora", "rank": 10**9, "target_modules": canary},
        {"batch_size": 10**9, "optim": canary},
        {"local_steps": 2, "batch_size": 2},
        {"method": "lora", "rank": 4},
        {"rule": "loss", "q": 2},
        {"rule": "svd", "path": canary},
    )
    others = (None, b"x", ["sh", "-c", f"touch {canary}"], ["uniform"], object(), FLComponent(), [[[[[[[]]]]]]])
    integers = (0, 1, 2, 3, 8, -1, 10**9, 10**30, -(10**30), 10**4000)
    floats = (0.5, 1.0, 60.0, 1e30, 1e308, -1e308, float("inf"), float("nan"))
    return {int: integers, float: floats, bool: (True, False), str: texts, dict: parts, object: others}


def args_of(kind: type, pool: dict[type, tuple[Any, ...]]) -> st.SearchStrategy[dict[str, Any]]:
    """Some arguments hostile, half of them of the right type; the others left as they are."""
    anything = st.sampled_from([value for values in pool.values() for value in values])
    settings = {
        **RoundPlan.model_fields,
        **Measurement.model_fields,
        **Aggregation.model_fields,
        **SiteOverrides.model_fields,
        "x": None,
    }
    mapping = st.dictionaries(st.sampled_from(sorted(settings)), anything, max_size=2)
    fitting = {
        name: st.one_of(
            [mapping] * ("Mapping" in str(parameter.annotation))
            + [st.sampled_from(values) for of, values in pool.items() if of.__name__ in str(parameter.annotation)]
            + [anything]
        )
        for name, parameter in inspect.signature(kind).parameters.items()
    }
    return st.fixed_dictionaries({}, optional=fitting)


def use(component: Any, workspace: Workspace) -> None:
    """What a job then has the component do that could touch a file or start a process."""
    context = job_context(workspace)
    if isinstance(component, AdapterPersistor):
        component.load_model(context)
        component.get_model_inventory(context)
    elif isinstance(component, PeftExecutor):
        command = component._argv("/site/fm_site.yaml", "/site/job", "/site/app")
        several = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={component.processes}"]
        fixed = [sys.executable, *several * (component.processes > 1), "-m", TRAINER, "--site-file"]
        assert command[: len(fixed)] == fixed, command
        assert command[len(fixed) :] == [
            "/site/fm_site.yaml",
            "--job-folder",
            "/site/job",
            "--config-folder",
            "/site/app",
        ]
    elif isinstance(component, CrossSiteModelEval):
        component._engine = context.get_engine()
        component.start_controller(context)
    elif not isinstance(component, Rounds | AdapterAggregator | AdapterLocator):
        component.handle_event(EventType.START_RUN, context)
        component.handle_event(EventType.END_RUN, context)


def needed(kind: type) -> dict[str, Any]:
    """Arguments without which a component cannot be built."""
    needs: dict[str, Any] = {"model_locator_id": "locator", "events_to_convert": ["analytix_log_stats"]}
    if kind is SyntheticVotes:
        needs["plan"] = {"privacy": {"epsilon": 1.0}}
    return {name: needs[name] for name in inspect.signature(kind).parameters if name in needs}


def job_context(workspace: Workspace) -> FLContext:
    """As a component of a job sees it, as far as files go."""
    engine = SimpleNamespace(
        get_workspace=lambda: workspace, get_clients=list, get_component=lambda _: None, fire_event=lambda *_: None
    )
    return FLContextManager(engine, "clinic", "job").new_context()


def main() -> None:
    logging.disable()
    root = Path(tempfile.mkdtemp())
    folder = root / "kit"
    (folder / "startup").mkdir(parents=True)
    (folder / "local").mkdir()
    (folder / "job" / "app_clinic" / "config").mkdir(parents=True)
    (root / "canary").write_text("secret")
    workspace = Workspace(str(folder), "clinic")
    theirs = (*components.NVFLARE_SERVER, *components.NVFLARE_SITE)
    kinds = {name: components.load(name) for name in (*components.OURS, *theirs)}
    for kind in kinds.values():  # imports what it imports late
        use(kind(**needed(kind)), workspace)
    watch, outcomes, wrong = Watch(folder), Counter[str](), set[str]()

    pool = hostile(str(root / "canary"))

    @given(st.sampled_from(sorted(kinds)).flatmap(lambda name: st.tuples(st.just(name), args_of(kinds[name], pool))))
    def build(case: tuple[str, dict[str, Any]]) -> None:
        name, args = case
        args = needed(kinds[name]) | args
        try:
            watch.of(lambda: use(kinds[name](**args), workspace))
            outcomes[f"built {name.rpartition('.')[2]}"] += 1
        except FmError:
            outcomes["refused"] += 1
        except Exception as error:
            if name in theirs:
                return
            wrong.add(f"{name.rpartition('.')[2]}({str(args)[:200]}): {type(error).__name__}: {str(error)[:200]}")

    build()
    seen = sorted(watch.seen)
    watch.seen.clear()
    watch.of(lambda: (root / "canary").read_text())
    watch.of(lambda: (root / "made").mkdir())
    watch.of(lambda: os.system("true"))
    planted = sorted(watch.seen)
    print(json.dumps({"outcomes": outcomes, "wrong": sorted(wrong), "seen": seen, "planted": planted}))


if __name__ == "__main__":
    main()
