"""Tries out a site file before the first job: every model is hashed, every data set trained on for a few steps.

What a job would be refused for is found here, by the same code, with what to do about it.
"""

import traceback
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from ...adapter import RoundTask
from ...config import TaskPlan
from ...errors import FmError
from ...job.cost import remarks
from ..offer.site_config import FILE_NAME, SiteConfig, load_site
from .finding import Finding

STEPS = 3
_REMARKS = 5  # on labels


def checkup(file: Path, plan: TaskPlan) -> Iterator[Finding]:
    """What is found at a site, one thing after the other.

    Args:
        plan: what a job would ask: its task, labels, quantization and PEFT method are tried on every data set, with the
            plan's model.
    """
    try:
        site = load_site(file)
    except FmError as error:
        yield Finding(FILE_NAME, False, str(error))
        return
    yield Finding(FILE_NAME, True, f"{len(site.models)} models, {len(site.data)} data sets")
    remedy = f"; name submitters, orgs or both under welcome in {FILE_NAME}" if site.welcome.nobody else ""
    yield Finding("welcome", not site.welcome.nobody, f"{site.welcome}{remedy}")
    if find_spec("kernels"):
        text = "with it, bitsandbytes fetches code from the hub on some CPUs; pip uninstall kernels"
        yield Finding("package kernels", False, text)
        return
    for alias in site.models:
        yield _tried(f"model {alias}", partial(_hashed, site, alias))
    if not site.data:
        yield Finding("data", False, f"no data set is offered; add one under data in {FILE_NAME}")
    for alias in site.data:
        yield _tried(f"data {alias}", partial(_trained, site, plan.model_copy(update={"data": alias})))


def _tried(what: str, trial: Callable[[], Finding | str]) -> Finding:
    try:
        text = trial()
    except FmError as error:
        return Finding(what, False, str(error))
    except Exception as error:  # a library's own: the line that raised it is what a report of the defect needs
        at = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{type(error).__name__} at {at.filename}, line {at.lineno}: {error}"
        return Finding(what, False, f"a defect of nvflare_fm or of a library it uses; please report it: {where}")
    return text if isinstance(text, Finding) else Finding(what, True, text)


def _hashed(site: SiteConfig, alias: str) -> Finding | str:
    from ..model.base_model import locate
    from ..model.fingerprint import fingerprint

    source = site.model(alias)
    found = fingerprint(locate(source))
    if source.fingerprint == found:
        return f"holds the weights that {FILE_NAME} pins"
    if source.fingerprint:
        text = f"its fingerprint is {found}, {FILE_NAME} pins {source.fingerprint}; restore the weights or mend the pin"
        return Finding(f"model {alias}", False, text)
    return Finding(f"model {alias}", not site.limits.pinned_only, f"not pinned; to pin it, add fingerprint: {found}")


def _trained(site: SiteConfig, plan: TaskPlan) -> str:
    from ..data.rows import how_to_read
    from ..model.base_model import locate
    from ..model.shapes import shapes
    from ..worker import Worker

    training = plan.training.model_copy(update={"local_steps": STEPS})
    evaluation = {"before": False, "max_examples": max(plan.evaluation.batch_size, site.privacy.min_metric_rows)}
    trial = plan.model_copy(
        update={"training": training, "evaluation": plan.evaluation.model_copy(update=evaluation)},
    )
    counts = ("examples", "bad_rows")  # what is told here stays here, and needs no protection
    here = {"min_update_rows": 1, "counts": counts, "max_epsilon": None, "required_protection": ()}
    site = site.model_copy(update={"privacy": site.privacy.model_copy(update=here)})
    worker = Worker("this site", site)
    report, rows = worker.train(RoundTask(trial)).report, worker.rows(trial)
    bad = f", {report.bad_rows} rows that cannot be used" if report.bad_rows else ""
    source = site.data_set(plan.data)
    reading = how_to_read(Path(source.train), source, "train")
    base, _ = shapes(locate(site.model(plan.model)), plan)
    taken = [f"{rows.cut} (max_length = {plan.max_length} tokens)"] if rows.cut.rows else []
    told = "".join(
        f"; {text}" for text in [f"read as {reading}", *taken, *rows.remarks[:_REMARKS], *remarks(base, plan)]
    )
    few = "" if report.after else "; no metric would leave: the rows to measure on are fewer than min_metric_rows"
    return (
        f"{report.examples} rows to train on{bad}; {report.seconds / STEPS:.2f} s a step of "
        f"{plan.training.batch_size}, {report.peak_memory_mib:.0f} MiB at its peak, loss {report.loss:.3f}{few}{told}"
    )
