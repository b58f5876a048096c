"""Sites that share A alone, through NVFlare: no B on the wire, and a whole adapter of its own at every site's end."""

import json
from pathlib import Path

from nvflare_fm.export.folder import read_adapter
from nvflare_fm.flare.recipe import FedPEFTRecipe
from tests.site import tiny

from .federation import PLAN, Federation, offers


def test_each_site_ends_with_an_adapter_of_its_own_and_the_server_with_the_shared_half(tmp_path: Path) -> None:
    sites = offers(tmp_path, tiny.save(tmp_path / "model"), ["alder", "birch"])
    recipe = FedPEFTRecipe("halves", num_rounds=2, min_sites=2, merge="share_a", sites_per_round=2, **PLAN)
    run = Federation(recipe, sites, tmp_path / "runs").run()
    rounds = run.rounds()
    assert [set(r["sites"]) for r in rounds[:2]] == [{"alder", "birch"}] * 2
    assert rounds[1]["metrics"]["loss"] < rounds[0]["metrics"]["loss"]
    shared = read_adapter(run.server / "adapters" / "last").adapter
    assert not shared.lora
    assert not [name for name in shared.dense if "lora_B" in name]
    own = {n: read_adapter(run.root / n / "simulate_job" / "own_adapter").adapter for n in ("alder", "birch")}
    layers = own["alder"].lora
    assert layers
    assert layers.keys() == own["birch"].lora.keys()
    assert any((layers[n].B - own["birch"].lora[n].B).norm() > 1e-3 for n in layers)
    config = json.loads((run.server / "adapters" / "last" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 8)
