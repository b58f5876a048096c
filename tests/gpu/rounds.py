"""Whole rounds on a GPU: sites that share it, sites of unlike precision and rank, and every method on every base."""

import json
import shutil
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

from nvflare_fm.adapter import RoundTask
from nvflare_fm.config import Aggregation, SiteOverrides
from nvflare_fm.simulate import federate
from tests.gpu import offers
from tests.gpu.measuring import TINY, attempt, emptied, gpu_watched, now, say, work
from tests.site import tiny


def federation() -> None:
    """Four sites on one GPU in NVFlare's simulator: each its own trainer process, as in a real federation."""
    from nvflare_fm.flare.environments import SimEnv
    from nvflare_fm.flare.recipe import FedPEFTRecipe

    folder, names = offers.model("1b"), [f"site-{i}" for i in range(2 if TINY else 4)]
    home = work() / "federation"
    shutil.rmtree(home, ignore_errors=True)
    asked = offers.plan("nf4", 2, 512, 5)
    recipe = FedPEFTRecipe(
        "gpu", num_rounds=2, min_sites=len(names), max_length=asked.max_length, peft=dict(asked.peft),
        training={"local_steps": 5, "batch_size": 2, "learning_rate": offers.RATE},
        evaluation={"before": True, "after": True, "batch_size": 2},
    )  # fmt: skip
    sites = {name: offers.site(folder, seed, 32, 512) for seed, name in enumerate(names)}
    began = now()
    with gpu_watched() as mib, attempt("simulator"):
        recipe.run(SimEnv(sites, workspace_root=home))
    job_s = now() - began
    lines = [json.loads(line) for file in home.rglob("rounds.jsonl") for line in file.read_text().splitlines()]
    for line in lines:
        reports = line["sites"].values()
        say(
            "round", round=line["round"], round_s=line["seconds"], sites=len(reports), out=line["out"],
            bytes_down=line["bytes_down"], before=line["metrics"].get("loss"), after=line["after"].get("loss"),
            **{name: [report.get(name) for report in reports] for name in ("seconds", "peak_memory_mib", "loss")},
        )  # fmt: skip
    rounds_s = sum(line["seconds"] for line in lines)
    say("federation", sites=len(names), rounds=len(lines), job_s=job_s, rounds_s=rounds_s, gpu_in_use_mib=max(mib))


def mixed() -> None:
    """NF4 at rank 4, int8 at rank 8 and bf16 at rank 16 in one federation, in one process."""
    folder, kinds = offers.model("1b"), {"nf4": 4, "int8": 8, "fp32" if TINY else "bf16": 16}
    sites = {
        kind: offers.worker(folder, kind, SiteOverrides(quantization=kind, rank=rank), seed=seed, count=32, length=512)
        for seed, (kind, rank) in enumerate(kinds.items())
    }
    asked = offers.plan("nf4", 4, 512, 5, evaluation={"before": True, "after": True, "batch_size": 4})
    for done in federate(sites, asked, Aggregation(max_rank=offers.RANK), 2):
        for kind, report in done.reports.items():
            say(
                "site", round=done.number, kind=kind, rank=report.rank, before=report.before["loss"], loss=report.loss,
                after=report.after["loss"], step_s=report.seconds / (report.steps or 1),
                peak_mib=report.peak_memory_mib,
            )  # fmt: skip
        tensors = done.combined.adapter.tensors().values()
        say("mixed", round=done.number, finite=all(bool(t.isfinite().all()) for t in tensors))


METHODS: list[dict[str, Any]] = [
    {"method": "lora", "rank": 4},
    {"method": "lora", "rank": 4, "use_dora": True},
    {"method": "ia3"},
    {"method": "prompt_tuning"},
    {"method": "prefix_tuning"},
]
TASKS = {"causal_lm": "llama", "sequence_classification": "bert", "token_classification": "bert"}


def methods() -> None:
    """Every PEFT method, task and kind of weights on a tiny model: two rounds of three steps each, measured."""
    folders = {kind: tiny.save(work() / f"tiny-{kind}", kind) for kind in ("llama", "bert")}
    kinds = ("nf4", "fp32") if TINY else ("nf4", "fp4", "int8", "bf16", "fp16", "fp32")
    cases = list(product(METHODS, kinds, TASKS))
    good = 0
    for settings, quantization, name in cases[:: 7 if TINY else 1]:
        with attempt(f"{settings} {quantization} {name}"):
            one = tiny.worker(Path(tempfile.mkdtemp(dir=work())), folders[TASKS[name]], name)
            asked = tiny.plan(name, quantization=quantization, peft=settings)
            first = one.train(RoundTask(asked))
            second = one.train(RoundTask(asked, first.adapter, first.manifest, 1, 2))
            good += second.report.after["loss"] == second.report.after["loss"]  # a number
            continue
        emptied()  # what failed may have left its mark on the base model
    say("methods", good=good, cases=len(cases[:: 7 if TINY else 1]))
