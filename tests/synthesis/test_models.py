"""What loads models: texts as points, candidates from a language model, variations, and a site's look at them."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from nvflare_fm.cli import app
from nvflare_fm.cli.audit import site_of
from nvflare_fm.errors import ConfigError, ModelError
from nvflare_fm.site.model.base_model import BaseModel
from nvflare_fm.synthesis import candidates, generate, look
from nvflare_fm.synthesis.candidates import Candidate, CandidateSet, Provenance
from nvflare_fm.synthesis.embed import Encoder, embed, load
from nvflare_fm.synthesis.generate import Request, Sampling
from nvflare_fm.synthesis.vary import vary
from tests.codes import refused
from tests.site import tiny

TEXTS = [*tiny.SENTENCES[:8], " and ".join(tiny.SENTENCES[8:11])]
REQUEST = Request.read(
    {"about": "notes", "labels": ["calm", "ill"], "examples": [{"label": "well", "text": TEXTS[2]}]}, "request"
)
FEW = Sampling(per_label=4, most_tokens=12, batch_size=8)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    return load(tiny.save(tmp_path_factory.mktemp("bert"), "bert"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def generator(folder: Path) -> BaseModel:
    return generate.load(folder)


def test_a_text_is_one_point_of_length_1_whatever_it_is_read_with(encoder: Encoder):
    together = embed(TEXTS, encoder)
    assert torch.allclose(together.norm(dim=1), torch.ones(len(TEXTS)), atol=1e-6)
    alone = torch.cat([embed([text], encoder) for text in TEXTS])
    assert torch.allclose(together, alone, atol=1e-5)
    assert torch.allclose(embed(TEXTS[::-1], encoder, batch_size=2), alone.flip(0), atol=1e-5)
    assert embed([], encoder).shape == (0, together.shape[1])


def test_a_folder_without_a_model_is_no_encoder(encoder: Encoder, tmp_path: Path):
    encoder.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelError):
        load(tmp_path)


def test_the_same_seed_writes_the_same_texts_and_another_one_others(generator: BaseModel):
    ticks, state = list[int](), torch.random.get_rng_state()
    made = generate.generate(generator, "tiny", REQUEST, FEW, ticks.append)
    assert torch.equal(state, torch.random.get_rng_state())  # nobody else's chance depends on it
    assert made == generate.generate(generator, "tiny", REQUEST, FEW)
    other = generate.generate(generator, "tiny", REQUEST, Sampling(4, most_tokens=12, batch_size=8, seed=1))
    assert other.digest != made.digest
    assert sum(ticks) == len(made.rows) > 0
    assert made.provenance.fingerprint == generator.fingerprint
    assert made.provenance.prompts == REQUEST.digest
    assert candidates.read(candidates.write(made), "set") == made


def test_no_label_gets_more_texts_than_were_asked_for_and_none_twice(generator: BaseModel):
    made = generate.generate(generator, "tiny", REQUEST, FEW)
    for label in REQUEST.labels:
        texts = [row.text for row in made.rows if row.label == label]
        assert len(texts) <= FEW.per_label
        assert len({*texts, *(example.text for example in REQUEST.examples)}) == len(texts) + 1


def test_a_repeated_prompt_draws_from_the_same_distribution_as_the_whole_one(generator: BaseModel):
    """At a temperature near 0 sampling takes the likeliest token: what the cache left is what the prompt leaves."""
    prompt, cold = REQUEST.prompt("calm"), Sampling(1, temperature=1e-4, most_tokens=8)
    ids = generator.tokenizer(prompt, return_tensors="pt")["input_ids"]
    whole = generator.model.generate(ids, do_sample=False, max_new_tokens=8, pad_token_id=0)
    expected = generator.tokenizer.decode(whole[0, ids.shape[1] :], skip_special_tokens=True)
    drawn = generate.sample(generator, prompt, 3, REQUEST, cold, "seed")
    assert drawn == [generate._ended(expected, REQUEST.ends_at)] * 3


@pytest.mark.parametrize(
    ("text", "good"),
    [("where is my card", True), ("card", False), ("", False), ("call +1 555 123-4567 now", False)],
)
def test_a_text_of_use_says_something_new_and_nothing_personal(text: str, good: bool):
    assert generate.of_use(text, ["another one here"]) == good
    assert not generate.of_use(text, [text.upper()])


def test_a_prompt_that_is_too_long_and_a_set_that_is_too_large_are_refused(generator: BaseModel):
    long = REQUEST.model_copy(update={"about": "a b c d " * 1000})
    with refused("prompt_too_long", ConfigError):
        generate.generate(generator, "tiny", long, FEW)
    with refused("too_many_candidates", ConfigError):
        generate.generate(generator, "tiny", REQUEST, Sampling(20_000))


def test_variations_stand_beside_the_chosen_whose_votes_are_gone(generator: BaseModel):
    chosen = CandidateSet(
        tuple(Candidate(text=text, label="calm", votes=3.0) for text in TEXTS[:4]), Provenance(epsilon=1.0)
    )
    made = vary(generator, "tiny", REQUEST, chosen, FEW)
    assert [row.text for row in made.rows[:4]] == TEXTS[:4]
    assert all(row.votes is None for row in made.rows)
    assert {row.label for row in made.rows} == {"calm"}
    assert len({row.text for row in made.rows}) == len(made.rows) <= 4 + FEW.per_label
    assert made.provenance.parent == chosen.digest
    assert made.provenance.epsilon is None  # nobody has voted on it


def kit(place: Path, encoder: Path) -> Path:
    (place / "local").mkdir()
    (place / "startup").mkdir()
    rows = [{"text": f"{text} at ward {number}", "label": "calm"} for number, text in enumerate(tiny.SENTENCES)]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    site = {"models": {"base": {"path": str(encoder)}}, "data": {"notes": {"train": str(place / "rows.jsonl")}}}
    (place / "local" / "fm_site.yaml").write_text(json.dumps(site))
    return place


def test_a_site_sees_near_copies_and_prints_no_private_row_unless_asked(tmp_path: Path):
    place = kit(tmp_path, tiny.save(tmp_path / "bert", "bert"))
    copy = f"{tiny.SENTENCES[3]} at ward 3"
    rows = (Candidate(text=copy.upper(), label="calm", votes=2.0), Candidate(text="a text of its own", label="ill"))
    (tmp_path / "set.jsonl").write_bytes(candidates.write(CandidateSet(rows, Provenance())))
    words = ["synth", "look", str(tmp_path / "set.jsonl"), "--data", "notes", "--kit", str(place)]
    shown = CliRunner(env={"COLUMNS": "200"}).invoke(app, words)
    assert shown.exit_code == 0, shown.output
    assert "private row" in shown.output
    private = [f"{text} at ward {number}" for number, text in enumerate(tiny.SENTENCES)]
    assert not any(text in shown.output for text in private)
    whole = CliRunner(env={"COLUMNS": "200"}).invoke(app, [*words, "--show-private"])
    assert any(text in whole.output for text in private)
    found = look.look(site_of(place), CandidateSet(rows, Provenance()), "notes", "base")
    assert set(found.reasons) >= {0}
    assert found.distances[0] < found.distances[1]


def test_the_commands_write_a_set_and_its_variations(folder: Path, tmp_path: Path):
    (tmp_path / "request.yaml").write_text("about: notes\nlabels: [calm, ill]\n")
    common = ["--model", str(folder), "--per-label", "3", "--tokens", "12"]
    first, second = tmp_path / "candidates.jsonl", tmp_path / "varied.jsonl"
    words = ["synth", "generate", str(tmp_path / "request.yaml"), *common, "-o", str(first)]
    assert CliRunner().invoke(app, words).exit_code == 0
    words = ["synth", "vary", str(tmp_path), "--request", str(tmp_path / "request.yaml"), *common, "-o", str(second)]
    assert CliRunner().invoke(app, words).exit_code == 0
    made, varied = (candidates.read(file.read_bytes(), file.name) for file in (first, second))
    assert varied.provenance.parent == made.digest
    assert varied.rows[: len(made.rows)] == made.rows
    told = CliRunner().invoke(app, ["synth", "measure", str(second)])
    assert "distinct-2" in told.output
