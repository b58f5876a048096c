"""`nvflare-fm` as a site's IT and a data scientist type it."""

import json
import re
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from transformers import MistralConfig
from typer.testing import CliRunner, Result

from nvflare_fm.cli import app
from nvflare_fm.config import TaskPlan
from nvflare_fm.export.folder import Saved, write_adapter
from nvflare_fm.flare.jobs.job import read_job
from nvflare_fm.flare.kit import job_check, privacy_scope
from nvflare_fm.flare.ledger import Ledger
from nvflare_fm.job import templates
from nvflare_fm.site.model.fingerprint import fingerprint
from nvflare_fm.site.offer.site_file import render
from tests.flare.messages import MANIFEST, adapter
from tests.site import tiny


def typed(*words: Any) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, [str(word) for word in words])


def checked(kit: Path, *words: Any) -> tuple[int, dict[str, dict[str, Any]]]:
    done = typed("site", "check", "--kit", kit, "--quantization", "fp32", "--max-length", 48, "--json", *words)
    return done.exit_code, {finding["what"]: finding for finding in json.loads(done.stdout)}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture
def kit(tmp_path: Path, base: Path) -> Path:
    """A client's startup kit whose site file is ready for a job."""
    for folder in ("startup", "local"):
        (tmp_path / folder).mkdir()
    (tmp_path / "startup" / "fed_client.json").write_text("{}")
    rows = [*tiny.rows("causal_lm", 23), {"prompt": "how is he? ", "completion": "he is ill " * 30}]
    offer(tmp_path, {"path": str(base), "fingerprint": fingerprint(base)}, rows)
    assert typed("site", "allow", "--kit", tmp_path).exit_code == 0
    return tmp_path


def offer(kit: Path, model: dict[str, str], rows: list[dict[str, Any]]) -> None:
    file = tiny.jsonl(kit / "notes.jsonl", rows)
    said = {"models": {"base": model}, "data": {"notes": {"train": str(file)}}, "limits": {"threads": 1}}
    said |= {"welcome": {"orgs": ["company"]}}
    (kit / "local" / "fm_site.yaml").write_text(render(said))


def test_a_site_that_is_ready_is_told_so_with_what_a_step_costs(kit: Path):
    status, found = checked(kit)
    assert status == 0, found
    assert "holds the weights" in found["model base"]["text"]
    assert found["data notes"]["text"].startswith("22 rows to train on; ")
    assert "MiB at its peak" in found["data notes"]["text"]
    assert "read as jsonl, encoding utf-8 (guessed: encoding)" in found["data notes"]["text"]
    assert re.search(r"1 row is cut: \d+ tokens, 1 answer not .*max_length = 48", found["data notes"]["text"])
    assert re.search(r"nvflare 2\.9\S* torch \S+ transformers \S+ peft \S+ bitsandbytes", found["versions"]["text"])
    assert found["device"]["text"]
    assert re.search(r"[\d.]+ GB free", found["disk"]["text"])
    assert "no metric would leave" in found["data notes"]["text"]  # two rows are held out
    assert found["welcome"]["text"] == "anyone of company"


def test_a_site_that_names_nobody_is_not_ready(kit: Path):
    file = kit / "local" / "fm_site.yaml"
    file.write_text(file.read_text().replace('  orgs: ["company"]', '  # orgs: ["company"]'))
    status, found = checked(kit)
    assert (status, found["welcome"]["good"]) == (1, False)
    assert found["welcome"]["text"].startswith("nobody is welcome; name submitters, orgs or both")


def test_whatever_is_wrong_is_marked_with_its_remedy(kit: Path, base: Path):
    offer(kit, {"path": str(base), "fingerprint": "0" * 64}, tiny.rows("causal_lm"))
    (kit / "local" / "resources.json").write_text('{"class_allow_list": ["nvflare_fm."]}')
    (kit / "local" / job_check.FILE).unlink()
    status, found = checked(kit)
    assert status == 1
    assert "'nvflare_fm.' is no component of this version" in found["allow list"]["text"]
    assert found["allow list"]["text"].endswith("run nvflare-fm site allow")
    assert found["job files"] == {"what": "job files", "good": False, "text": "run nvflare-fm site allow"}
    assert f"its fingerprint is {fingerprint(base)}" in found["model base"]["text"]
    assert "pins" in found["data notes"]["text"]
    assert [found[what]["good"] for what in ("allow list", "model base", "data notes")] == [False] * 3


def test_an_unpinned_model_is_fine_and_its_fingerprint_is_shown(kit: Path, base: Path):
    offer(kit, {"path": str(base)}, tiny.rows("causal_lm"))
    status, found = checked(kit, "--rank", 2)
    assert status == 0
    assert found["model base"]["text"] == f"not pinned; to pin it, add fingerprint: {fingerprint(base)}"


def test_error_logs_stay_at_the_site_and_the_check_says_when_they_do_not(kit: Path):
    (kit / "local" / "fm_site.yaml").write_text("limits: {max_rnak: 2}\n")
    assert checked(kit)[1]["error logs"]["text"] == "stay here"
    own = kit / "local" / "resources.json"
    own.write_text(own.read_text().replace('"allow_log_streaming": false', '"allow_log_streaming": true'))
    assert checked(kit)[1]["error logs"]["text"].startswith("go to the server")


def test_a_site_with_a_floor_is_ready_only_where_the_egress_filter_is_in_its_kit(kit: Path):
    file, filtered = kit / "local" / "fm_site.yaml", kit / "local" / privacy_scope.FILE
    assert checked(kit)[1]["egress filter"]["text"] == "no floor is stated in the site file"
    file.write_text(file.read_text().replace("# max_epsilon: 8.0", "max_epsilon: 8.0"))
    status, found = checked(kit)
    assert status == 0, found  # rows and model are tried without the protection that only jobs ask for
    assert found["egress filter"]["text"] == "under a floor: only protected updates leave"
    filtered.unlink()
    status, found = checked(kit)
    assert (status, found["egress filter"]["good"]) == (1, False)
    assert found["egress filter"]["text"].endswith("run nvflare-fm site allow")
    assert typed("site", "allow", "--kit", kit).exit_code == 0
    own = kit / "local" / "resources.json"
    own.write_text(own.read_text().replace('"allow_log_streaming": false', '"allow_log_streaming": true'))
    assert "allow_log_streaming" in checked(kit)[1]["egress filter"]["text"]


def test_a_package_that_fetches_code_is_found_before_it_can(kit: Path, monkeypatch: pytest.MonkeyPatch):
    (kit / "kernels.py").write_text("raise SystemExit('fetched')")
    monkeypatch.syspath_prepend(kit)
    status, found = checked(kit)
    assert status == 1
    assert "pip uninstall kernels" in found["package kernels"]["text"]
    assert "data notes" not in found  # bitsandbytes was not imported


def test_a_fingerprint_can_be_copied_from_its_line(kit: Path, base: Path):
    offer(kit, {"path": str(base)}, [])
    assert fingerprint(base) in typed("site", "check", "--kit", kit).stdout


def test_the_lines_are_for_people_and_a_site_file_with_a_typo_is_named(kit: Path):
    (kit / "local" / "fm_site.yaml").write_text("limits: {max_rnak: 2}\n")
    done = typed("site", "check", "--kit", kit)
    assert done.exit_code == 1
    assert "✗" in done.stdout
    assert "max_rank" in done.stdout


def test_permission_is_taken_out_again(kit: Path):
    assert "fm_site.yaml.removed" in typed("site", "allow", "--kit", kit, "--remove").stdout
    assert "nothing to take out" in typed("site", "allow", "--kit", kit, "--remove").stdout
    refused = typed("site", "allow", "--kit", kit / "local")
    assert refused.exit_code == 1
    assert "[not_a_kit]" in str(refused.exception)


def test_what_cannot_be_asked_is_refused_before_anything_is_loaded(kit: Path):
    refused = typed("site", "check", "--kit", kit, "--quantization", "nf3")
    assert "quantization" in str(refused.exception)


# --- as a data scientist types it


def test_every_template_is_listed_with_what_it_is_for() -> None:
    lines = typed("templates").stdout.splitlines()
    assert len(lines) == len(templates.names())
    assert lines[0].split() == ["continue_from_adapter", *templates.load("continue_from_adapter").description.split()]


def test_the_help_of_a_template_has_every_setting_with_its_comment() -> None:
    shown = " ".join(typed("new", "lora_text_classification", "--help").stdout.split())
    settings = templates.load("lora_text_classification").settings()
    assert len(settings) > 55
    for setting in settings:
        assert templates.shortest(setting, settings) in shown
        assert setting.meaning.split()[0] in shown
    assert "key=value" in typed("new", "--help").stdout


@pytest.fixture
def job(tmp_path: Path) -> Path:
    return tmp_path / "jobs" / "mine"


def test_values_are_set_where_they_belong_and_every_comment_stays(job: Path) -> None:
    done = typed(
        *("new", "lora_text_classification", "-o", job, "labels=[calm, very ill]", "training.learning_rate=3e-3"),
        *("gradient_checkpointing=true", "target_modules=q_proj,v_proj", "executor.rank=4", "rank=8", "weigh=uniform"),
    )
    assert done.exit_code == 0, done.exception
    plan = read_job(job).plan
    assert (plan.labels, plan.training.learning_rate) == (("calm", "very ill"), 3e-3)
    assert (plan.peft["target_modules"], plan.peft["rank"]) == (("q_proj", "v_proj"), 8)
    assert (plan.training.gradient_checkpointing, plan.template) == (True, "lora_text_classification")
    assert (read_job(job).name, read_job(job).sites["@ALL"].overrides.rank) == ("mine", 4)
    before, after = (
        [text for f in sorted(folder.rglob("*.conf")) for text in re.findall("  # (.*)", f.read_text())]
        for folder in (templates.folder() / "lora_text_classification", job)
    )
    assert [text.rpartition("# ")[2] for text in before] == [text.rpartition("# ")[2] for text in after]
    assert not [file for file in job.rglob("*") if file.name == "custom"]


def test_a_rule_may_be_given_with_its_settings(job: Path) -> None:
    weigh = 'weigh=["examples", {"rule": "loss", "q": 2}]'
    done = typed("new", "lora_instruction_tuning", "-o", job, weigh, 'step={"rule": "momentum", "beta": 0.9}')
    assert done.exit_code == 0, done.exception
    how = read_job(job).settled.aggregation
    assert list(how.weigh) == ["examples", {"rule": "loss", "q": 2}]
    assert how.step == {"rule": "momentum", "beta": 0.9}


@pytest.mark.parametrize(
    ("setting", "code", "named"),
    [
        ('step={"rule": "adam", "beta_1": 1}', "wrong_setting", '"beta1"'),
        ("step={rule: adam}", "not_json", "{rule: adam}"),
        ("lerning_rate=1", "wrong_setting", '"learning_rate"'),
        ("training.lerning_rate=1", "wrong_setting", '"plan.training.learning_rate"'),
        ("batch_size=3", "ambiguous_setting", "evaluation.batch_size"),
        ("quantization=nf3", "wrong_setting", "plan: quantization"),
        ("learning_rate=fast", "wrong_setting", "plan: training.learning_rate"),
        ("learning_rate=-1", "wrong_setting", "learning_rate"),
        ("num_rounds=0", "wrong_setting", "controller: num_rounds"),
        ("merge=exakt", "unknown_name", '"exact"'),
        ("executor.rank=0", "wrong_setting", "rank"),
        ("method=lorra", "unknown_name", '"lora"'),
        ("path=os.system", "wrong_setting", "'path'"),
        ("persistor_id=other", "wrong_setting", "'persistor_id'"),
        ("labels", "no_assignment", "labels"),
        ("adapter=x", "no_adapter", "lora_text_classification"),
        ("sites.oak.rank=2", "sites_alike", "lora_text_classification"),
    ],
)
def test_a_setting_or_value_that_cannot_be_is_refused_and_nothing_is_written(
    job: Path, setting: str, code: str, named: str
) -> None:
    refused = typed("new", "lora_text_classification", "-o", job, setting)
    assert refused.exit_code == 1
    assert f"[{code}]" in str(refused.exception)
    assert named in str(refused.exception)
    assert not job.parent.exists() or not list(job.parent.iterdir())


def test_a_folder_that_exists_is_not_overwritten_and_an_unknown_template_is_named(job: Path) -> None:
    job.mkdir(parents=True)
    assert "[output_exists]" in str(typed("new", "lora_text_classification", "-o", job).exception)
    assert not list(job.iterdir())
    assert 'did you mean "evaluate_adapter"' in str(typed("new", "evaluate_adaptor", "-o", job / "x").exception)
    assert "-o FOLDER" in str(typed("new", "lora_text_classification").exception)


def test_the_sites_that_are_named_are_the_sites_of_the_job(job: Path) -> None:
    done = typed(
        *("new", "lora_mixed_hardware", "-o", job, "sites.oak.rank=2", "sites.clinic.model=small"),
        *("sites.oak.quantization=int8", "rank=8"),
    )
    assert done.exit_code == 0, done.exception
    sites = {site: e.overrides.model_dump(exclude_none=True) for site, e in read_job(job).sites.items()}
    as_shipped = {"rank": 4, "batch_size": 1}
    assert sites == {"oak": {"rank": 2, "quantization": "int8"}, "clinic": {**as_shipped, "model": "small"}}
    assert sorted(f.name for f in job.iterdir() if f.is_dir()) == ["app_clinic", "app_oak", "app_server"]
    wrong = typed("new", "lora_mixed_hardware", "-o", job.parent / "b", "sites.a/b.rank=2")
    assert "[site_name]" in str(wrong.exception)


def test_an_adapter_is_copied_in_and_the_job_takes_its_task_and_peft_settings(job: Path, tmp_path: Path) -> None:
    peft = {"method": "lora", "rank": 2, "target_modules": ["q_proj"]}
    plan = TaskPlan.read({"peft": peft, "model": "small", "quantization": "bf16", "max_length": 77}, "test")
    earlier = write_adapter(tmp_path / "earlier", Saved(adapter(1), MANIFEST, 4, plan))
    assert typed("new", "continue_from_adapter", "-o", job, f"adapter={earlier}").exit_code == 0
    made = read_job(job)
    assert made.adapter
    assert (made.plan.peft["rank"], made.plan.peft["target_modules"], made.settled.global_rank) == (2, ("q_proj",), 3)
    assert (made.plan.model, made.plan.quantization, made.plan.max_length) == ("small", "bf16", 77)
    typed("new", "continue_from_adapter", "-o", job.parent / "c", f"adapter={earlier}", "max_length=99")
    assert read_job(job.parent / "c").plan.max_length == 99
    for template in ("continue_from_adapter", "evaluate_adapter"):
        assert "[no_adapter]" in str(typed("new", template, "-o", job.parent / "b").exception)
        gone = typed("new", template, "-o", job.parent / "b", f"adapter={tmp_path / 'none'}")
        assert "[adapter_unreadable]" in str(gone.exception)


def test_a_plan_is_shown_to_people_and_to_programs(job: Path, base: Path) -> None:
    typed("new", "lora_instruction_tuning", "-o", job, "local_steps=7")
    shown = typed("plan", job, "--model", base, "--seconds-per-step", "0.5").stdout
    assert "every site" in shown
    assert "7 × 16 rows" in shown
    assert "3.5" in shown
    told = json.loads(typed("plan", job, "--model", base, "--json").stdout)
    assert told["sites"][0]["bytes_up"] > 0
    assert "--model" in typed("plan", job).stdout
    for option in ("--seconds-per-step", "--memory"):
        for number in ("quick", "-3", "0", "nan", "inf", "birch="):
            assert "[no_number]" in str(typed("plan", job, "--model", base, option, number).exception)
    for folder in (job, job / "nowhere"):
        assert "[no_config]" in str(typed("plan", job, "--model", folder).exception)
    assert "--model" in str(typed("plan", job, "--measure").exception)


def test_a_machine_can_be_measured_with_the_model(job: Path, base: Path) -> None:
    small = ("max_length=32", "quantization=fp32", "training.batch_size=2", "gradient_accumulation_steps=1")
    typed("new", "lora_instruction_tuning", "-o", job, *small)
    told = json.loads(typed("plan", job, "--model", base, "--measure", "--json").stdout)
    assert 0 < told["sites"][0]["seconds"] < 100


def test_the_commands_of_the_how_to_do_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = Path(__file__).parents[1] / "docs" / "how_to" / "submit_a_job.md"
    monkeypatch.chdir(tmp_path)
    plan = TaskPlan.read({"peft": {"method": "lora", "rank": 3}}, "test")
    write_adapter(tmp_path / "results" / "adapters" / "best", Saved(adapter(1), MANIFEST, 4, plan))
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "base").symlink_to(tiny.save(tmp_path / "bert", "bert"))
    commands = re.findall(r"^    nvflare-fm (.*?)(?:  +#.*)?$", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(commands) >= 10
    Ledger(0, 1, ["north"], 0).write(tmp_path / "results")
    stops = {
        "simulate": "there is no north.jsonl",
        "explain JOB": "no startup kit of an admin",
        "resume JOB": "is neither a folder nor the id of a job",
    }
    for command in commands:
        done = typed(*command.replace("results/JOB_ID", "results").replace("JOB_ID", str(UUID(int=0))).split())
        said = next((reason for begins, reason in stops.items() if command.startswith(begins)), None)
        assert (done.exit_code == 0) == (said is None), f"{command}: {done.exception}"
        assert said is None or said in str(done.exception)


def test_the_commands_of_the_readme_do_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that need data are run elsewhere; here they find none. What 7B takes is told from a configuration alone."""
    page = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "base").symlink_to(tiny.save(tmp_path / "bert", "bert"))
    MistralConfig().save_pretrained(tmp_path / "models" / "mistral-7b")
    commands = re.findall(r"^nvflare-fm (.*)$", page, re.MULTILINE)
    assert len(commands) == 6
    stops = {"simulate": "there is no north.jsonl", "export": "cannot be read"}
    for command in commands:
        done = typed(*command.split())
        said = stops.get(command.split()[0])
        assert (done.exit_code == 0) == (said is None), f"{command}: {done.exception}"
        assert said is None or said in str(done.exception)
    (cost,) = json.loads(typed("plan", "seven_b", "--model", "models/mistral-7b", "--memory", "24", "--json").stdout)[
        "sites"
    ]
    assert cost["memory_bytes"] < 24 * 2**30
    assert cost["rank_that_fits"] >= 16
