"""What the server saves after a round is what a job that goes on starts with, the memory of its step included."""

import shutil
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from nvflare.apis.fl_context import FLContext
from nvflare.apis.job_def import new_job_id
from nvflare.apis.workspace import Workspace
from nvflare.app_common.app_constant import AppConstants
from nvflare.private.fed.server.run_manager import RunManager
from nvflare.private.fed.server.server_engine import ServerEngine

from nvflare_fm.aggregation.step import Memory
from nvflare_fm.errors import ModelError
from nvflare_fm.export import folder as export
from nvflare_fm.flare import wire
from nvflare_fm.flare.aggregator import AdapterAggregator
from nvflare_fm.flare.controller import FedPEFT
from nvflare_fm.flare.persistor import FOLDER, LAST, AdapterPersistor
from tests.flare.messages import MANIFEST, adapter, same

MEMORY = Memory(adapter(5, rank=2), {"head": torch.tensor([1.5, 2.5])})
ADAM = {"rule": "adam", "beta1": 0.5}


@pytest.fixture
def fl_ctx(tmp_path: Path) -> Iterator[FLContext]:
    """Of a job at a server, with NVFlare's own engine and workspace."""
    for folder in ("startup", "local"):
        (tmp_path / folder).mkdir()
    engine, workspace, job_id = (
        ServerEngine(None, Namespace(set=[]), None, None),
        Workspace(str(tmp_path)),
        new_job_id(),
    )
    (tmp_path / job_id).mkdir()
    (tmp_path / job_id / "meta.json").write_text("{}")
    engine.set_run_manager(RunManager("server", engine, job_id, workspace, {}, None, []))
    with engine.new_context() as made:
        yield made


def controller(fl_ctx: FLContext, step: object, persistor: AdapterPersistor) -> FedPEFT:
    made = FedPEFT(num_rounds=9, aggregator=AdapterAggregator({"step": step}))
    made.fl_ctx, made.engine, made.persistor = fl_ctx, fl_ctx.get_engine(), persistor
    return made


def saved(fl_ctx: FLContext, step: object = ADAM, memory: Memory = MEMORY) -> Path:
    """The folder of the last adapter, after round 3."""
    federation = controller(fl_ctx, step, AdapterPersistor(keep_rounds=True))
    federation.aggregator.memory = memory
    fl_ctx.set_prop(AppConstants.CURRENT_ROUND, 3)
    model = wire.write_saved(export.Saved(adapter(1), MANIFEST, 3, federation.settled.plan))
    federation.save_model(model)
    assert all(torch.equal(tensor, adapter(1).tensors()[name]) for name, tensor in model.params.items())
    return Path(fl_ctx.get_engine().get_workspace().get_run_dir(fl_ctx.get_job_id())) / FOLDER / LAST


def resumed(fl_ctx: FLContext, last: Path, step: object = ADAM) -> FedPEFT:
    config = Path(fl_ctx.get_engine().get_workspace().get_app_config_dir(fl_ctx.get_job_id()))
    shutil.copytree(last, config / "brought", dirs_exist_ok=True)
    federation = controller(fl_ctx, step, AdapterPersistor(initial_adapter="brought", resume=True))
    assert federation._first_round(federation.load_model()) == 4
    return federation


def test_a_resumed_job_goes_on_with_what_the_servers_step_remembers(fl_ctx: FLContext) -> None:
    last = saved(fl_ctx)
    assert same(export.read_adapter(last.with_name("round-003")).memory.change, MEMORY.change)
    memory = resumed(fl_ctx, last).aggregator.memory
    assert same(memory.change, MEMORY.change)
    assert torch.equal(memory.square["head"], MEMORY.square["head"])


@pytest.mark.parametrize("step", [None, "momentum", {"rule": "adam", "beta1": 0.6}])
def test_another_step_starts_with_an_empty_memory(fl_ctx: FLContext, step: object) -> None:
    assert not resumed(fl_ctx, saved(fl_ctx), step).aggregator.memory


def test_a_step_that_remembers_nothing_leaves_no_file(fl_ctx: FLContext) -> None:
    last = saved(fl_ctx, None, Memory())
    assert export.STEP not in export.files_of(last)
    assert not resumed(fl_ctx, last, None).aggregator.memory


def test_what_was_damaged_on_the_way_is_not_resumed(fl_ctx: FLContext) -> None:
    last = saved(fl_ctx)
    content = bytearray((last / export.STEP).read_bytes())
    content[-1] ^= 1
    (last / export.STEP).write_bytes(content)
    with pytest.raises(ModelError) as caught:
        resumed(fl_ctx, last)
    assert caught.value.code == "adapter_damaged"
