"""What NVFlare and this package add to a training step: one site through the simulator against plain PEFT.

    python tests/benchmarks/overhead.py --repeats 3

The same base model (stories260k in NF4), rows, batch size and steps, in turn in fresh processes: the federation, plain
PEFT under transformers' Trainer, the federation, … The step is compared alone; what a round and a job cost besides is
named apart.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import typer

from nvflare_fm.compare import data_sets

STEPS, ROUNDS, BATCH, LENGTH, RATE = 60, 4, 8, 256, 5e-3


def federated(rows: Path, work: Path) -> dict[str, float]:
    """Medians over the rounds of one job."""
    from nvflare_fm.flare.environments import SimEnv
    from nvflare_fm.flare.recipe import FedPEFTRecipe

    recipe = FedPEFTRecipe(
        "overhead",
        num_rounds=ROUNDS,
        key_metric="",
        max_length=LENGTH,
        peft={"method": "lora", "rank": 8},
        training={"local_steps": STEPS, "batch_size": BATCH, "learning_rate": RATE},
        evaluation={"before": False, "after": False},
    )
    site = {
        "models": {"base": {"path": str(data_sets.stories260k())}},
        "data": {"notes": {"train": str(rows)}},
        "limits": {"threads": 1},
    }
    started = time.time()
    recipe.run(SimEnv({"site-1": site}, workspace_root=work))
    job = time.time() - started
    (ledger,) = work.rglob("rounds.jsonl")
    rounds = [json.loads(line) for line in ledger.read_text().splitlines()]
    walls = [r["seconds"] for r in rounds]
    trained = [r["sites"]["site-1"]["seconds"] for r in rounds]
    return {
        "step": statistics.median(s / STEPS for s in trained[1:]),
        "round besides steps": statistics.median(w - s for w, s in zip(walls[1:], trained[1:], strict=True)),
        "first round besides steps": walls[0] - trained[0],
        "job besides rounds": job - sum(walls),
    }


def plain(rows: Path) -> dict[str, float]:
    """The same steps as anyone would write them: Trainer over get_peft_model over a 4-bit model."""
    import torch
    from datasets import load_dataset
    from peft import LoraConfig, get_peft_model
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        BitsAndBytesConfig,
        DataCollatorForSeq2Seq,
        Trainer,
        TrainingArguments,
    )

    torch.set_num_threads(1)
    folder = data_sets.stories260k()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=nf4)
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))

    def encode(row: dict[str, str]) -> dict[str, list[int]]:
        prompt = tokenizer(row["prompt"])["input_ids"]
        ids = (prompt + tokenizer(row["completion"], add_special_tokens=False)["input_ids"])[:LENGTH]
        return {"input_ids": ids, "labels": ([-100] * len(prompt) + ids[len(prompt) :])[:LENGTH]}

    data = load_dataset("json", data_files=str(rows), split="train")
    arguments = TrainingArguments(
        output_dir=tempfile.gettempdir(),
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        use_cpu=True,
        dataloader_pin_memory=False,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=data.map(encode, remove_columns=data.column_names),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
    )
    blocks = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        trainer.train()
        blocks.append((time.perf_counter() - started) / STEPS)
    return {"step": statistics.median(blocks[1:])}


def main(repeats: int = 3, part: str = "", rows: Path = Path(), work: Path = Path()) -> None:
    if part:
        print(json.dumps(federated(rows, work) if part == "federated" else plain(rows)))
        return
    with tempfile.TemporaryDirectory() as folder:
        rows = data_sets.write("medquad-lm", Path(folder) / "data") / "niddk" / "train.jsonl"
        found: dict[str, list[dict[str, float]]] = {"federated": [], "plain": []}
        for repeat in range(repeats):
            for part, results in found.items():
                command = [sys.executable, __file__, "--part", part, "--rows", str(rows)]
                command += ["--work", f"{folder}/{repeat}"]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                results.append(json.loads(done.stdout.splitlines()[-1]))
                print(part, {k: round(v, 4) for k, v in results[-1].items()}, flush=True)
    ratios = [f["step"] / p["step"] for f, p in zip(found["federated"], found["plain"], strict=True)]
    print(f"time per step, federated over plain: median {statistics.median(ratios):.3f}, each {ratios}")
    for name in found["federated"][0]:
        print(f"{name}: {statistics.median(f[name] for f in found['federated']):.3f} s")


if __name__ == "__main__":
    typer.run(main)
