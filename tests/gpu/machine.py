"""The machine: versions, whether bitsandbytes computes on it, and this suite's tests of a site."""

import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from xml.etree import ElementTree

import torch

from tests.gpu.measuring import GIB, OUT, ROOT, TINY, attempt, now, on_gpu, say

PACKAGES = [
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "bitsandbytes",
    "nvflare",
    "datasets",
    "numpy",
    "safetensors",
    "tokenizers",
    "triton",
]


def versions() -> None:
    say("versions", python=sys.version.split()[0], **{name: installed(name) for name in PACKAGES})
    say(
        "machine", gpu=torch.cuda.get_device_name() if on_gpu() else "none", cuda=torch.version.cuda,
        capability=torch.cuda.get_device_capability() if on_gpu() else None, cpus=len(os.sched_getaffinity(0)),
        memory_gib=torch.cuda.get_device_properties(0).total_memory / GIB if on_gpu() else None,
    )  # fmt: skip
    with attempt("bitsandbytes"):
        bitsandbytes()


def installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "missing"


def bitsandbytes() -> None:
    """How far its products are from exact ones: about 0.09 in NF4, 0.01 in int8."""
    from bitsandbytes import functional
    from bitsandbytes.nn import Int8Params, Linear8bitLt

    device = "cuda" if on_gpu() else "cpu"
    weight, x = torch.randn(256, 512, device=device), torch.randn(4, 512, device=device)
    packed, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    nf4 = functional.dequantize_4bit(packed, state)
    layer = Linear8bitLt(512, 256, bias=False, has_fp16_weights=False)
    layer.weight = Int8Params(weight.cpu(), requires_grad=False, has_fp16_weights=False)
    int8, exact = layer.to(device)(x.to(torch.float16 if on_gpu() else torch.float32)).float(), x @ weight.T
    say("bitsandbytes", nf4_off=float((nf4 - weight).norm() / weight.norm()),
        int8_off=float((int8 - exact).norm() / exact.norm()))  # fmt: skip


def tests() -> None:
    """The suite's tests of a site. What fails: where, in our code or in the test's own."""
    OUT.mkdir(parents=True, exist_ok=True)
    report = OUT / "tests.xml"
    chosen = ["tests/site/test_layerwise.py", "tests/site/test_confine.py"] if TINY else ["tests/site"]
    options = ["-q", "-p", "no:cacheprovider", "--tb=short", "--timeout=60", "-n", "2" if TINY else "8"]
    command = [sys.executable, "-m", "pytest", *chosen, *options, "--session-timeout=105", f"--junitxml={report}"]
    began = now()
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(done.stdout)
    say("tests", rc=done.returncode, seconds=now() - began, last=(done.stdout.splitlines() or [""])[-1])
    for case in ElementTree.parse(report).iter("testcase"):
        for bad in (*case.findall("failure"), *case.findall("error")):
            lines = (bad.text or "").splitlines()
            frames = [line.partition(": in ")[0] for line in lines if line.startswith(("tests/", "nvflare_fm/"))]
            errors = [line[1:].strip() for line in lines if line.startswith("E ")]
            name = f"{str(case.get('classname')).replace('.', '/')}::{case.get('name')}"
            say("failed", which=name, where=frames[-1:], error=(errors or [str(bad.get("message"))])[0][:200])
