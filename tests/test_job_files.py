"""What a job may bring: what is accepted has every value in the file itself, also after NVFlare has resolved it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from nvflare.fuel.utils.config_service import ConfigService
from nvflare.fuel.utils.json_scanner import JsonScanner
from nvflare.fuel.utils.wfconf import resolve_var_refs

from nvflare_fm.errors import ConfigError
from nvflare_fm.job import job_files
from nvflare_fm.synthesis import candidates
from nvflare_fm.synthesis.candidates import Candidate, CandidateSet, Provenance, write
from tests.texts import values

SECRET = "hf_CANARY"
KNOWN_TO_NVFLARE = {"WORKSPACE": SECRET, "@made": {"a": "{FM_CANARY}"}, "FM_CANARY": SECRET}
CLIENT, SERVER = "config/config_fed_client.json", "config/config_fed_server.conf"
BRACES = (
    "{$FM_CANARY}",
    "}$FM_CANARY}",
    "a{WORKSPACE}b",
    "{@made:FM_CANARY=1}",
    "x{WORKSPACE:>99}",
    "{",
    "}",
    "{}",
    "a",
)


def check(files: Mapping[str, bytes | str], needs: str = "") -> None:
    data = {name: text.encode() if isinstance(text, str) else text for name, text in files.items()}
    job_files.check_app(list(data), lambda name: data[name][: job_files.most_bytes(name) + 1], needs)


def code(files: Mapping[str, bytes | str], needs: str = "") -> str:
    with pytest.raises(ConfigError) as error:
        check(files, needs)
    return error.value.code


def resolved(config: dict[str, Any]) -> Any:
    """As NVFlare's job processes resolve a configuration, whatever its format."""
    resolve_var_refs(JsonScanner(config), dict(KNOWN_TO_NVFLARE))
    return config


@pytest.fixture(autouse=True)
def canary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FM_CANARY", SECRET)


@given(
    st.dictionaries(
        st.text("abc$@", max_size=3), st.sampled_from(BRACES) | st.lists(st.sampled_from(BRACES)), max_size=3
    )
)
@example({"a": "}$FM_CANARY}"})
def test_what_is_accepted_stays_as_it_is_when_nvflare_resolves_it(config: dict[str, Any]) -> None:
    text = json.dumps(config)
    if any(mark in text[1:-1] for mark in "{}"):
        assert code({CLIENT: text}) == "reads_environment"
    else:
        check({CLIENT: text})
        assert resolved(json.loads(text)) == config


@pytest.mark.parametrize("value", BRACES[:5])
def test_nvflare_would_resolve_them(value: str) -> None:
    """Else the law above would say little; the environment is read for JSON, too."""
    assert resolved({"a": value})["a"] != value
    assert code({CLIENT: json.dumps({"a": [{"b": value}]})}) == "reads_environment"
    assert code({SERVER: f"a = [{{ b = {json.dumps(value)} }}]"}) == "reads_environment"


@given(values)
def test_json_means_what_it_says(said: dict[str, Any]) -> None:
    assert job_files.parse_config("a.json", json.dumps(said).encode()) == said


def test_a_job_of_ours_is_accepted() -> None:
    adapter = "config/initial_adapter/adapter_config.json"
    check({"config/": "", CLIENT: "{}", SERVER: "a = 1", adapter: "{", "config/initial_adapter/x.safetensors": b"\0"})
    check({CLIENT: "{}", ".__nvfl_sig.json": "{", "config/.__nvfl_sig.json": "{"}, job_files.CLIENT)
    check({CLIENT: "{}", "custom/net.yaml": "a: ${oc.env:HOME}"})  # code is a right of its own


def test_synthetic_rows_are_read_at_one_place_and_no_other_lines_of_json_are_there() -> None:
    rows = write(CandidateSet((Candidate(text="a text", label="a"),), Provenance()))
    check({CLIENT: "{}", job_files.SYNTHETIC: rows, "custom/rows.jsonl": b"{"})
    large = write(CandidateSet(tuple(Candidate(text=f"{i} {'x' * 1900}") for i in range(200)), Provenance()))
    assert len(large) > job_files.MAX_BYTES
    check({CLIENT: "{}", job_files.SYNTHETIC: large})
    for data in (b"", b"{}", rows + b'{"text": 7}\n', b"\xff", b"[" * 10_000, rows + b"x" * candidates.LARGEST):
        assert code({CLIENT: "{}", job_files.SYNTHETIC: data}) == "candidates_unreadable"
    for name in (
        "synthetic.jsonl",
        "config/other.jsonl",
        "config/a/synthetic.jsonl",
        "a/config/synthetic.jsonl",
        "config/synthetic.JSONL",
    ):
        assert code({CLIENT: "{}", name: rows}) == "unexpected_file"


CONTENTS = {
    "two keys": (b'{"a": 1, "a": 2}', "not_json"),
    "two keys inside": (b'{"a": {"b": 1, "b": 2}}', "not_json"),
    "no number": (b'{"a": NaN}', "not_json"),
    "infinity": (b'{"a": 1e999}', "not_json"),
    "a number that takes hours to read": (b'{"a": ' + b"9" * 100_000 + b"}", "not_json"),
    "a list": (b"[]", "not_json"),
    "half": (b'{"a": ', "not_json"),
    "nothing": (b"", "not_json"),
    "a byte order mark": (b"\xef\xbb\xbf{}", "not_json"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "not_utf8"),
    "UTF-16 without a mark": ('{"a": 1}'.encode("utf-16-le"), "not_json"),
    "Latin-1": ('{"a": "é"}'.encode("latin-1"), "not_utf8"),
    "brackets": (b'{"a": ' + b"[" * 50_000, "not_json"),
    "closed brackets": (b'{"a": ' + b"[" * 500 + b"]" * 500 + b"}", "not_json"),
    "too large": (b'{"a": "' + b"x" * job_files.MAX_BYTES + b'"}', "file_too_large"),
    "log lines": (b'{"a": {"events_to_convert": ["analytix_log_stats", "_error_log_available"]}}', "sends_events"),
    "any event": (b'{"events_to_convert": "_info_log_available"}', "sends_events"),
    "an object of events": (b'{"events_to_convert": {"_info_log_available": 1}}', "sends_events"),
}


@pytest.mark.parametrize(("data", "why"), CONTENTS.values(), ids=list(CONTENTS))
def test_what_is_not_plain_is_refused(data: bytes, why: str) -> None:
    assert code({CLIENT: data}) == why


def test_metrics_may_be_sent_on() -> None:
    check({CLIENT: '{"args": {"events_to_convert": ["analytix_log_stats"]}}'})


UNEXPECTED = (
    *("config/resources.json", "resources.json", "config/comm_config.json", "x/fed_client.json.default", "a.conf"),
    *("config/config_fed_client.yml", "config/config_fed_client.yaml.default", "config/config_fed_client.json.default"),
    *("config/sub/config_fed_client.json", "config_fed_client.json", "config/CONFIG_FED_CLIENT.JSON", "config/.json"),
    *("config/adapter_config.json", "config/a/b/provenance.json", "config/a/resources.json"),
)


@pytest.mark.parametrize("name", UNEXPECTED)
def test_no_other_file_could_be_read_as_configuration(name: str) -> None:
    assert code({name: "{}"}) == "unexpected_file"


def test_nvflare_would_take_a_jobs_file_for_the_sites(tmp_path: Path) -> None:
    """Else the rule above would be too strict: it looks its own files up by name in all folders below the kit."""
    (tmp_path / "local").mkdir()
    (tmp_path / "local" / "resources.json.default").write_text('{"of": "the site"}')
    (tmp_path / "0-a-job" / "app" / "config").mkdir(parents=True)
    (tmp_path / "0-a-job" / "app" / "config" / "resources.json").write_text('{"of": "the job"}')
    assert ConfigService.load_config_dict("resources.json.default", [str(tmp_path)]) == {"of": "the job"}


ODD = ("../config/x", "/etc/passwd", "config/../../x", "config\\x", "a\nb", "", "config/..", "a\x00b")


@pytest.mark.parametrize("name", ODD)
def test_no_file_has_a_name_that_leads_elsewhere(name: str) -> None:
    assert code({name: ""}) == "odd_file_name"


@pytest.mark.parametrize("names", [["a", "a"], ["a", "./a"], ["a/b", "a//b"], ["a", "a/"]])
def test_no_file_is_there_twice(names: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        job_files.check_app(names, lambda name: b"")
    assert error.value.code == "ambiguous_file"


def test_one_configuration_has_one_format() -> None:
    assert code({CLIENT: "{}", "config/config_fed_client.conf": ""}) == "ambiguous_file"
    assert code({SERVER: ""}, job_files.CLIENT) == "missing_file"


def test_the_number_of_files_is_bounded() -> None:
    many = (f"f{number}" for number in range(10**12))
    with pytest.raises(ConfigError) as error:
        job_files.check_app(many, lambda name: b"")
    assert error.value.code == "too_many_files"
