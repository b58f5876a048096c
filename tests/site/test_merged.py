"""An exported adapter: PEFT and the merged model answer alike, and the card's own code loads either."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner, Result

from nvflare_fm.adapter import Adapter, RoundTask
from nvflare_fm.cli import app
from nvflare_fm.config import RoundPlan
from nvflare_fm.export import folder as export
from nvflare_fm.flare.ledger import Ledger
from nvflare_fm.record.site_report import Contribution
from nvflare_fm.site.worker import Worker
from tests.site import tiny
from tests.site.test_mean_pooling import OLD, declared

ROOT = Path(__file__).parents[2]
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "lora": ("llama", "causal_lm", {"method": "lora", "rank": 4, "lora_alpha": 8}),
    "dora": ("llama", "causal_lm", {"method": "lora", "rank": 4, "use_dora": True}),
    "ia3": ("llama", "causal_lm", {"method": "ia3"}),
    "vera": ("llama", "causal_lm", {"method": "vera", "r": 8, "d_initial": 1.0}),
    "a head apart from the embedding": ("tied", "causal_lm", {"method": "lora", "modules_to_save": ["lm_head"]}),
    "classifier": ("bert", "sequence_classification", {"method": "lora", "rank": 4}),
    "classifier on the mean": ("averaged", "sequence_classification", {"method": "lora", "rank": 4}),
    "classifier alone": ("bert", "sequence_classification", {"method": "head"}),
    "classifier alone on the mean": ("averaged", "sequence_classification", {"method": "head"}),
    "word classifier": ("bert", "token_classification", {"method": "lora", "rank": 4}),
}


def typed(*words: Any) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, llama: Path, bert: Path) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    tied = tiny.save(root / "tied", tie_word_embeddings=True)
    return {"llama": llama, "bert": bert, "tied": tied, "averaged": declared(bert, root / "averaged", OLD)}


def trained(folder: Path, model: Path, task: str, peft: dict[str, Any]) -> Path:
    """The last adapter of a job's result in which two sites trained for three rounds."""
    rows = tiny.jsonl(folder / "rows.jsonl", tiny.rows(task))
    limits = {"trainable_modules": ["lm_head"], "train_embeddings": True}
    worker = Worker("alder", tiny.site(model, rows, limits=limits))
    plan = tiny.plan(task, peft=peft, training={"local_steps": 6, "batch_size": 4, "learning_rate": 2e-2})
    worker.train(RoundTask(plan))
    values, manifest = worker.submit()
    for number in range(4):
        ledger = Ledger(number, 3, ["alder", "birch"], 0)
        ledger.result = {
            "sites": {site: Contribution(weight=0.5) for site in ledger.asked} if number < 3 else {},
            "metrics": {"loss": 2.0 - number / 4},
            "how": {"merge": "exact", "weigh": ["uniform"]},
        }
        ledger.write(folder)
    return export.write_adapter(folder / "adapters" / "last", export.Saved(values, manifest, 2, plan))


def code_of(card: Path) -> str:
    return re.findall(r"```python\n(.*?)```", card.read_text(encoding="utf-8"), re.DOTALL)[0]


def logits(folder: Path, model: Path, monkeypatch: pytest.MonkeyPatch, code: str = "") -> torch.Tensor:
    """What the code on the card makes of a text, run in the folder it lies in."""
    monkeypatch.chdir(folder)
    said: dict[str, Any] = {}
    exec(code or code_of(folder / "README.md"), said)
    words = AutoTokenizer.from_pretrained(model)(tiny.SENTENCES[:4], return_tensors="pt", padding=True)
    words.pop("token_type_ids", None)
    with torch.no_grad():
        return said["model"](**words).logits.float()


@pytest.mark.parametrize("case", CASES)
def test_the_merged_model_answers_as_peft_does_with_the_adapter(
    case: str, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, task, peft = CASES[case]
    base, adapter = models[kind], trained(tmp_path, models[kind], task, peft)
    for name, more in (("peft", ()), ("merged", ("--merge",))):
        done = typed("export", adapter, "-o", tmp_path / name, "--base", base, *more)
        assert done.exit_code == 0, done.exception
    with_peft, merged = (logits(tmp_path / name, base, monkeypatch) for name in ("peft", "merged"))
    bare = code_of(tmp_path / "peft" / "README.md").split("model = ")[0] + "model = base.eval()"
    untrained = logits(tmp_path / "peft", base, monkeypatch, bare)
    assert (merged - with_peft).norm() < 0.1 * (with_peft - untrained).norm()  # bf16 has 8 bits
    config = AutoConfig.from_pretrained(tmp_path / "merged")
    if task != "causal_lm":
        assert config.id2label == dict(enumerate(tiny.LABELS))
        assert config.label2id == {label: i for i, label in enumerate(tiny.LABELS)}
    assert config.dtype == torch.bfloat16
    assert (tmp_path / "merged" / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()


@pytest.fixture(scope="module")
def last(tmp_path_factory: pytest.TempPathFactory, llama: Path) -> Path:
    return trained(tmp_path_factory.mktemp("result"), llama, "causal_lm", CASES["lora"][2])


def test_another_class_is_an_error_and_no_lora_of_zeros(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where an adapter names its layers by their ends alone, PEFT only warns, and every LoRA stays zero."""
    asked = {"method": "lora", "rank": 2, "target_modules": ["query"]}
    adapter = trained(tmp_path, bert, "sequence_classification", asked)
    typed("export", adapter, "-o", tmp_path / "peft", "--base", bert)
    code = code_of(tmp_path / "peft" / "README.md").replace("AutoModelForSequenceClassification", "AutoModel")
    with pytest.raises(ValueError) as caught:
        logits(tmp_path / "peft", bert, monkeypatch, code)
    assert "bert.encoder.layer.0.attention.self.query" in str(caught.value)
    shutil.copyfile(adapter / "adapter_config.json", tmp_path / "peft" / "adapter_config.json")
    with pytest.warns(UserWarning, match="adapter"), pytest.raises(AssertionError):
        logits(tmp_path / "peft", bert, monkeypatch, code)


def test_the_card_says_where_it_comes_from_and_names_no_site(last: Path, llama: Path, tmp_path: Path) -> None:
    typed("export", last, "-o", tmp_path / "named", "--base", "owner/name")
    card = (tmp_path / "named" / "README.md").read_text(encoding="utf-8")
    told = json.loads((tmp_path / "named" / "adapter_config.json").read_text())
    assert told["base_model_name_or_path"] == "owner/name"
    for row in ("| rounds | 3 |", "| sites that took part | 2 |", "| merge rule | exact |", "| loss, as the sites"):
        assert row in card
    assert re.search(r"\| loss, as the sites measured it \| 1.25 \|", card)
    assert re.search(r"\| ended \| 20\d\d-\d\d-\d\dT", card)
    assert "its weights were not compared" in card
    assert "AutoModelForCausalLM" in card
    assert "alder" not in card
    assert all(len(line) <= 120 for line in card.splitlines()), max(card.splitlines(), key=len)
    export.read_adapter(tmp_path / "named")


def test_what_is_not_known_of_an_adapter_is_left_out(last: Path, tmp_path: Path) -> None:
    shutil.copytree(last, tmp_path / "elsewhere" / "adapter")
    assert typed("export", tmp_path / "elsewhere" / "adapter", "-o", tmp_path / "out").exit_code == 0
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "| rounds | 3 |" in card
    assert "sites that took part" not in card
    assert "| base model | not named" in card
    assert "No measurement of it is known here" in card


def test_what_cannot_be_exported_is_refused_and_nothing_is_left(
    last: Path, llama: Path, bert: Path, tmp_path: Path
) -> None:
    prompt = export.Manifest("b", "causal_lm", "prompt_tuning")
    prompts = export.write_adapter(tmp_path / "prompts", export.Saved(Adapter(dense={"p": torch.ones(2)}), prompt))
    shared = Adapter(dense={"x.lora_A.weight": torch.ones(2, 2)})
    half = export.write_adapter(tmp_path / "half", export.Saved(shared, export.Manifest("b", "causal_lm", "lora")))
    for line, code in (
        ([last, "-o", last], "output_exists"),
        ([last, "-o", tmp_path / "x", "--merge"], "no_base"),
        ([last, "-o", tmp_path / "x", "--merge", "--base", "owner/name"], "no_base"),
        ([last, "-o", tmp_path / "x", "--merge", "--base", bert], "other_base"),
        ([last, "-o", tmp_path / "x", "--base", bert], "other_base"),
        ([prompts, "-o", tmp_path / "x", "--merge", "--base", llama], "changes_no_weights"),
        ([half, "-o", tmp_path / "x", "--merge", "--base", llama], "half_an_adapter"),
        ([llama, "-o", tmp_path / "x"], "adapter_unreadable"),
    ):
        refused = typed("export", *line)
        assert (refused.exit_code, f"[{code}]" in str(refused.exception)) == (1, True), refused.exception
        assert not (tmp_path / "x").exists()
    assert sorted(f.name for f in tmp_path.iterdir()) == ["half", "prompts"]


def test_nothing_is_merged_into_a_quantized_base(last: Path, llama: Path, tmp_path: Path) -> None:
    shutil.copytree(llama, tmp_path / "nf4")
    config = json.loads((llama / "config.json").read_text()) | {"quantization_config": {"load_in_4bit": True}}
    (tmp_path / "nf4" / "config.json").write_text(json.dumps(config))
    refused = typed("export", last, "-o", tmp_path / "x", "--merge", "--base", tmp_path / "nf4")
    assert "[model_is_quantized]" in str(refused.exception)


def test_an_adapter_that_does_not_fit_is_never_merged_in_part(last: Path, llama: Path, tmp_path: Path) -> None:
    """PEFT only warns where a tensor's name is another; what is merged then is a part of the adapter, or nothing."""
    saved = export.read_adapter(last)
    renamed = {name.replace(".layers.1.", ".layers.7."): pair for name, pair in saved.adapter.lora.items()}
    changed = replace(saved, adapter=Adapter(renamed, saved.adapter.dense))
    other = export.write_adapter(tmp_path / "other", changed)
    refused = typed("export", other, "-o", tmp_path / "x", "--merge", "--base", llama)
    assert "[adapter_misfit]" in str(refused.exception)
    assert AutoModelForCausalLM.from_pretrained(llama)  # the base on the disk is untouched


def test_a_plan_of_another_version_does_not_matter_to_the_card(last: Path, tmp_path: Path) -> None:
    saved = export.read_adapter(last)
    for round, plan in ((None, None), (0, RoundPlan())):
        out = export.write_adapter(tmp_path / str(round), export.Saved(saved.adapter, saved.manifest, round, plan))
        assert typed("export", out, "-o", tmp_path / f"{out.name}-exported").exit_code == 0


def test_the_commands_and_the_python_of_the_how_to_run(
    last: Path, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (ROOT / "docs" / "how_to" / "serve_an_adapter.md").read_text(encoding="utf-8")
    shutil.copytree(last.parents[1], tmp_path / "results")
    (tmp_path / "results" / "adapters" / "last").rename(tmp_path / "results" / "adapters" / "best")
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "base").symlink_to(llama)
    monkeypatch.chdir(tmp_path)
    commands = re.findall("^    nvflare-fm (.*)$", page, re.MULTILINE)
    assert len(commands) == 2
    for command in commands:
        assert typed(*command.split()).exit_code == 0, command
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(block, {})
