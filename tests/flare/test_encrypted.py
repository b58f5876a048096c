"""What a server does that cannot read what sites send: with NVFlare's messages, kits and files."""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from nvflare.apis.fl_context import FLContext
from nvflare.app_common.abstract.fl_model import FLModel
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.utils.fl_model_utils import FLModelUtils

from nvflare_fm.adapter import Adapter, AdapterUpdate, LoraPair, Report, RoundTask
from nvflare_fm.algebra.lora import fresh_rows
from nvflare_fm.config import Aggregation, RoundPlan, SiteOverrides
from nvflare_fm.errors import ConfigError, ModelError, WireError
from nvflare_fm.flare import wire
from nvflare_fm.flare.aggregator import AdapterAggregator
from nvflare_fm.flare.controller import FedPEFT
from nvflare_fm.flare.encryption import SERVER, SITE, server_keys, site_keys
from nvflare_fm.flare.jobs.job import read_job
from nvflare_fm.flare.persistor import FOLDER, LAST, AdapterPersistor
from nvflare_fm.flare.recipe import FedPEFTRecipe
from nvflare_fm.flare.sealed import KNOWN, WEIGHTS, read_sealed
from nvflare_fm.job.settle import settle
from nvflare_fm.site.model.sealed import padded, unsealed
from nvflare_fm.transforms import read
from nvflare_fm.transforms.packed import Sealed, pack
from tests.deployment.system import SERVER as SERVER_NAME
from tests.deployment.system import project
from tests.encryption import kits as keys
from tests.flare import test_egress as floors
from tests.flare.messages import LAYERS, MANIFEST
from tests.flare.test_persistor import fl_ctx
from tests.flare.test_provision import quickly

__all__ = ["fl_ctx"]
pytestmark = pytest.mark.usefixtures("malformed_allowed")  # the checks of a test run would read values to look at them
ASKED: dict[str, Any] = {"peft": {"method": "lora", "rank": 3, "lora_alpha": 12}, "uplink": ["ckks"], "seed": 5}
HOW: dict[str, Any] = {"merge": "freeze_a", "max_rank": 4}
SETTLED = settle(RoundPlan.read(ASKED, "plan"), Aggregation.read(HOW, "how"), {"birch": SiteOverrides(rank=2)})
PLAN = SETTLED.plan
SITE_KEYS, SERVER_KEYS = keys()[1], keys()[0]
NAME = "ciphertexts.00000"  # of the one tensor that travels


def trained(seed: int, rank: int) -> Adapter:
    """What a site of this rank has after a round."""
    generator = torch.Generator().manual_seed(seed)
    pairs = {
        name: LoraPair(
            fresh_rows(name, fan_in, range(rank), PLAN.seed), torch.randn(fan_out, rank, generator=generator), 12 / rank
        )
        for name, (fan_out, fan_in) in LAYERS.items()
    }
    return Adapter(pairs, {"head": torch.randn(2, generator=generator)})


def answer(site: str, seed: int, rank: int = 3, adapter: Adapter | None = None, entries: Any = PLAN.uplink) -> FLModel:
    """As it arrives: packed by the site, read by no one yet."""
    whole = padded(adapter or trained(seed, rank), PLAN)
    update = AdapterUpdate(site, whole, MANIFEST, Report(rank=rank, examples=9, before={"loss": 2.0}))
    chain = read(entries, "uplink")
    model = wire.write_update(update, pack(whole, chain.keyed(SITE_KEYS) if chain.encrypts else chain, site))
    model.meta["client_name"] = site
    return model


def opened(task: RoundTask | None = None) -> AdapterAggregator:
    aggregator = AdapterAggregator(HOW)
    aggregator.keys = SERVER_KEYS
    aggregator.begin(task or RoundTask(SETTLED.of_round(0)), SETTLED)
    return aggregator


def test_a_plan_that_encrypts_says_at_which_rank_pairs_are_sent() -> None:
    assert (PLAN.padded_to, PLAN.rest, PLAN.factors, PLAN.shares) == (4, "tail", "B", "AB")
    terms = SETTLED.terms("birch")
    assert (terms.padded_to, terms.ranks) == (4, range(2, 3))


def test_a_round_of_mixed_ranks_is_added_and_what_cannot_be_costs_its_site_the_round() -> None:
    aggregator = opened()
    aggregator.accept_model(answer("alder", 1))
    aggregator.accept_model(answer("birch", 2, rank=2))
    broken = answer("cedar", 3)
    broken.params[NAME] = broken.params[NAME].clone()
    broken.params[NAME][4:400] = 0
    other = answer("dogwood", 4)
    other.params[NAME] = other.params[NAME][:-1]
    plain = answer("elm", 5, entries=())
    wider = answer("birch", 6, rank=4)
    unfilled = answer("fir", 7)
    unfilled.meta[wire.KEY]["encoded"]["tensors"] = {
        n: {"shape": [3, 5] if "lora_A" in n else [6, 3] if "lora_B" in n else [2], "dtype": "F32"}
        for n in unfilled.meta[wire.KEY]["encoded"]["tensors"]
    }
    for model, code in (
        (broken, "no_ciphertext"),
        (other, "no_ciphertext"),
        (plain, "other_encoding"),
        (wider, "rank_not_in_plan"),
        (unfilled, "rank_not_in_plan"),
    ):
        with pytest.raises(WireError) as refused:
            aggregator.accept_model(model)
        assert refused.value.code == code
    model = aggregator.aggregate_model()
    assert aggregator.combined.weights == {"alder": 0.5, "birch": 0.5}
    assert {tensor.dtype for tensor in model.params.values()} == {torch.uint8}
    found = unsealed(wire.read_saved(model.params, model.meta, "test").adapter, SITE_KEYS, PLAN)
    wholes = [trained(1, 3), trained(2, 2)]
    for layer, pair in found.lora.items():
        mean = sum(0.5 * whole.lora[layer].delta() for whole in wholes)
        assert (pair.delta() - mean).norm() <= 1e-5 * mean.norm()
    head = sum(0.5 * whole.dense["head"] for whole in wholes)
    assert (found.dense["head"] - head).norm() <= 1e-5 * head.norm()
    received = wire.read_saved(model.params, model.meta, "test").adapter
    second = opened(RoundTask(SETTLED.of_round(1), received, MANIFEST, 1, 2))
    second.accept_model(answer("alder", 8))
    assert second.aggregate_model().params.keys() == {NAME}
    strange = answer("alder", 9, adapter=Adapter(trained(9, 3).lora, {"head": torch.zeros(3)}))
    with pytest.raises(WireError) as refused:
        second.accept_model(strange)
    assert refused.value.code == "other_layers"


@pytest.mark.parametrize("names", [(), (NAME,)], ids=["the first round", "later"])
def test_a_site_that_demands_encryption_lets_what_is_encrypted_leave_and_nothing_else(
    tmp_path: Path, names: Sequence[str]
) -> None:
    made = floors.site(tmp_path, {"required_protection": "encryption"})
    context = floors.context(SiteOverrides(rank=2).applied(PLAN), names)
    left = made.process(FLModelUtils.to_shareable(answer("birch", 2, rank=2)), context)
    model = FLModelUtils.from_shareable(left)
    model.meta["client_name"] = "birch"
    aggregator = opened()
    aggregator.accept_model(model)
    assert aggregator.aggregate_model().params.keys() == {NAME}
    bare = made.process(FLModelUtils.to_shareable(answer("birch", 2, rank=2, entries=())), context)
    assert floors.code(bare) == "unprotected"


def test_a_site_whose_rank_is_above_the_global_one_sends_nothing() -> None:
    with pytest.raises(ConfigError) as refused:
        padded(trained(0, 5), PLAN)
    assert refused.value.code == "rank_above_global"


def test_where_nothing_can_be_added_the_adapter_stays_as_it_was() -> None:
    aggregator = opened()
    aggregator.accept_model(answer("alder", 1))
    aggregator.keys = replace(SERVER_KEYS, primes=3)  # whatever no check foresaw
    aggregator.aggregate_model()
    assert "merge_failed" in aggregator.combined.failed


# --- at rest


def saved(fl_ctx: FLContext) -> Path:
    fl_ctx.set_prop(AppConstants.CURRENT_ROUND, 3)
    aggregator = opened(RoundTask(SETTLED.of_round(3), round=3, total_rounds=9))
    aggregator.accept_model(answer("alder", 1))
    model = aggregator.aggregate_model()
    federation = controller(fl_ctx, AdapterPersistor(keep_rounds=True))
    federation.save_model(model)
    return Path(fl_ctx.get_engine().get_workspace().get_run_dir(fl_ctx.get_job_id())) / FOLDER / LAST


def controller(fl_ctx: FLContext, persistor: AdapterPersistor, **asked: Any) -> FedPEFT:
    made = FedPEFT(num_rounds=9, plan=ASKED | asked, aggregator=AdapterAggregator(HOW))
    made.fl_ctx, made.engine, made.persistor = fl_ctx, fl_ctx.get_engine(), persistor
    return made


def test_what_the_server_saves_is_ciphertext_and_a_job_goes_on_from_it(fl_ctx: FLContext, tmp_path: Path) -> None:
    last = saved(fl_ctx)
    assert {file.name for file in last.iterdir()} == {WEIGHTS, KNOWN, "SHA256SUMS"}
    assert unsealed(read_sealed(last).adapter, SITE_KEYS, PLAN).lora.keys() == LAYERS.keys()
    assert AdapterPersistor().get_model_inventory(fl_ctx).keys() == {LAST, "round-003"}
    config = Path(fl_ctx.get_engine().get_workspace().get_app_config_dir(fl_ctx.get_job_id()))
    shutil.copytree(last, config / "brought")
    persistor = AdapterPersistor(initial_adapter="brought", resume=True)
    going_on = controller(fl_ctx, persistor)
    model = going_on.load_model()
    assert going_on._first_round(model) == 4
    assert isinstance(wire.read_saved(model.params, model.meta, "test").adapter, Sealed)
    readable = controller(fl_ctx, persistor, uplink=[])
    with pytest.raises(ConfigError) as refused:
        readable._first_round(model)
    assert refused.value.code == "other_start"
    goes_on = FedPEFTRecipe("on", initial_adapter=last, resume=True, num_rounds=9, **ASKED, **HOW)
    goes_on.export(str(tmp_path / "jobs"))
    job = read_job(tmp_path / "jobs" / "on")
    assert job.rounds == range(4, 9)
    content = (last / WEIGHTS).read_bytes()
    (last / WEIGHTS).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ModelError) as damaged:
        read_sealed(last)
    assert damaged.value.code == "adapter_unreadable"


# --- the kits


@pytest.fixture(scope="module")
def provisioned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quickly(tmp_path_factory.mktemp("encrypting"), project(8002, {"clinic-a": {}}))


def test_the_contexts_of_the_kits_are_read_as_signed_or_not_at_all(provisioned: Path, tmp_path: Path) -> None:
    server, site = provisioned / SERVER_NAME / "startup", provisioned / "clinic-a" / "startup"
    assert (server_keys(server).secret, site_keys(site).secret) == (False, True)
    assert not (server / SITE).exists()
    for mine, name, call in ((server, SERVER, server_keys), (site, SITE, site_keys)):
        for spoil, code in (
            (_remove, "no_context"),
            (_damage, "context_not_signed"),
            (_unsigned, "context_not_signed"),
        ):
            copy = tmp_path / f"{name}-{code}-{spoil.__name__}"
            shutil.copytree(mine, copy)
            spoil(copy, name)
            with pytest.raises(ConfigError) as refused:
                call(copy)
            assert refused.value.code == code
            assert str(tmp_path) not in refused.value.message


def _remove(kit: Path, name: str) -> None:
    (kit / name).unlink()


def _damage(kit: Path, name: str) -> None:
    content = (kit / name).read_bytes()
    (kit / name).chmod(0o600)
    (kit / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def _unsigned(kit: Path, name: str) -> None:
    (kit / "signature.json").unlink()


def test_a_server_without_a_context_stops_the_job_in_words(fl_ctx: FLContext, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the simulator, whose workspace has an empty startup folder."""
    flow = controller(fl_ctx, AdapterPersistor())
    with pytest.raises(ConfigError) as refused:
        flow._run_rounds()
    assert refused.value.code == "no_context"
    assert "HEBuilder" in refused.value.message
