"""Two hospitals agree, a third holds other weights: one job, seen from every side."""

import json
import math
import os
import re
from pathlib import Path

import pytest
import torch
from nvflare.recipe.utils import add_experiment_tracking
from nvflare.tool.job.job_cli import _discover_job_download_artifacts
from peft import PeftModel
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from nvflare_fm import transforms
from nvflare_fm.cli import app
from nvflare_fm.export import folder as export
from nvflare_fm.flare import components
from nvflare_fm.flare.kit import allow_list
from nvflare_fm.flare.recipe import TASKS, FedPEFTRecipe
from nvflare_fm.flare.simulation import Simulation
from nvflare_fm.job.at_home import PERSONAL
from nvflare_fm.transforms.packed import pack
from tests.site import tiny

from .federation import PLAN, Federation, offers
from .spy import Held, Spy

SITES = ["alder", "birch", "drift"]


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Federation:
    folder = tmp_path_factory.mktemp("federation")
    model = tiny.save(folder / "model")
    sites = offers(folder, model, SITES)
    torch.manual_seed(1)
    other = AutoModelForCausalLM.from_pretrained(model)
    other.lm_head.weight.data += 1.0
    other.save_pretrained(folder / "other")
    AutoTokenizer.from_pretrained(model).save_pretrained(folder / "other")
    sites["drift"] = tiny.site(folder / "other", folder / "drift.jsonl", limits={"threads": 1})
    recipe = FedPEFTRecipe(
        "whole",
        num_rounds=2,
        min_sites=2,
        sites={"alder": {"rank": 2}, "birch": {"rank": 4}, "drift": {}},
        keep_rounds=True,
        disk_offload=True,
        cross_site_evaluation=True,
        personalize={"steps": 3},
        uplink=["int8"],
        downlink=["int8"],
        **PLAN,
    )
    (folder / "spied").mkdir()
    recipe._job.set_app_packages(["nvflare_fm", "tests"])
    recipe.add_server_output_filter(Spy(str(folder / "spied")), tasks=TASKS)
    recipe._job.to_server(Held(str(folder / "held")))
    add_experiment_tracking(recipe, "tensorboard")
    run = Federation(recipe, sites, folder / "runs")
    listed = allow_list.with_ours({}, components.OURS)
    listed["class_allow_list"].append("tests.integration.spy.")
    allow_list.write(run.root / "local" / allow_list.OWN, listed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]))
        patch.setenv("TMPDIR", str(folder))
        run.run()
    return run


def test_the_job_completes_without_bringing_code(federation: Federation) -> None:
    assert federation.error is None
    assert len(federation.rounds()) == 3
    assert not list(federation.root.rglob("custom"))


def test_a_wrong_base_model_is_refused_by_name_and_the_others_go_on(federation: Federation) -> None:
    first, second, _ = federation.rounds()
    assert first["out"]["drift"]["code"] == "other_base"
    assert second["out"]["drift"]["kind"] == "refused"
    assert "the federation trains another base model" in second["out"]["drift"]["text"]
    assert set(second["sites"]) == {"alder", "birch"}


def test_the_result_loads_in_peft_and_is_better_than_the_base(federation: Federation) -> None:
    folder = federation.root.parent.parent
    words = AutoTokenizer.from_pretrained(folder / "model")
    text = words(tiny.SENTENCES[:8], return_tensors="pt", padding=True)
    labels = text["input_ids"].masked_fill(text["attention_mask"] == 0, -100)
    base = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    with torch.no_grad():
        alone = base(**text, labels=labels).loss.item()
        adapted = PeftModel.from_pretrained(base, str(federation.server / "adapters" / "best")).eval()
        together = adapted(**text, labels=labels).loss.item()
    assert together < alone - 0.5


def test_nvflare_finds_the_adapter_to_download(federation: Federation) -> None:
    artifacts, _ = _discover_job_download_artifacts(str(federation.root))
    assert artifacts["global_model"].endswith("adapters/best/adapter_model.safetensors")


def test_every_weight_loss_and_byte_is_on_record_at_the_server(federation: Federation) -> None:
    first, second, last = federation.rounds()
    kept = [export.read_adapter(federation.server / "adapters" / f"round-00{number}").adapter for number in range(2)]
    for line in (first, second):
        assert math.isclose(sum(site["weight"] for site in line["sites"].values()), 1.0)
        assert line["energy_lost"]
        assert 1 <= line["step_size"] <= 1.5
        assert all(site["bytes_up"] > 0 and site["seconds"] > 0 for site in line["sites"].values())
        assert all(3.5 * site["bytes_up"] < kept[line["round"]].bytes() for site in line["sites"].values())
    sent = pack(kept[0], transforms.read(("int8",), "downlink"), "the server").parcel.bytes
    assert (first["bytes_down"], second["bytes_down"]) == (0, sent)
    assert last["metrics"]["loss"] < first["metrics"]["loss"]


def test_all_that_shows_metrics_ends_with_the_last_adapters(federation: Federation) -> None:
    """After the last round the adapter is measured once more, with no round that would tell of it."""
    last = federation.rounds()[-1]
    assert (last["round"], last["total_rounds"]) == (2, 2)
    summary = json.loads((federation.server / "metrics" / "metrics_summary.json").read_text())
    assert summary["final_round"] == 2
    told = {metric["name"]: metric["value"] for metric in summary["final_aggregated_metrics"]}
    assert told == pytest.approx(last["metrics"])
    curve = EventAccumulator(str(federation.server / "tb_events" / "alder")).Reload().Scalars("before/loss")
    assert [event.step for event in curve] == [0, 1, 2]
    assert curve[-1].value == pytest.approx(last["sites"]["alder"]["before"]["loss"])


def test_each_rounds_adapter_and_the_best_are_kept_with_their_round(federation: Federation) -> None:
    kept = {f.name: export.read_adapter(f).round for f in (federation.server / "adapters").iterdir()}
    assert kept == {"round-000": 0, "round-001": 1, "last": 1, "best": 1}


def test_each_site_that_took_part_ends_with_an_adapter_of_its_own_which_the_server_never_sees(
    federation: Federation,
) -> None:
    names = ["alder", "birch"]
    assert [*Simulation(Path(), federation.root, SITES).personal] == names
    last = export.read_adapter(federation.server / "adapters" / "last").adapter
    kept = {name: federation.root / name / "simulate_job" / PERSONAL for name in names}
    for name, folder in kept.items():
        saved = export.read_adapter(folder)
        assert saved.round == 1
        assert saved.adapter.lora.keys() == last.lora.keys()
        assert "personalize: loss " in federation.log(name)
        assert "personalize: loss " not in federation.log("server")
    assert "drift does not count" in federation.log("server")
    assert not list(federation.server.rglob(PERSONAL))
    weights = [(folder / export.WEIGHTS).read_bytes() for folder in kept.values()]
    assert weights[0] != weights[1]
    model = AutoModelForCausalLM.from_pretrained(federation.root.parent.parent / "model")
    PeftModel.from_pretrained(model, str(kept["birch"]))


def test_why_a_site_does_not_count_is_explained(federation: Federation) -> None:
    said = CliRunner().invoke(app, ["explain", str(federation.root)]).stdout
    assert "alder: counted in 3 of 3 rounds" in said
    assert re.search(r"^drift: counted in 0 of 3 rounds\n  round 0: .*base model.*\n  rounds? 1", said, re.MULTILINE)
    assert "alder: measured SRV_best: " in said
    assert re.search("^drift: did not measure SRV_last: ", said, re.MULTILINE)


def test_cross_site_evaluation_measures_server_and_site_adapters_at_both_sites(federation: Federation) -> None:
    results = json.loads((federation.server / "cross_site_val" / "cross_val_results.json").read_text())
    for site in ("alder", "birch"):
        losses = {owner: metrics["loss"] for owner, metrics in results[site].items() if metrics}
        assert {"SRV_best", "SRV_last", "alder", "birch"} <= losses.keys()
        assert all(math.isfinite(loss) for loss in losses.values())


def test_the_server_does_not_hold_the_adapter_it_has_saved(federation: Federation) -> None:
    first, second = (federation.root.parent.parent / "held").read_text().splitlines()
    tensors, in_its_file = second.split()
    assert first == "0 0"
    assert tensors == in_its_file != "0"


def test_nothing_sent_to_a_site_tells_of_another(federation: Federation) -> None:
    """Names, weights, sample counts, ranks and losses of the others; cross-site evaluation, which names the owner of
    the adapter it asks a site to measure, is NVFlare's and left out."""
    spied = sorted((federation.root.parent.parent / "spied").iterdir())
    ours = [
        file for file in spied if b"model_owner" not in file.read_bytes() and b"submit_model" not in file.read_bytes()
    ]
    assert {file.suffix[1:] for file in ours} == set(SITES)
    assert len(ours) >= 3 * len(SITES)
    assert any(packed("learning_rate") in file.read_bytes() for file in ours)  # we do look where the words would be
    for file in ours:
        said, reader = file.read_bytes(), file.suffix[1:]
        for other in set(SITES) - {reader}:
            assert other.encode() not in said
        for word in ("report", "examples", "weight", "weights", "site_weights", "bytes_up", "refused", "loss"):
            assert packed(word) not in said
        assert not re.search(packed("r") + rb"[\x01-\x40][\xa0-\xbf][a-z]{3}", said)  # a rank, and the key after it


def packed(word: str) -> bytes:
    """A short text in MessagePack, its length before it."""
    return bytes([0xA0 + len(word)]) + word.encode()
