"""Audits at a site, from the command line to the report, and the gate in front of an update."""

import shutil
import stat
from dataclasses import replace
from datetime import date
from html import escape
from pathlib import Path
from random import Random
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
import yaml
from typer.testing import CliRunner, Result

from nvflare_fm.adapter import Adapter, Manifest, RoundTask
from nvflare_fm.cli import app
from nvflare_fm.config import PrivacySettings, TaskPlan
from nvflare_fm.errors import ConfigError, DataError, ModelError, PolicyError, WireError
from nvflare_fm.export.folder import Saved, read_adapter, write_adapter
from nvflare_fm.job.tasks import TASKS
from nvflare_fm.site.audit import canaries, measure, report
from nvflare_fm.site.audit.canaries import RECORD, plant, record_of
from nvflare_fm.site.audit.measure import audit
from nvflare_fm.site.data.loading import SiteData
from nvflare_fm.site.offer.site_config import DataSource, SiteConfig, load_site
from nvflare_fm.site.worker import Worker
from tests.codes import refused
from tests.site import tiny

QUIET = {"before": False, "after": False}
MEMBERS, HELD_OUT, CANARIES = 24, 16, 30
SECRET_WORDS = ("walks", "patient", "how is", "calm", "ill", "well")  # of the rows


def typed(*words: Any) -> Result:
    return CliRunner(env={"COLUMNS": "160"}).invoke(app, [str(word) for word in words])


def plan_of(task: str, steps: int = 60, **more: Any) -> TaskPlan:
    training = {"local_steps": steps, "batch_size": 8, "learning_rate": 1e-2 if steps > 9 else 1e-3}
    return tiny.plan(task, training=training, evaluation=QUIET, max_length=64, **more)


def offered(folder: Path, model: Path, task: str, **more: Any) -> SiteConfig:
    """A site with rows to train on and others of the same kind to measure on."""
    rows = Random(0).sample(tiny.rows(task, MEMBERS + HELD_OUT), MEMBERS + HELD_OUT)
    source = {
        "train": str(tiny.jsonl(folder / f"{task}.jsonl", rows[:MEMBERS])),
        "validation": str(tiny.jsonl(folder / f"{task}-held-out.jsonl", rows[MEMBERS:])),
    }
    return tiny.site(model, Path(source["train"]), data={"notes": source}, **more)


def planted(site: SiteConfig, task: str, folder: Path, count: int = CANARIES) -> SiteConfig:
    made = plant(site, plan_of(task), count, folder)
    source = DataSource(train=str(made.folder / canaries.TRAIN), validation=str(made.folder / canaries.VALIDATION))
    return site.model_copy(update={"data": {"notes": source}})


def trained(site: SiteConfig, plan: TaskPlan, folder: Path) -> Path:
    worker = Worker("alder", site)
    worker.train(RoundTask(plan))
    return write_adapter(folder, Saved(*worker.submit(), 0, plan))


def untrained(site: SiteConfig, plan: TaskPlan, folder: Path) -> Path:
    job = Worker("alder", site).opened(RoundTask(plan.model_copy(update={"counts": ()})))
    with job.base.lent():
        values = job.attachment.extract(job.attachment.attach(job.base, Adapter(), job.plan))
    manifest = Manifest(job.base.fingerprint, plan.task, str(plan.peft["method"]), "", plan.labels)
    return write_adapter(folder, Saved(values, manifest, 0, plan))  # as a job's, whose weights may need counts


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "SECRETS", 1)
    monkeypatch.setattr(measure, "CANDIDATES", 100)
    monkeypatch.setattr(measure, "PREFIXES", 6)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, llama: Path) -> SiteConfig:
    """With canaries among its rows."""
    folder = tmp_path_factory.mktemp("site")
    return planted(offered(folder, llama, "causal_lm"), "causal_lm", folder / "planted")


@pytest.fixture(scope="module")
def overfit(tmp_path_factory: pytest.TempPathFactory, site: SiteConfig) -> Path:
    return trained(site, plan_of("causal_lm"), tmp_path_factory.mktemp("adapters") / "overfit")


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory, site: SiteConfig) -> Path:
    return untrained(site, plan_of("causal_lm"), tmp_path_factory.mktemp("adapters") / "fresh")


def test_an_overfit_adapter_tells_its_rows_its_canaries_and_their_secrets(
    site: SiteConfig, overfit: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(measure, "SECRETS", 3)
    found = audit(site, overfit)
    assert found.membership.auc > 0.85
    assert found.membership.low > 0.5
    assert (found.membership.members, found.membership.held_out) == (MEMBERS, HELD_OUT)  # no canary among them
    assert found.canaries
    assert 0.5 < found.canaries.epsilon <= found.canaries.ceiling
    learned, others = found.exposures
    assert all(secret.rank == 1 for secret in learned)
    assert max(secret.rank for secret in others) > 1  # one secret in a hundred is the likeliest by chance
    assert found.copies
    for copies in found.copies:  # of six rows each, more copied from members is a matter of luck
        assert all(longest <= nearest for longest, nearest in zip(copies.longest, copies.nearest, strict=True))


def test_an_adapter_that_was_not_trained_tells_nothing(site: SiteConfig, fresh: Path):
    found = audit(site, fresh)
    assert {*found.scores[0], *found.scores[1]} == {0.0}
    assert found.membership.auc == 0.5
    assert found.membership.low < 0.5 < found.membership.high
    assert found.canaries
    assert found.canaries.epsilon == 0.0
    text = report.html(found, {"torch": "2"}, date(2026, 1, 2))
    assert all(escape(said) in text for said in report.CANNOT)
    assert "do not tell rows" in text
    assert found.digest in text
    assert "2026-01-02" in text


@pytest.mark.parametrize("method", ["ia3", "prompt_tuning", "prefix_tuning"])
def test_every_kind_of_adapter_writes_and_is_audited_whatever_its_job_told_the_server(
    method: str, site: SiteConfig, tmp_path: Path
):
    plan = plan_of("causal_lm", peft={"method": method}, counts=["tokens"])
    found = audit(site, untrained(site, plan, tmp_path / "adapter"))
    assert {*found.scores[0], *found.scores[1]} == {0.0}
    assert found.copies
    assert len(found.copies[0].longest) == 6


def rows_of(site: SiteConfig, plan: TaskPlan) -> SiteData:
    return Worker("alder", site).rows(plan)


@pytest.mark.parametrize("task", TASKS)
def test_every_task_has_canaries_that_are_trained_on_as_their_coins_say(
    task: str, llama: Path, bert: Path, tmp_path: Path
):
    """No other row changes, and a job measures on the same rows as before. Where nothing was learned, nothing shows."""
    model, plan = llama if TASKS[task].learns_text else bert, plan_of(task)
    plain = offered(tmp_path, model, task)
    if task == "causal_lm":  # a tenth of the rows is held out
        train = tiny.jsonl(tmp_path / "all.jsonl", [*tiny.rows(task, 40), {"prompt": "no answer"}])
        plain = tiny.site(model, train, data={"notes": {"train": str(train), "max_bad_rows": 0.2}})
    with_canaries = planted(plain, task, tmp_path / "planted")
    record = record_of(with_canaries.data_set("notes").train)
    assert record
    included = sum(canary.included for canary in record.canaries)
    before, after = rows_of(plain, plan), rows_of(with_canaries, plan)
    count = len(before.different[0])
    assert list(after.different[0])[:count] == list(before.different[0])
    assert len(after.different[0]) == count + included
    assert sorted(after.contents[1]) == sorted(before.contents[1])
    assert after.bad_rows == 0
    if len(before.different[1]) >= 10:
        found = audit(with_canaries, untrained(plain, plan, tmp_path / "adapter"))
        assert found.canaries
        assert (found.canaries.included, found.canaries.epsilon) == (included, 0.0)
        assert {*found.scores[0], *found.scores[1]} == {0.0}
        assert (found.copies is not None) == (task == "causal_lm")


def test_coins_are_fair_and_independent_of_the_rows():
    made = canaries.made_up(plan_of("sequence_classification"), 2000, canaries.SystemRandom())
    assert 850 < sum(canary.included for canary in made) < 1150
    for label in tiny.LABELS:
        coins = [canary.included for canary in made if canary.row["label"] == label]
        assert 0.4 < sum(coins) / len(coins) < 0.6
    assert len({canary.row["text"] for canary in made}) > 1990


def test_a_canary_is_a_patient_of_its_own_where_patients_are_protected():
    made = canaries.made_up(plan_of("causal_lm", privacy={"unit": "patient_id"}), 50, Random(0))
    assert len({canary.row["patient_id"] for canary in made}) == 50


# --- as a site's admin types it


def kit_of(folder: Path, site: SiteConfig) -> Path:
    for name in ("startup", "local"):
        (folder / name).mkdir(parents=True)
    said = {
        "models": {"base": {"path": site.model("base").path}},
        "data": {"notes": {"train": site.data_set("notes").train, "validation": site.data_set("notes").validation}},
    }
    (folder / "local" / "fm_site.yaml").write_text(yaml.safe_dump(said))
    return folder


def test_an_admin_plants_canaries_and_audits_and_files_a_report_without_a_row(
    llama: Path, overfit: Path, tmp_path: Path
):
    kit = kit_of(tmp_path / "kit", offered(tmp_path, llama, "causal_lm"))
    words = ("site", "canaries", "--data", "notes", "--task", "causal_lm", "--max-length", 64, "--kit", kit)
    done = typed(*words, "--count", 20)
    assert done.exit_code == 0, done.output
    folder = kit / "local" / "fm_canaries" / "notes"
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in (folder, *folder.iterdir())}
    assert modes["notes"] == 0o700
    assert {modes[name] for name in ("train.jsonl", "validation.jsonl", "canaries.json")} == {0o600}
    assert "[output_exists]" in typed(*words).output  # new coins would say nothing of what was trained
    file = kit / "local" / "fm_site.yaml"
    before = load_site(file).model("base")
    file.write_text(f"models: {{base: {{path: {before.path}}}}}\n" + done.output[done.output.index("\ndata:") :])
    adapter = trained(load_site(file), plan_of("causal_lm"), tmp_path / "<b>x")
    said, written = (
        typed("audit", adapter, "--data", "notes", "--kit", kit, "-o", tmp_path / name) for name in ("a", "a")
    )
    assert said.exit_code == 0, said.output
    assert "[output_exists]" in written.output
    assert "AUC" in said.output
    text = (tmp_path / "a").read_text(encoding="utf-8")
    made = record_of(str(folder / "train.jsonl"))
    assert made
    values = {str(value) for canary in made.canaries for value in canary.row.values()}
    rows = tiny.rows("causal_lm", MEMBERS + HELD_OUT)
    values |= {str(value).strip() for row in rows for value in row.values()}
    assert not [value for value in values if value in text or value in said.output]
    assert not [word for word in SECRET_WORDS if word in text.split()]
    assert str(tmp_path) not in text
    assert "&lt;b&gt;x" in text
    page = ElementTree.fromstring(text.removeprefix("<!DOCTYPE html>\n"))
    assert len(page.findall(".//{http://www.w3.org/2000/svg}polyline")) == 4
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "")  # it needs no other file


def test_a_claim_that_the_canaries_contradict_is_said_and_sets_the_exit_status(
    site: SiteConfig, overfit: Path, tmp_path: Path
):
    saved = read_adapter(overfit)
    assert saved.plan
    privacy = saved.plan.privacy.model_copy(update={"epsilon": 0.05})
    claims = replace(saved, plan=saved.plan.model_copy(update={"privacy": privacy}))
    folder = write_adapter(tmp_path / "claims", claims)
    done = typed("audit", folder, "--kit", kit_of(tmp_path / "kit", site), "-o", tmp_path / "a.html")
    assert done.exit_code == 1, done.output
    assert "The canaries contradict the ε of 0.05" in done.output


# --- what cannot be audited


def test_what_is_not_whole_or_not_known_is_refused(site: SiteConfig, overfit: Path, bert: Path, tmp_path: Path):
    saved = read_adapter(overfit)
    other = tiny.save(tmp_path / "other", hidden_size=32)
    with refused("other_base", ModelError):
        audit(site.model_copy(update={"models": {"base": tiny.site(other, tmp_path).model("base")}}), overfit)
    with refused("adapter_without_plan", ConfigError):
        audit(site, write_adapter(tmp_path / "bare", Saved(saved.adapter, saved.manifest)))
    with refused("not_offered", PolicyError):
        audit(site, overfit, data="diaries")
    with refused("above_limit", PolicyError):
        audit(site.model_copy(update={"limits": site.limits.model_copy(update={"max_rank": 2})}), overfit)
    halves = Adapter(dense={f"{layer}.lora_A.weight": pair.A for layer, pair in saved.adapter.lora.items()})
    with refused("half_an_adapter", ModelError):
        audit(site, write_adapter(tmp_path / "half", replace(saved, adapter=halves)))
    with refused("adapter_unreadable", ModelError):
        audit(
            site, write_adapter(tmp_path / "task", replace(saved, manifest=replace(saved.manifest, task="preference")))
        )
    broken = Adapter({n: replace(p, B=torch.full_like(p.B, torch.nan)) for n, p in saved.adapter.lora.items()})
    with refused("loss_not_finite", ModelError):
        audit(site, write_adapter(tmp_path / "nan", replace(saved, adapter=broken)))
    damaged = shutil.copytree(overfit, tmp_path / "damaged")
    (damaged / "adapter_config.json").write_text("{}")
    with refused("adapter_damaged", ModelError):
        audit(site, damaged)


def test_a_row_that_is_in_both_files_is_neither(llama: Path, overfit: Path, tmp_path: Path):
    source = offered(tmp_path, llama, "causal_lm").data_set("notes")
    train, held_out = (Path(file).read_text().splitlines(keepends=True) for file in (source.train, source.validation))
    Path(source.validation).write_text("".join(train[:5] + held_out + held_out[:3]))
    data = {"notes": {"train": source.train, "validation": source.validation}}
    found = audit(tiny.site(llama, tmp_path, data=data), overfit)
    assert (found.membership.members, found.membership.held_out, found.in_both) == (MEMBERS - 5, HELD_OUT, 5)
    assert found.canaries is None


def test_rows_that_show_nothing_are_refused(llama: Path, overfit: Path, tmp_path: Path):
    few = offered(tmp_path, llama, "causal_lm").data_set("notes").model_copy(update={"validation": ""})
    with refused("too_few_rows", DataError):
        audit(tiny.site(llama, tmp_path, data={"notes": {"train": few.train}}), overfit)
    same = {"train": few.train, "validation": few.train}
    with refused("too_few_rows", DataError):  # held out are none of them
        audit(tiny.site(llama, tmp_path, data={"notes": same}), overfit)


def test_canaries_that_were_tampered_with_or_do_not_fit_are_refused(
    site: SiteConfig, overfit: Path, llama: Path, tmp_path: Path
):
    source = site.data_set("notes")
    folder = shutil.copytree(Path(source.train).parent, tmp_path / "planted")
    here = site.model_copy(update={"data": {"notes": source.model_copy(update={"train": str(folder / "train.jsonl")})}})
    lines = (folder / "train.jsonl").read_text().splitlines(keepends=True)
    (folder / "train.jsonl").write_text("".join(lines[:-1]))  # a canary less
    with refused("canaries_missing", DataError):
        audit(here, overfit)
    record = (folder / RECORD).read_text()
    (folder / RECORD).write_text(record.replace('"causal_lm"', '"preference"'))
    with refused("canaries_do_not_fit", DataError):
        audit(here, overfit)
    for content in ("", "[]", '{"version": 2}', record.replace('"included"', '"inclouded"')):
        (folder / RECORD).write_text(content)
        with refused("canary_record", ConfigError):
            record_of(str(folder / "train.jsonl"))
    (folder / RECORD).write_text(record)
    (folder / RECORD).chmod(0o640)
    with refused("canary_record", ConfigError):
        record_of(str(folder / "train.jsonl"))
    plain = offered(tmp_path, llama, "causal_lm")
    for count in (19, 5001):
        with refused("canary_count", ConfigError):
            plant(plain, plan_of("causal_lm"), count, tmp_path / "none")
    with refused("canary_too_long", ConfigError):
        plant(plain, plan_of("causal_lm").model_copy(update={"max_length": 16}), 20, tmp_path / "none")
    with refused("too_few_labels", ConfigError):
        plant(plain, plan_of("multi_label", labels=[]), 20, tmp_path / "none")
    assert not (tmp_path / "none").exists()


# --- the gate


def gated(folder: Path, model: Path, task: str, largest: float) -> Worker:
    return Worker("alder", offered(folder, model, task, privacy={"max_membership_auc": largest}))


def test_an_update_that_tells_its_rows_does_not_leave(llama: Path, tmp_path: Path):
    worker = gated(tmp_path, llama, "causal_lm", 0.9)
    with refused("tells_members", PolicyError) as reason:
        worker.train(RoundTask(plan_of("causal_lm")))
    assert not any(character.isdigit() for character in reason.value.message)
    assert "AUC " in reason.value.local
    with pytest.raises(WireError):  # the server cannot ask for it, either
        worker.submit()


@pytest.mark.parametrize("task", TASKS)
def test_an_update_that_tells_little_leaves(task: str, llama: Path, bert: Path, tmp_path: Path):
    model = llama if TASKS[task].learns_text else bert
    assert gated(tmp_path, model, task, 0.999).train(RoundTask(plan_of(task, 2))).adapter


def test_an_update_leaves_as_it_would_without_the_gate(llama: Path, tmp_path: Path):
    plan = plan_of("causal_lm", 2)
    ours, theirs = (
        gated(tmp_path, llama, "causal_lm", largest).train(RoundTask(plan)).adapter.tensors()
        for largest in (0.999, 1.0)
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_where_chance_draws_the_rows_all_of_them_are_compared(llama: Path, tmp_path: Path):
    privacy = PrivacySettings.read({"noise_multiplier": 50.0, "delta": 1e-3}, "plan")
    plan = plan_of("causal_lm").model_copy(update={"privacy": privacy})
    assert gated(tmp_path, llama, "causal_lm", 0.999).train(RoundTask(plan)).protection


def test_rows_too_few_for_the_limit_are_refused_before_training(llama: Path, tmp_path: Path):
    with refused("few_rows", PolicyError) as reason:
        gated(tmp_path, llama, "causal_lm", 0.6).train(RoundTask(plan_of("causal_lm", 4)))
    assert not any(character.isdigit() for character in reason.value.message)
