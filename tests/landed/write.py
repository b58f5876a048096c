"""Writes what a landed commit leaves behind, an adapter and a job, for later commits to read: `test_landed.py`.

    git worktree add ../landed a0b681a                      # or a newer commit
    PYTHONPATH=../landed python tests/landed/write.py       # this script, and the package of that commit
    git worktree remove ../landed

Both are overwritten, so write both or check out the one that is to stay. Only what every commit has is used here.
"""

import shutil
from pathlib import Path

import torch

from nvflare_fm.adapter import Adapter, LoraPair, Manifest
from nvflare_fm.aggregation.step import Memory
from nvflare_fm.config import RoundPlan
from nvflare_fm.export.folder import Saved, write_adapter
from nvflare_fm.flare.recipe import FedPEFTRecipe

HERE = Path(__file__).parent
LAYERS = [f"base_model.model.model.layers.{n}.self_attn.{name}_proj" for n in (0, 1) for name in ("q", "v")]
HIDDEN, RANK, HEAD = 8, 2, "base_model.model.score.weight"
PLAN = {
    "task": "sequence_classification",
    "labels": ["calm", "ill", "well"],
    "peft": {"method": "lora", "rank": RANK, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]},
    "training": {"local_steps": 3, "batch_size": 4, "learning_rate": 1e-3},
    "max_length": 48,
}


def adapter() -> Adapter:
    """A classifier's adapter of a Llama with two layers."""
    draw = torch.Generator().manual_seed(0)
    pairs = {
        layer: LoraPair(torch.randn(RANK, HIDDEN, generator=draw), torch.randn(HIDDEN, RANK, generator=draw), 2.0)
        for layer in LAYERS
    }
    return Adapter(pairs, {HEAD: torch.randn(3, HIDDEN, generator=draw)})


def main() -> None:
    for name in ("adapter", "job"):
        shutil.rmtree(HERE / name, ignore_errors=True)
    made, plan = adapter(), RoundPlan.read(PLAN, "the plan")
    manifest = Manifest("0" * 64, plan.task, "lora", labels=tuple(plan.labels))
    memory = Memory(Adapter(made.lora, {HEAD: torch.ones(3, HIDDEN)}))
    write_adapter(HERE / "adapter", Saved(made, manifest, 4, plan, {"rule": "momentum"}, memory))
    recipe = FedPEFTRecipe(
        "job",
        num_rounds=9,
        min_sites=2,
        sites={"alder": {"rank": 1}, "birch": {}},
        merge="exact",
        step="momentum",
        keep_rounds=True,
        initial_adapter=HERE / "adapter",
        resume=True,
        **PLAN,
    )
    recipe.export(str(HERE))


if __name__ == "__main__":
    main()
