"""VeRA: vectors alone travel, and the matrices that they scale are the same at all sites and wherever loaded."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from nvflare_fm.adapter import Adapter, RoundTask
from nvflare_fm.config import Aggregation
from nvflare_fm.export.folder import Saved, write_adapter
from nvflare_fm.simulate import federate
from nvflare_fm.site.model import base_model
from nvflare_fm.site.offer.site_config import ModelSource
from nvflare_fm.site.peft_methods import attachment_of
from nvflare_fm.site.tasks import registry as tasks
from nvflare_fm.site.worker import Worker
from tests.site import tiny

VERA = {"method": "vera", "r": 16}
IDS = torch.tensor([[1, 40, 50, 60, 70]])


def base_of(folder: Path, plan: Any) -> base_model.BaseModel:
    return base_model.load(ModelSource(path=str(folder)), plan, tasks[plan.task])


def projections(model: PeftModel) -> tuple[torch.Tensor, torch.Tensor]:
    (a,), (b,) = (list(getattr(model.base_model, f"vera_{name}").values()) for name in "AB")
    return a.clone(), b.clone()


def test_the_matrices_are_the_same_whatever_the_seeds_and_only_vectors_travel(llama: Path) -> None:
    found = []
    for seed in (0, 7):
        torch.manual_seed(seed)
        plan = tiny.plan(peft=VERA, seed=seed)
        base, method = base_of(llama, plan), attachment_of(VERA)
        with base.lent():
            model = method.attach(base, Adapter(), plan)
            found.append(projections(model))
            sent = method.extract(model)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    assert not sent.lora
    assert all(tensor.ndim == 1 and ".vera_lambda_" in name for name, tensor in sent.dense.items())


def test_training_moves_the_vectors_alone_and_two_sites_learn_together(llama: Path, tmp_path: Path) -> None:
    training = {"local_steps": 8, "batch_size": 8, "learning_rate": 5e-2}
    plan = tiny.plan(peft=VERA, training=training, evaluation={"before": True, "after": False})
    workers = {f"site-{i}": tiny.worker(tmp_path, llama, "causal_lm", f"site-{i}", shift=i) for i in range(2)}
    first, last = federate(workers, plan, Aggregation(), 2)
    loss = [sum(update.report.before["loss"] for update in done.updates) for done in (first, last)]
    assert loss[1] < 0.98 * loss[0]
    one, other = (update.adapter for update in first.updates)
    for name, tensor in first.combined.adapter.dense.items():
        torch.testing.assert_close(tensor, (one.dense[name] + other.dense[name]) / 2)


@pytest.mark.parametrize("peft", [VERA, {"method": "ia3"}], ids=lambda peft: peft["method"])
def test_a_module_below_the_head_that_is_trained_whole_is_loaded_as_such(
    bert: Path, tmp_path: Path, peft: dict[str, Any]
) -> None:
    asked = peft | {"modules_to_save": ["pooler"]}
    plan = tiny.plan("sequence_classification", peft=asked, evaluation={"before": False, "after": False})
    file = tiny.jsonl(tmp_path / "rows.jsonl", tiny.rows(plan.task))
    update = Worker("site-1", tiny.site(bert, file, limits={"trainable_modules": ["pooler"]})).train(RoundTask(plan))
    base, folder = base_of(bert, plan), write_adapter(tmp_path / "adapter", Saved(update.adapter, update.manifest))
    with base.lent(), torch.inference_mode():
        ours = attachment_of(asked).attach(base, update.adapter, plan).eval()(input_ids=IDS).logits
    with base.lent() as bare, torch.inference_mode():
        theirs = PeftModel.from_pretrained(bare, folder).eval()(input_ids=IDS).logits
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
