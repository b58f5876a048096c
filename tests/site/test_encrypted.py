"""A federation whose server adds what it cannot read."""

from pathlib import Path
from typing import Any

import pytest
import torch

from nvflare_fm.adapter import Adapter, RoundTask
from nvflare_fm.algebra.lora import stack
from nvflare_fm.config import Aggregation, SiteOverrides, TaskPlan
from nvflare_fm.errors import ConfigError, WireError
from nvflare_fm.export.folder import read_adapter
from nvflare_fm.job.settle import settle
from nvflare_fm.simulate import federate
from nvflare_fm.site.job_state import JobState
from nvflare_fm.site.model.own_adapter import GLOBAL
from nvflare_fm.site.model.sealed import unsealed
from nvflare_fm.site.worker import Worker
from nvflare_fm.transforms.packed import Sealed
from tests.encryption import kits
from tests.site import tiny

pytestmark = pytest.mark.usefixtures("malformed_allowed")  # the checks of a test run would read values to look at them
PLAN = tiny.plan(uplink=("ckks",), training={"local_steps": 4, "learning_rate": 1e-2})
HOW = Aggregation(merge="freeze_a")


def sites(folder: Path, model: Path, ranks: tuple[int | None, ...], task: str = "causal_lm") -> dict[str, Worker]:
    _, site = kits()
    return {
        f"site-{i}": tiny.worker(
            folder,
            model,
            task,
            f"site-{i}",
            shift=i,
            overrides=SiteOverrides(rank=rank),
            keys=lambda: site,
            state=JobState.at(folder / f"job-{i}"),
        )
        for i, rank in enumerate(ranks)
    }


def off(one: Adapter, other: Adapter) -> float:
    """How far two adapters are apart, relative to the second."""
    assert one.lora.keys() == other.lora.keys()
    assert one.dense.keys() == other.dense.keys()
    pairs = [(one.lora[n].delta(), other.lora[n].delta()) for n in one.lora]
    pairs += [(one.dense[n], other.dense[n]) for n in one.dense]
    return max(float((a - b).norm() / b.norm()) for a, b in pairs)


def test_at_mixed_ranks_the_sum_is_the_mean_of_whole_trained_adapters_and_nobody_else_reads_it(
    llama: Path, tmp_path: Path
) -> None:
    workers, (server, site) = sites(tmp_path, llama, (1, 4, 2)), kits()
    rounds = list(federate(workers, PLAN, HOW, 2, keys=server))
    for done in rounds:
        sealed = done.combined.adapter
        assert isinstance(sealed, Sealed)
        for read in (lambda a: a.lora[next(iter(a.lora))].B, lambda a: a.tensors()):
            for adapter in (sealed, done.updates[0].adapter):
                with pytest.raises(WireError) as refused:
                    read(adapter)
                assert refused.value.code == "sealed"
    opened = unsealed(sealed, site, rounds_plan(workers))
    wholes = [(workers[name].submit()[0], weight) for name, weight in rounds[1].combined.weights.items()]
    for layer, pair in opened.lora.items():
        mean = stack([whole.lora[layer] for whole, _ in wholes], [weight for _, weight in wholes]).delta()
        assert (pair.delta() - mean).norm() <= 1e-5 * mean.norm()
    first, (small, _) = unsealed(rounds[0].combined.adapter, site, rounds_plan(workers)), workers["site-0"].submit()
    for layer, pair in first.lora.items():  # what a site does not train it sends back as it received it
        assert pair.B[:, 1:].norm() > 0
        torch.testing.assert_close(small.lora[layer].B[:, 1:], pair.B[:, 1:], rtol=1e-5, atol=1e-7)
        assert not torch.equal(small.lora[layer].B[:, :1], pair.B[:, :1])
    loss = [sum(r.before["loss"] for r in done.reports.values()) for done in rounds]
    assert loss[1] < loss[0]
    saved = read_adapter(tmp_path / "job-0" / GLOBAL)
    assert (saved.round, saved.manifest) == (0, rounds[0].combined.manifest)
    assert off(saved.adapter, first) <= 1e-6


def rounds_plan(workers: dict[str, Worker]) -> TaskPlan:
    return settle(PLAN, HOW, {site: worker.overrides for site, worker in workers.items()}).plan


def test_a_site_trains_from_no_adapter_that_the_server_can_read(llama: Path, tmp_path: Path) -> None:
    workers, (server, _) = sites(tmp_path, llama, (2, 4)), kits()
    list(federate(workers, PLAN, HOW, 1, keys=server))
    readable, manifest = workers["site-0"].submit()
    task = RoundTask(rounds_plan(workers), readable, manifest, 1, 2)
    with pytest.raises(WireError) as refused:
        workers["site-1"].train(task)
    assert refused.value.code == "not_encrypted"
    assert workers["site-1"].validate(task)  # a decrypted adapter may be measured


def test_a_site_without_keys_refuses_before_it_trains(llama: Path, tmp_path: Path) -> None:
    worker = tiny.worker(tmp_path, llama, "causal_lm")
    with pytest.raises(ConfigError) as refused:
        worker.train(RoundTask(PLAN))
    assert refused.value.code == "no_context"


def test_at_one_rank_it_is_what_the_server_makes_of_what_it_can_read(llama: Path, tmp_path: Path) -> None:
    server, site = kits()
    workers = sites(tmp_path, llama, (4, 4))
    (sealed,) = federate(workers, PLAN, HOW, 1, keys=server)
    (plain,) = federate(sites(tmp_path, llama, (4, 4)), PLAN.model_copy(update={"uplink": ()}), HOW, 1)
    assert sealed.combined.weights == plain.combined.weights
    assert off(unsealed(sealed.combined.adapter, site, rounds_plan(workers)), plain.combined.adapter) <= 1e-5


@pytest.mark.parametrize("peft", [{"method": "lora", "rank": 2}, {"method": "head"}], ids=lambda peft: peft["method"])
def test_what_is_private_adds_up_unread_too(bert: Path, tmp_path: Path, peft: dict[str, Any]) -> None:
    """The server has nothing to read, and whoever decrypts the sum reads what noise covers."""
    privacy = {"noise_multiplier": 1.0, "delta": 1e-3}
    task, training = "sequence_classification", {"local_steps": 2, "batch_size": 12, "learning_rate": 1e-2}
    plan = tiny.plan(task, uplink=("ckks",), peft=peft, privacy=privacy, training=training)
    how = HOW if "rank" in peft else Aggregation()
    workers, (server, site) = sites(tmp_path, bert, (2, 2) if "rank" in peft else (None, None), task), kits()
    (done,) = federate(workers, plan, how, 1, keys=server)
    assert all(update.protection for update in done.updates)
    opened = unsealed(done.combined.adapter, site, settle(plan, how).plan)
    wholes = [worker.submit()[0] for worker in workers.values()]
    for layer, pair in opened.lora.items():
        mean = stack([whole.lora[layer] for whole in wholes], [0.5, 0.5]).delta()
        assert (pair.delta() - mean).norm() <= 1e-5 * mean.norm()
    for name, tensor in opened.dense.items():
        torch.testing.assert_close(tensor, (wholes[0].dense[name] + wholes[1].dense[name]) / 2, rtol=1e-4, atol=1e-6)
    assert opened.dense
