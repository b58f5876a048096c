"""The second demo: lower is better in all it shows, its sample answers are transformers' own, and no disease is in two
splits of its rows.
"""

import gzip
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from nvflare_fm.cli.terminal import console
from nvflare_fm.compare import data_sets
from nvflare_fm.demo import answers, federation, medquad, notes, report, samples
from nvflare_fm.demo.report import MEAN, WORST, Results
from nvflare_fm.demo.show import command
from nvflare_fm.demo.trial import Trial
from nvflare_fm.errors import ConfigError, DataError
from nvflare_fm.site.tasks import IGNORED
from nvflare_fm.site.tasks import registry as tasks
from tests.codes import refused
from tests.site import tiny
from tests.test_demo import GOOD, folder

ROWS = [{"instruction": f"how is {i}?", "output": sentence} for i, sentence in enumerate(tiny.SENTENCES)]
SITES = {"north": ROWS[:12], "south": ROWS[20:32]}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory, llama: Path) -> dict[str, Trial]:
    """A trial by what is better."""
    root = tmp_path_factory.mktemp("trials")
    lower = answers.prepare(folder(root / "answers", SITES), llama, root / "out", rounds=1, steps=1, seed=0)
    sites = dict.fromkeys(SITES, GOOD)
    return {"min": lower, "max": notes.prepare(folder(root / "notes", sites), root / "out", rounds=1, steps=1, seed=0)}


@pytest.mark.parametrize(("better", "metric"), [("min", "bits_per_byte"), ("max", "macro_f1")])
def test_the_job_is_told_which_end_of_its_metric_is_better(both: dict[str, Trial], better: str, metric: str) -> None:
    job = federation.simulation(both[better]).job
    [file] = job.rglob("config_fed_server.json")
    text = file.read_text(encoding="utf-8")
    assert f'"key_metric": "{metric}"' in text
    assert ('"key_metric_mode": "max"' in text) == (better == "max")  # min is the default, and not written


@given(st.dictionaries(st.sampled_from("abcdef"), st.floats(0, 10), min_size=1))
def test_no_site_is_worse_than_the_worst(both: dict[str, Trial], scores: dict[str, float]) -> None:
    lower, higher = (report.with_summary(both[better], scores) for better in ("min", "max"))
    assert lower[WORST] == max(scores.values())
    assert higher[WORST] == min(scores.values())
    assert lower[MEAN] == higher[MEAN]
    assert min(scores.values()) - 1e-9 <= lower[MEAN] <= max(scores.values()) + 1e-9


def printed(table: Table) -> str:
    screen = console(width=400)
    with screen.capture() as shown:
        screen.print(table)
    return shown.get()


RESULTS = Results(
    alone={"north": {"north": 0.5, "south": 0.75}, "south": {"north": 0.875, "south": 0.625}},
    federated=[{"north": 1.0, "south": 1.25}, {"north": 0.25, "south": 0.375}],
    pooled={"south": 0.125, "north": 0.0625},
)


@pytest.mark.parametrize(
    ("better", "title", "lines"),
    [
        (
            "min",
            "Bits per byte (lower is better) on each site's own test answers (your files)",
            [
                ["nothing (base model)", "1.000", "1.250", "1.125", "1.250"],
                ["north alone", "0.500", "0.750", "0.625", "0.750"],
                ["south alone", "0.875", "0.625", "0.750", "0.875"],
                ["federated", "0.250", "0.375", "0.312", "0.375"],
                ["pooled", "0.062", "0.125", "0.094", "0.125"],
            ],
        ),
        (
            "max",
            "Macro-F1 on each site's own test notes (your files)",
            [
                ["north alone", "0.50", "0.75", "0.62", "0.50"],
                ["south alone", "0.88", "0.62", "0.75", "0.62"],
                ["federated", "0.25", "0.38", "0.31", "0.25"],
                ["pooled", "0.06", "0.12", "0.09", "0.06"],
            ],
        ),
    ],
)
def test_the_table_says_who_is_worst_and_what_is_better(
    both: dict[str, Trial], better: str, title: str, lines: list[list[str]]
) -> None:
    above, _, below = printed(report.final_table(both[better], RESULTS)).partition("┏")
    assert " ".join(above.split()) == title
    cells = [[cell.strip() for cell in line.strip("│┃").replace("┃", "│").split("│")] for line in below.splitlines()]
    assert cells[1] == ["trained on", "north", "south", "mean", "worst site"]
    assert [row for row in cells if row[-1].startswith(("0.", "1."))] == lines


def test_only_a_model_that_writes_is_scored_before_it_is_trained(both: dict[str, Trial]) -> None:
    assert report.by_origin(both["min"], RESULTS)["base"] == RESULTS.federated[0]
    assert list(report.by_origin(both["max"], RESULTS)) == ["alone", "federated", "pooled"]


def test_the_picture_compares_each_site_with_its_own_adapter_and_the_mean_with_all(both: dict[str, Trial]) -> None:
    found = report.panels(both["min"], RESULTS)
    assert list(found) == [MEAN, "north", "south"]
    assert (found["south"].curve, found["south"].alone, found["south"].pooled) == ([1.25, 0.375], 0.625, 0.125)
    assert found[MEAN].alone == (0.5 + 0.75 + 0.875 + 0.625) / 4


def adapter(llama: Path, out: Path, scale: float) -> Path:
    """A PEFT folder whose changes to the model are so large."""
    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear"))
    for name, tensor in model.named_parameters():
        if "lora_B" in name:
            tensor.data.normal_(std=scale) if scale else tensor.data.zero_()
    model.save_pretrained(out)
    return out


def said_by(model: torch.nn.Module, tokenizer: Callable[..., object], ids: list[int]) -> str:
    """The most likely token, one after the other, by the model's plain forward pass."""
    new: list[int] = []
    while len(new) < samples.TOKENS and (not new or new[-1] != tokenizer.eos_token_id):
        with torch.inference_mode():
            new.append(int(model(input_ids=torch.tensor([ids + new])).logits[0, -1].argmax()))
    text = tokenizer.decode(new, skip_special_tokens=True).strip()
    return f"{text} …" if len(new) == samples.TOKENS else text


@pytest.mark.parametrize("template", [True, False])
def test_samples_are_the_likeliest_tokens_behind_the_prompt_of_training(
    llama: Path, tmp_path: Path, template: bool
) -> None:
    model = tiny.save(tmp_path / "model")
    if not template:
        (model / "chat_template.jinja").unlink()
    row = {**ROWS[0], "input": "he is 72"}
    [found] = samples.sample(model, changed := adapter(model, tmp_path / "adapter", scale=0.5), [("north", row)])
    tokenizer = AutoTokenizer.from_pretrained(model)
    learned = tasks["causal_lm"].encode(row, tokenizer, tiny.plan(max_length=512)).examples[0]
    prompt = learned["input_ids"][: next(i for i, label in enumerate(learned["labels"]) if label != IGNORED)]
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    assert found.before == said_by(base, tokenizer, prompt)
    assert found.after == said_by(PeftModel.from_pretrained(base, changed).eval(), tokenizer, prompt)
    assert found.before != found.after
    assert (found.site, found.question, found.expected) == ("north", row["instruction"], row["output"])


def test_an_adapter_that_changes_nothing_answers_as_the_base_model_does(llama: Path, tmp_path: Path) -> None:
    found = samples.sample(llama, adapter(llama, tmp_path / "none", scale=0), [("a", ROWS[0]), ("b", ROWS[1])])
    assert [each.site for each in found] == ["a", "b"]
    assert all(each.before == each.after for each in found)


def test_an_answer_is_shown_as_it_is_and_cannot_steer_the_terminal() -> None:
    found = samples.Sample("north", "[red]why?", "x" * 400, "a\x1b[2J", "b\n[/red] c")
    shown = printed(answers.answers_table(found))
    assert "\x1b" not in shown
    assert all(text in shown for text in ("[red]why?", "a\\x1b[2J", "b [/red] c", "x …"))


def published(root: Path) -> Path:
    """A shared folder with 60 rows of each institute in MedQuAD's format, on diseases that institutes share."""
    rows = [
        {
            "site": site,
            "focus": f"Disease {i // 2}",
            "qtype": "causes",
            "question": f"why {i} ?",
            "answer": f"{site} {i}",
        }
        for site in (*medquad.INSTITUTES, "ghr")
        for i in range(60)
    ]
    (root / "data" / "medquad").mkdir(parents=True)
    with gzip.open(root / "data" / "medquad" / "medquad.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return root


def rows_of(found: Path, split: str) -> list[dict[str, str]]:
    return [
        json.loads(line)
        for site in medquad.INSTITUTES
        for line in (found / site / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    ]


def test_no_disease_is_both_trained_and_tested_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVFLARE_FM_SHARED", str(published(tmp_path / "shared")))
    found = medquad.write(tmp_path / "one")
    diseases = {
        split: {int(row["instruction"].split()[1]) // 2 for row in rows_of(found, split)} for split in ("train", "test")
    }
    assert diseases["train"]
    assert diseases["test"]
    assert not diseases["train"] & diseases["test"]
    assert sorted(site.name for site in found.iterdir()) == sorted(medquad.INSTITUTES)
    again = medquad.write(tmp_path / "two")
    assert all(rows_of(found, split) == rows_of(again, split) for split in ("train", "test"))


@pytest.mark.realdata
def test_four_institutes_have_as_many_rows_each(shared: Path, tmp_path: Path) -> None:
    found = medquad.write(tmp_path)
    for site in medquad.INSTITUTES:
        counts = [len((found / site / f"{split}.jsonl").read_text().splitlines()) for split in ("train", "test")]
        assert counts == [200, 24]
    assert all(row["instruction"] and len(row["output"]) <= data_sets.CUT for row in rows_of(found, "train"))


def test_a_mistake_is_found_before_anything_starts(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    how = {"output": tmp_path / "out", "rounds": 1, "steps": 1, "seed": 0}
    with refused("no_such_file", ConfigError, "make models"):
        answers.prepare(None, tmp_path / "nowhere", **how)
    monkeypatch.setenv("NVFLARE_FM_SHARED", str(tmp_path / "nowhere"))
    with refused("no_shared_folder", DataError, "NVFLARE_FM_SHARED", "--data"):
        answers.prepare(None, llama, **how)
    bad = folder(tmp_path / "bad", {"north": ROWS[:2], "south": [ROWS[0], {"instruction": "why?"}]})
    with refused("bad_rows", DataError, "'south'", "line 2", "'output'"):
        answers.prepare(bad, llama, **how)


def test_a_mistake_ends_the_command_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["demo", "--model", str(tmp_path / "no[/x]"), "--output", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as ended:
        command(answers.demo)
    assert str(ended.value).startswith("nvflare-fm: there is no model in ")
    assert "\n" not in str(ended.value)


def test_files_of_ones_own_are_left_where_they_are(llama: Path, tmp_path: Path) -> None:
    mine = folder(tmp_path / medquad.FOLDER, SITES)
    trial = answers.prepare(mine, llama, tmp_path, rounds=1, steps=1, seed=0)
    assert [len(site.rows("train")) for site in trial.sites] == [12, 12]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_demo_runs_through_nvflare(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `make demo-answers` runs it, with a model of two layers and rows made up here."""
    data, out = folder(tmp_path / "data", SITES), tmp_path / "out"
    given = ["--data", data, "--model", llama, "--rounds", 2, "--steps", 2, "--output", out]
    monkeypatch.setattr(sys, "argv", ["demo", *map(str, given)])
    with pytest.raises(SystemExit) as ended:
        command(answers.demo)
    assert not ended.value.code
    found = json.loads((out / "results.json").read_text(encoding="utf-8"))
    scores = found["bits_per_byte"]
    assert list(scores) == ["base", "alone", "federated", "pooled"]
    for trained in (*scores["alone"].values(), scores["federated"], scores["pooled"]):
        assert trained.keys() == scores["base"].keys() == SITES.keys()
        assert all(trained[site] < scores["base"][site] for site in SITES)
    assert [each["site"] for each in found["answers"]] == [*SITES]
    assert any(each["before"] != each["after"] for each in found["answers"])
    assert (out / "curves.png").stat().st_size > 10_000
