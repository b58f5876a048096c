"""A hospital's IT says yes: jobs on provisioned sites, submitted by every route, and each refusal with its words."""

import json
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pexpect
import pytest
import torch
from nvflare.fuel.flare_api.api_spec import InvalidJobDefinition
from peft import PeftModel
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from nvflare_fm.export.folder import read_adapter
from tests.deployment import faults
from tests.deployment.conftest import LABELS, PLAN, SECRET, UNKNOWN, edited, rows, visits
from tests.deployment.system import BIN, CANARY, ENVIRONMENT, LEAD, SERVER, SITES, System
from tests.site import tiny

pytestmark = pytest.mark.timeout(560)  # one deployment serves all of this file

# What each clinic is asked in a job, and what it must answer.
REFUSED: dict[str, dict[str, tuple[dict[str, Any], str]]] = {
    "names": {
        "clinic-a": ({"data": "note"}, 'this site offers no data set of that name; did you mean "notes"?'),
        "clinic-b": ({"model": "/srv/models/base"}, "model is a path; a job names aliases"),
        "clinic-c": ({"rank": 99}, "peft.rank is more than the 8 this site allows (max_rank); ask for less"),
    },
    "files": {
        "clinic-a": ({"model": "swapped"}, "the site pins others; point the alias at the pinned ones"),
        "clinic-b": (
            {"data": "few"},
            "this site trains on no fewer than 20 different examples and the data set has fewer",
        ),
        "clinic-c": ({"data": "link"}, "a data file is a link that leads out of its data folder"),
    },
    "labels": {
        "clinic-a": ({}, ""),
        "clinic-b": ({"model": "pickled"}, "pickled weights are never loaded; convert them first"),
        "clinic-c": (
            {"data": "coded"},
            "more rows that cannot be used for this task and these labels than the site's max_bad_rows",
        ),
    },
}

CLASSIFICATION: dict[str, Any] = {
    "task": "sequence_classification",
    "merge": "share_a",  # so each site keeps a half of its adapter to itself
    "head_start": "features",
    "labels": LABELS,
    "data": "visits",
    # one site alone, in an order that its secret decides: at the others' rate one order in many ends in wild logits
    "training": PLAN["training"] | {"local_steps": 16, "learning_rate": 5e-3},
}


@dataclass
class Jobs:
    """Jobs by name: their ids, how they ended, and the folders that came back."""

    ids: dict[str, str] = field(default_factory=dict)
    ended: dict[str, str] = field(default_factory=dict)
    results: dict[str, Path] = field(default_factory=dict)
    watched: str = ""  # what the monitor showed of the job that all sites refuse
    deployed: dict[str, str] = field(default_factory=dict)  # what the server and the sites said when they got it

    def rounds(self, name: str) -> list[dict[str, Any]]:
        text = (self.results[name] / "workspace" / "rounds.jsonl").read_text()
        return [json.loads(line) for line in text.splitlines()]

    def errors(self, name: str) -> str:
        return (self.results[name] / "workspace" / "error_log.txt").read_text()


def asked(name: str) -> dict[str, dict[str, Any]]:
    return {site: dict(overrides) for site, (overrides, _) in REFUSED[name].items()}


def bring_code(job: Path) -> Path:
    custom = next(job.glob("app*")) / "custom"
    custom.mkdir()
    (custom / "mine.py").write_text("print('hello')\n")
    return job


def slip_in(**component: Any) -> Callable[[Any], None]:
    return lambda config: config["components"].append({"id": "extra", **component})


def smuggle(job: Path, marks: Path) -> Path:
    """Each site is to build something that would leave a file there: by name, and inside what it may build."""
    shell = {"execution_mode": "external_process", "command": ["touch", str(marks / "shell")]}
    saved = {"path": "nvflare_fm.export.folder.save_file", "args": {"tensors": {}, "filename": str(marks / "saved")}}
    started = {"path": "subprocess.Popen", "args": {"args": ["touch", str(marks / "started")]}}

    def replace(config: Any) -> None:
        config["executors"][0]["executor"] = {"path": "nvflare_fm.flare.executor.ClientAPIExecutor", "args": shell}

    def nest(config: Any) -> None:
        config["executors"][0]["executor"]["args"]["settings"] = started

    for site, edit in {"clinic-a": replace, "clinic-b": slip_in(**saved), "clinic-c": nest}.items():
        edited(job, "config_fed_client.json", edit, f"app_{site}")
    return job


def read_here(job: Path, outside: Path) -> Path:
    """Each site is to read what is its own: its environment, a file, and a file for one of its own."""

    def ask(config: Any) -> None:
        config["executors"][0]["executor"]["args"].setdefault("settings", {})["data"] = "{$FM_CANARY}"

    edited(job, "config_fed_client.json", ask, "app_clinic-a")
    config = next(job.glob("app_clinic-b/config/config_fed_client.json"))
    config.rename(config.with_suffix(".conf"))
    with config.with_suffix(".conf").open("a") as text:
        text.write(f'\ninclude file("{outside}")\n')
    (job / "app_clinic-c" / "config" / "resources.json").write_text('{"class_allow_list": ["*"]}')
    return job


def of_nvflare_alone(job: Path, marks: Path) -> Path:
    """A job that uses none of our components, and one at the server that it may not."""
    trainer = {"path": "nvflare.app_common.np.np_trainer.NPTrainer", "args": {}}
    saved = {"path": "nvflare_fm.export.folder.save_file", "args": {"tensors": {}, "filename": str(marks / "server")}}
    workflow = {
        "id": "flow",
        "path": "nvflare.app_common.workflows.cross_site_model_eval.CrossSiteModelEval",
        "args": {},
    }
    empty = {"format_version": 2, "task_data_filters": [], "task_result_filters": []}
    client = empty | {"executors": [{"tasks": ["train"], "executor": trainer}], "components": []}
    server = empty | {"workflows": [workflow], "components": [{"id": "extra", **saved}]}
    edited(job, "config_fed_client.json", lambda config: (config.clear(), config.update(client)))
    return edited(job, "config_fed_server.json", lambda config: (config.clear(), config.update(server)))


def as_hocon(job: Path, line: str) -> Path:
    """The job with its meta in HOCON, and one line more."""
    meta = json.loads((job / "meta.json").read_text())
    (job / "meta.json").unlink()
    (job / "meta.conf").write_text("\n".join([*(f"{key} = {json.dumps(value)}" for key, value in meta.items()), line]))
    return job


def by_hand(job: Callable[..., Path], name: str) -> Path:
    """The job as its author would have it: what the recipe refuses is written into the configuration of the site."""
    sites = asked(name)
    path = sites["clinic-b"].pop("model")
    folder = job(name, sites=sites)
    [file] = folder.glob("app_clinic-b/config/config_fed_client.json")
    config = json.loads(file.read_text())
    config["executors"][0]["executor"]["args"].setdefault("settings", {})["model"] = path
    file.write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def console(system: System) -> Iterator[pexpect.spawn]:
    """The admin console, logged in as the lead data scientist."""
    command = str(system.kits / LEAD / "startup" / "fl_admin.sh")
    spawned = pexpect.spawn(command, env=ENVIRONMENT, encoding="utf-8", timeout=60, dimensions=(50, 240))
    spawned.expect("User Name:")
    spawned.sendline(LEAD)
    spawned.expect("> ")
    yield spawned
    spawned.sendline("bye")
    spawned.expect(pexpect.EOF)


def tell(console: pexpect.spawn, command: str, answer: str) -> str:
    """Types a command into the console, waits for `answer` and the next prompt; returns what was said from there on."""
    console.sendline(command)
    console.expect(answer)
    found = console.match.group(0)
    console.expect("> ")
    return found + console.before


def nvflare(system: System, *command: str) -> dict[str, Any]:
    """What `nvflare job …` answers the lead data scientist."""
    words = [BIN / "nvflare", "job", *command, "--startup-kit", system.kits / LEAD, "--format", "json"]
    done = subprocess.run(words, env=ENVIRONMENT, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stdout + done.stderr
    return dict(json.loads(done.stdout)["data"])


@pytest.fixture(scope="session")
def marks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty folder, in which jobs would leave a file if they could."""
    return tmp_path_factory.mktemp("marks")


@pytest.fixture(scope="session")
def jobs(system: System, console: pexpect.spawn, job: Callable[..., Path], marks: Path, tmp_path_factory: Any) -> Jobs:
    """Every job of this file, submitted side by side by all three routes, ended and downloaded."""
    done, folder = Jobs(), tmp_path_factory.mktemp("results")
    each: dict[str, Any] = {site: {} for site in SITES}
    three = job("three_clinics", rounds=2, min_sites=3, sites_per_round=3, sites=each | {"clinic-b": {"rank": 2}})
    shutil.copytree(three, system.kits / LEAD / "transfer" / "three_clinics")
    said = tell(console, "submit_job three_clinics", r"Submitted job: [0-9a-f-]{36}")
    done.ids["three_clinics"] = said.split()[2]
    labels = job("labels", sites=asked("labels"), rounds=2, **CLASSIFICATION)
    done.ids["labels"] = nvflare(system, "submit", "-j", str(labels))["job_id"]
    folders = {
        "names": by_hand(job, "names"),
        "code": bring_code(job("code")),
        "smuggled": smuggle(job("smuggled", sites=each), marks),
        "reads": read_here(job("reads", sites=each), system.kits / "clinic-b" / "local" / "fm_site.yaml"),
        "foreign": of_nvflare_alone(job("foreign"), marks),
    }
    session = system.session()
    done.ids |= {name: session.submit_job(str(folder)) for name, folder in folders.items()}
    watch = [BIN / "nvflare", "job", "monitor", "--metric", "sites_out", done.ids["names"], "--startup-kit"]
    watched = subprocess.Popen(
        [*watch, system.kits / LEAD], env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    for name, job_id in done.ids.items():
        deadline = time.monotonic() + 400
        while not (status := session.get_job_meta(job_id)["status"]).startswith(("FINISHED", "FAILED")):
            assert time.monotonic() < deadline, f"{name} has not ended: {status}"
            time.sleep(1)
        done.ended[name] = status
        done.deployed[name] = str(session.get_job_meta(job_id).get("job_deploy_detail"))
    for name in {*done.ids} - {"three_clinics", "labels"}:
        done.results[name] = Path(session.download_job_result(done.ids[name], str(folder)))
    session.close()
    done.watched = watched.communicate(timeout=60)[0]
    tell(console, f"download_job {done.ids['three_clinics']}", "downloaded|Download")
    done.results["three_clinics"] = system.kits / LEAD / "transfer" / done.ids["three_clinics"]
    nvflare(system, "download", done.ids["labels"], "-o", str(folder))
    done.results["labels"] = folder / done.ids["labels"]
    return done


@torch.inference_mode()
def loss(model: Any, base: Path) -> float:
    words = AutoTokenizer.from_pretrained(base)(tiny.SENTENCES, return_tensors="pt", padding=True)
    labels = words["input_ids"].masked_fill(words["attention_mask"] == 0, -100)
    return float(model(input_ids=words["input_ids"], attention_mask=words["attention_mask"], labels=labels).loss)


def test_what_the_console_downloads_is_a_peft_adapter_that_beats_the_base(jobs: Jobs, base: Path):
    assert jobs.ended["three_clinics"] == "FINISHED:COMPLETED"
    model = AutoModelForCausalLM.from_pretrained(base)
    before = loss(model, base)
    after = loss(
        PeftModel.from_pretrained(model, jobs.results["three_clinics"] / "workspace" / "adapters" / "best"), base
    )
    assert after < before - 0.5


@torch.inference_mode()
def test_a_site_that_shares_half_of_its_adapter_ends_with_a_whole_classifier_that_beats_the_base(
    jobs: Jobs, system: System, base: Path
):
    assert jobs.ended["labels"] == "FINISHED:COMPLETED"
    notes = [row for row in visits(0) if row["label"] in LABELS]
    words = AutoTokenizer.from_pretrained(base)([n["text"] for n in notes], return_tensors="pt", padding=True)
    truth = torch.tensor([LABELS.index(note["label"]) for note in notes])
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=len(LABELS)).eval()
    words.pop("token_type_ids", None)
    before = float(cross_entropy(model(**words).logits, truth))
    tuned = PeftModel.from_pretrained(model, system.kits / "clinic-a" / jobs.ids["labels"] / "own_adapter").eval()
    assert float(cross_entropy(tuned(**words).logits, truth)) < before - 0.1


def test_what_the_command_line_downloads_of_it_is_the_shared_half_and_nothing_else_left_the_site(
    jobs: Jobs, system: System
):
    shared = read_adapter(jobs.results["labels"] / "workspace" / "adapters" / "last").adapter
    assert not shared.lora
    assert any("lora_A" in name for name in shared.dense)
    assert not any("lora_B" in name for name in shared.dense)
    own = read_adapter(system.kits / "clinic-a" / jobs.ids["labels"] / "own_adapter").adapter
    assert own.dense.keys() < shared.dense.keys()
    assert own.lora
    assert all(pair.B.any() for pair in own.lora.values())
    of_the_job = [message for message in system.sent("clinic-a") if jobs.ids["labels"].encode() in message]
    assert any(b"lora_A" in message for message in of_the_job)
    assert not any(b"lora_B" in message for message in of_the_job)


def test_its_head_started_from_what_the_site_tells_of_its_features(jobs: Jobs, system: System):
    assert "sums over features" in system.audit("clinic-a", jobs.ids["labels"])
    assert any(b"head_start.sums" in message for message in system.sent("clinic-a"))
    log = (jobs.results["labels"] / "workspace" / "log.txt").read_text()
    assert "the head starts from features; a row counts so often, by site: clinic-a 1" in log


def test_the_console_lists_the_job_and_knows_who_is_connected(jobs: Jobs, console: pexpect.spawn):
    tell(console, "list_jobs", rf"{jobs.ids['three_clinics']}.*three_clinics.*FINISHED:COMPLETED")
    connected = tell(console, "check_status server", "Registered clients: 3")
    assert all(site in connected for site in SITES)


def test_a_job_can_be_watched_and_read_with_nvflares_own_commands(jobs: Jobs, system: System):
    assert nvflare(system, "meta", jobs.ids["labels"])["status"] == "FINISHED:COMPLETED"


def test_who_took_part_in_each_round_and_what_a_site_lowered_is_in_the_result(jobs: Jobs):
    rounds = [line for line in jobs.rounds("three_clinics") if line["round"] < 2]
    assert [sorted(line["sites"]) for line in rounds] == [sorted(SITES)] * 2
    assert {tuple(s["lowered"]) for line in rounds for s in line["sites"].values()} == {("batch_size to 4",)}


def test_a_site_may_have_a_smaller_rank(jobs: Jobs):
    for line in [line for line in jobs.rounds("three_clinics") if line["round"] < 2]:
        assert {site: told["rank"] for site, told in line["sites"].items()} == {
            "clinic-a": 4,
            "clinic-b": 2,
            "clinic-c": 4,
        }


def test_sites_that_refuse_do_not_sink_the_job_and_are_asked_again_every_round(jobs: Jobs):
    for line in jobs.rounds("labels"):
        assert sorted(line["sites"]) == ["clinic-a"]
        assert sorted(line["asked"]) == sorted(SITES)
        assert {line["out"][site]["kind"] for site in ("clinic-b", "clinic-c")} == {"refused"}
    assert len(jobs.rounds("labels")) == 3


def check_refused(system: System, job_id: str, last: dict[str, Any], site: str, message: str) -> None:
    assert last["out"][site]["kind"] == "refused"
    assert message in last["out"][site]["text"]
    line = next(line for line in system.audit(site, job_id).splitlines() if message in line)
    assert "nvflare_fm refused" in line
    assert job_id in line


@pytest.mark.parametrize(
    ("name", "site"),
    [(name, site) for name in ("names", "labels") for site, (_, said) in REFUSED[name].items() if said],
)
def test_a_refusal_reaches_the_scientist_and_the_sites_audit_log_in_words(
    jobs: Jobs, system: System, name: str, site: str
):
    check_refused(system, jobs.ids[name], jobs.rounds(name)[-1], site, REFUSED[name][site][1])


def test_a_job_that_every_site_refuses_says_so(jobs: Jobs):
    assert jobs.ended["names"] == "FINISHED:EXECUTION_EXCEPTION"
    assert "0 of 3 sites gave a usable update" in jobs.errors("names")


@pytest.mark.slow  # three trainers more; what each says is tested without NVFlare, and a trainer's refusal above
def test_what_trainers_refuse_reaches_the_scientist_in_words(
    jobs: Jobs, system: System, job: Callable[..., Path], tmp_path: Path
):
    number = system.submit(job("files", sites=asked("files")))
    system.wait_for(lambda: system.ended(number), 200, "the job to end")
    assert system.ended(number) == "FINISHED:EXECUTION_EXCEPTION"
    last = faults.rounds(system.download(number, tmp_path))[-1]
    for site, (_, message) in REFUSED["files"].items():
        check_refused(system, number, last, site, message)


@pytest.mark.slow  # NVFlare's monitor asks every few seconds: on a busy machine the job may end in between
def test_the_monitor_shows_why_all_sites_refuse(jobs: Jobs):
    for site, (_, reason) in REFUSED["names"].items():
        assert f"{site}: refused: " in jobs.watched
        assert reason in jobs.watched, jobs.watched


def test_the_lead_is_told_why_no_site_counted_by_the_jobs_id(jobs: Jobs, system: System):
    words = [BIN / "nvflare-fm", "explain", jobs.ids["names"], "--kit", system.kits / LEAD]
    done = subprocess.run(words, env=ENVIRONMENT, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stdout + done.stderr
    for site, (_, reason) in REFUSED["names"].items():
        assert re.search(
            f"^{site}: counted in 0 of 1 rounds\n  round 0: refused: .*{re.escape(reason)}", done.stdout, re.M
        )


def test_what_is_accepted_is_in_the_audit_log_with_who_asked(jobs: Jobs, system: System):
    lines = [
        line for line in system.audit("clinic-b", jobs.ids["three_clinics"]).splitlines() if "]nvflare_fm " in line
    ]
    assert any("lowered: batch_size to 4 [" in line for line in lines)  # where it trains; measuring is not lowered
    for line in lines:
        assert re.search(r"nvflare_fm (accepted|lowered: batch_size to 4) \[causal_lm with model 'base' on", line)
        assert f"for {LEAD} of company]" in line


def test_a_job_that_brings_code_is_not_deployed(jobs: Jobs, system: System):
    assert jobs.ended["code"] == "FINISHED:FAILED_TO_RUN"
    assert f"Failed to run the Job ({jobs.ids['code']})" in system.log(SERVER)
    assert "BYOC not permitted" in system.log(SERVER)
    assert not any((system.kits / site / jobs.ids["code"]).exists() for site in SITES)


BUILT = {
    "clinic-a": "'nvflare_fm.flare.executor.ClientAPIExecutor' at config path 'executors.#1.executor'",
    "clinic-b": "'nvflare_fm.export.folder.save_file' at config path 'components.#2'",
    "clinic-c": "'subprocess.Popen' at config path 'executors.#1.executor.args.data'",
}


def test_what_is_not_on_the_allow_list_is_not_built_whatever_holds_it(jobs: Jobs, system: System):
    """The first site that refuses ends the job at the others, too."""
    logs = {site: system.log(site, jobs.ids["smuggled"]) for site in SITES}
    assert jobs.ended["smuggled"] == "FINISHED:ABNORMAL"
    assert any(f"Component {BUILT[site]} is not in allow_list" in log for site, log in logs.items())
    assert not any("synced to" in log for log in logs.values())


def test_nothing_a_job_named_has_run_at_a_site_or_the_server(jobs: Jobs, marks: Path):
    said = "Component 'nvflare_fm.export.folder.save_file' at config path 'components.#1' is not in allow_list"
    assert said in jobs.errors("foreign")
    assert not list(marks.iterdir())


SAID = {
    "clinic-a": "'executors.0.executor.args.settings.data' has { or } in it",
    "clinic-b": "config/config_fed_client.conf, line ",
    "clinic-c": "'config/resources.json' is no file that a job may bring",
}


@pytest.mark.parametrize("site", list(SITES))
def test_a_job_that_would_read_a_sites_environment_or_files_is_refused_before_that(
    jobs: Jobs, system: System, site: str
):
    assert jobs.ended["reads"] == "FINISHED:FAILED_TO_RUN"
    assert SAID[site] in jobs.deployed["reads"]  # what the submitter sees
    assert not (system.kits / site / jobs.ids["reads"]).exists()
    assert CANARY not in jobs.deployed["reads"]


READS = ("told = ${FM_CANARY}", 'FM_CANARY += "x"', 'include "/etc/passwd"')


@pytest.mark.parametrize("line", READS)
def test_a_job_that_would_read_the_servers_environment_or_files_is_not_taken(
    system: System, job: Callable[..., Path], line: str
):
    folder = as_hocon(job("meta"), line)
    session = system.session()
    try:
        with pytest.raises(InvalidJobDefinition) as error:
            session.submit_job(str(folder))
    finally:
        session.close()
        shutil.rmtree(folder)
    assert "[not_plain_hocon]" in str(error.value)
    assert CANARY not in str(error.value)
    assert "root:" not in str(error.value)


@pytest.mark.parametrize("site", list(SITES))
def test_each_job_that_reached_a_site_is_in_its_audit_log_with_who_submitted_it(jobs: Jobs, system: System, site: str):
    lines = {
        name: re.findall(rf"^.*\[R:{number}\].*nvflare_fm.job.*$", system.audit(site), re.MULTILINE)
        for name, number in jobs.ids.items()
    }
    assert {name: len(found) for name, found in lines.items()} == dict.fromkeys(jobs.ids, 1) | {"code": 0}
    for name, (line, *_) in [(name, found) for name, found in lines.items() if found]:
        outcome = "refused: " if name == "reads" else "accepted "
        assert f"[U:'{LEAD}'][A:nvflare_fm.job]{outcome}" in line
        assert line.endswith(f"[job '{name}', of 'company']")
        assert name != "reads" or SAID[site] in line.replace("\\'", "'")


@pytest.mark.parametrize("site", list(SITES))
def test_nothing_but_adapters_metrics_and_reasons_leaves_a_site(jobs: Jobs, system: System, base: Path, site: str):
    sent = b"".join(system.sent(site))
    assert b"lora_A" in sent  # what is watched is what travels
    assert b"train_loss" in sent
    assert b"refused" in sent
    mine = [row for shift in (0, 9, 18) for row in (*rows(shift), *visits(shift))]
    texts = {row[column] for row in mine for column in ("prompt", "completion", "text") if column in row}
    folders = {str(system.kits), str(system.kits.parents[2]), str(base), str(Path.home())}
    private = {*texts, *folders, *LABELS, SECRET, CANARY, "walks", "Quarantine", UNKNOWN, "Syringomyelia"}
    assert not [text for text in private if text.strip().encode() in sent]
    assert b"id2label" not in sent
    words = {word for run in re.findall(rb"[ -~]{6,}", sent) for word in re.split(rb"[^\w.-]+", run)}
    host = socket.gethostname()
    assert len(host) < 6 or host.encode() not in words  # tensors hold shorter words by chance


@pytest.mark.parametrize("site", list(SITES))
def test_the_secret_of_a_site_is_in_its_own_file_alone(jobs: Jobs, system: System, site: str):
    file = system.kits / site / "local" / "fm_secret"
    assert file.stat().st_mode & 0o777 == 0o600
    secret = file.read_bytes()
    assert secret not in b"".join(system.sent(site))
    assert not [other for other in (system.kits / site).rglob("*") if _holds(other, secret) and other != file]
    assert not [process.pid for process in system.ours.values() if secret.decode() in str(process.environ())]


def _holds(file: Path, content: bytes) -> bool:
    return file.is_file() and content in file.read_bytes()


# --- a site that states a floor

PRIVATE = {"privacy": {"epsilon": 8.0, "delta": 1e-3}}
BY_NVFLARE = {
    "an executor of NVFlare's": lambda config: config["executors"][0].update(
        executor={"path": "nvflare.app_common.np.np_trainer.NPTrainer", "args": {}}
    ),
    "a filter of the job's": lambda config: config["task_result_filters"].append(
        {"tasks": ["train"], "filters": [{"path": "nvflare.app_common.filters.exclude_vars.ExcludeVars", "args": {}}]}
    ),
    "a stream of logs": slip_in(path="nvflare.app_common.logging.job_log_streamer.JobLogStreamer", args={}),
}


def peeking(job: Path) -> Path:
    """A server that asks for the site's own adapter under a name that is no task's."""
    args = {"submit_model_task_name": "peek", "validation_task_name": "other", "submit_model_timeout": 200}
    path = "nvflare.app_common.workflows.cross_site_model_eval.CrossSiteModelEval"

    def ask(config: Any) -> None:
        config["workflows"] = [{"id": "peek", "path": path, "args": args}]

    edited(job, "config_fed_server.json", ask, "app_server")
    return edited(job, "config_fed_client.json", lambda c: c["executors"][0]["tasks"].append("p*k"), "app_clinic-c")


@pytest.fixture(scope="session")
def under_a_floor(system: System, jobs: Jobs, job: Callable[..., Path], tmp_path_factory: Any) -> Jobs:
    """Jobs submitted while one of the sites states a floor, which its kit knows from the next job on."""
    site_file, done = system.kits / "clinic-c" / "local" / "fm_site.yaml", Jobs()
    before, folder = site_file.read_text(), tmp_path_factory.mktemp("floor")
    stated = before.replace("# max_epsilon: 8.0", "max_epsilon: 8.0").replace("# delta: 1e-05", "delta: 1e-3")
    assert "\n  max_epsilon: 8.0" in stated
    two, alone = {"clinic-a": {}, "clinic-c": {}}, {"clinic-c": {}}
    folders = {
        "plain": job("plain", sites=two),
        "private": job("private", sites=two, **PRIVATE),
        "few rows": job("few_rows", sites={"clinic-c": {"data": "few"}}, **PRIVATE),
        "peeks": peeking(job("peeks", sites=alone)),
        "scope": job("scope", sites=alone),
    }
    meta = json.loads((folders["scope"] / "meta.json").read_text()) | {"scope": "wide-open"}
    (folders["scope"] / "meta.json").write_text(json.dumps(meta))
    for number, (name, edit) in enumerate(BY_NVFLARE.items()):
        folders[name] = edited(job(f"way_{number}", sites=alone), "config_fed_client.json", edit, "app_clinic-c")
    site_file.write_text(stated)
    try:
        session = system.session()
        done.ids = {name: session.submit_job(str(each)) for name, each in folders.items()}
        for name, number in done.ids.items():
            system.wait_for(lambda number=number: system.ended(number), 200, f"{name} to end")
            done.ended[name] = system.ended(number)
            done.deployed[name] = str(session.get_job_meta(number).get("job_deploy_detail"))
        for name in ("plain", "private", "few rows"):
            done.results[name] = Path(session.download_job_result(done.ids[name], str(folder)))
        session.close()
    finally:
        site_file.write_text(before)
    return done


def test_a_job_that_could_go_around_the_filter_is_not_deployed_at_a_site_with_a_floor(
    under_a_floor: Jobs, system: System
):
    for name in (*BY_NVFLARE, "scope"):
        code = "no_egress" if name == "scope" else "other_components"
        assert under_a_floor.ended[name] == "FINISHED:FAILED_TO_RUN"
        assert f"[{code}]" in under_a_floor.deployed[name]
        assert not (system.kits / "clinic-c" / under_a_floor.ids[name]).exists()


def test_a_job_without_privacy_goes_on_without_a_site_that_states_a_floor(under_a_floor: Jobs):
    assert under_a_floor.ended["plain"] == "FINISHED:COMPLETED"
    trained, measured = under_a_floor.rounds("plain")
    assert trained["out"]["clinic-c"]["code"] == "unprotected"
    assert measured["out"]["clinic-c"]["code"] == "metrics_withheld"
    assert [*trained["sites"]] == [*measured["sites"]] == ["clinic-a"]


def test_a_reason_that_tells_of_the_rows_stays_at_a_site_with_a_floor(under_a_floor: Jobs, system: System):
    (line,) = under_a_floor.rounds("few rows")
    assert line["out"]["clinic-c"]["code"] == "reason_withheld"
    assert "20 different examples" in system.audit("clinic-c", under_a_floor.ids["few rows"])


def test_an_update_leaves_a_site_with_a_floor_only_with_its_cost(under_a_floor: Jobs):
    for line in under_a_floor.rounds("private"):
        if (told := line["sites"].get("clinic-c")) is not None:
            assert 0 < told["epsilon"] <= 8.0
            assert not told["before"]
            assert "loss" not in told
            assert told["seconds"] == told["peak_memory_mib"] == 0
        else:
            assert line["out"]["clinic-c"]["code"] in ("unprotected", "metrics_withheld")


def test_a_site_with_a_floor_submits_no_adapter_whatever_the_task_is_called(under_a_floor: Jobs, system: System):
    assert "submission_withheld" in system.audit("clinic-c", under_a_floor.ids["peeks"])


def test_nothing_that_is_not_protected_leaves_a_site_with_a_floor(under_a_floor: Jobs, system: System):
    kept = {name: number for name, number in under_a_floor.ids.items() if name != "private"}
    of = {name: [m for m in system.sent("clinic-c") if number.encode() in m] for name, number in kept.items()}
    assert all(b"refused" in b"".join(of[name]) for name in ("plain", "few rows", "peeks"))
    of_rows = rb"lora_A|train_loss|analytix|fed\.event|before/|after/|accuracy|different examples"
    for name, messages in of.items():
        assert not [m for m in messages if re.search(of_rows, m)], name
    private = b"".join(m for m in system.sent("clinic-c") if under_a_floor.ids["private"].encode() in m)
    assert b"fed.event" not in private
    assert b"sample_rate" not in private
    others = b"".join(m for m in system.sent("clinic-a") if under_a_floor.ids["plain"].encode() in m)
    assert b"lora_A" in others  # what is watched is what travels
    assert b"fed.event" in others


# --- last, for the server is killed


def test_a_job_whose_server_was_killed_ends_and_goes_on_after_its_last_round(
    jobs: Jobs, system: System, job: Callable[..., Path], tmp_path: Path
):
    killed = system.submit(job("killed", rounds=3, sites={"clinic-b": {}}))
    run = system.kits / SERVER / killed
    system.wait_for(lambda: faults.last_round(run) >= 0, 120, "a round")
    faults.kill(system, "the server", killed, "clinic-b")
    system.wait_for(lambda: system.ended(killed), 90, "the job to end")
    assert system.ended(killed) == "FINISHED:ABNORMAL"
    assert f"nvflare-fm resume {killed}" in system.meta(killed)["nvflare_fm"]
    saved = faults.last_round(system.download(killed, tmp_path))
    assert saved >= 0
    again = faults.resumed(system, killed, tmp_path / "again")
    system.wait_for(lambda: system.ended(again), 120, "the job that goes on to end")
    assert system.ended(again) == "FINISHED:COMPLETED"
    done = [line["round"] for line in faults.rounds(system.download(again, tmp_path))]
    assert done == list(range(saved + 1, 4))  # the last is the measurement at the end
    assert not faults.left(system, killed)
