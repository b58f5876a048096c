"""A site file is read whole or refused with a code, in bounded time, whatever lies in its place; it starts closed."""

import os
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from nvflare_fm.errors import ConfigError
from nvflare_fm.site.offer.site_config import FILE_NAME, SiteConfig, load_site

MALFORMED, WRONG = "site_file_malformed", "site_file_wrong"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / FILE_NAME


def refused(file: Path, content: str | bytes | None = None) -> ConfigError:
    if content is not None:
        file.write_bytes(content.encode() if isinstance(content, str) else content)
    began = time.process_time()
    with pytest.raises(ConfigError) as error:
        load_site(file)
    assert time.process_time() - began < 5
    assert str(file.parent) not in error.value.message
    return error.value


@pytest.mark.parametrize(
    ("content", "code"),
    [
        ("[1, 2]", MALFORMED),
        ("just a text", MALFORMED),
        ("models: [", MALFORMED),
        (b"\xff\xfe\x00", MALFORMED),
        (b"limits: {max_rank: 4} # \xe4", MALFORMED),
        ("limits: &a [*a]", MALFORMED),
        ("a: &a [x]\nlimits: [*a, *a]", MALFORMED),
        ("limits: {<<: {max_rank: 3}}", MALFORMED),
        ("limits: !!python/object/apply:os.system [true]", MALFORMED),
        ("limits: !!binary x", MALFORMED),
        ("data: {notes: {train: 2001-99-99}}", MALFORMED),
        ("limits: {max_rank: " + "9" * 10_000 + "}", MALFORMED),
        ("? [1]\n: 2", MALFORMED),
        ("limits: {}\n---\nlimits: {}", MALFORMED),
        ("[" * 10_000, MALFORMED),
        ("{a: " * 10_000, MALFORMED),
        ("- " * 10_000, MALFORMED),
        ("\n".join(" " * i + "a:" for i in range(500)), MALFORMED),
        ("a" * 20_000_000, MALFORMED),
        ("# all well\n" * 2_000_000, MALFORMED),
        ("x: " + "y" * 200_000, WRONG),
        ("".join(f"k{i}: 1\n" for i in range(20_000)), WRONG),
        ("1: 2", WRONG),
        ("data: {a/b: {train: x}}", WRONG),
        ("data: {notes: }", WRONG),
        ("limits: {max_rank: }", WRONG),
        ("limits: {max_rank: true}", WRONG),
        ('limits: {max_rank: "4"}', WRONG),
        ("limits: {memory_gib: 0}", WRONG),
        ("limits: {memory_gib: .inf}", WRONG),
        ("limits: {max_seconds_per_round: 0}", WRONG),
        ("privacy: {min_examples: 0}", WRONG),
        ("welcome: {submitters: {name: x}}", WRONG),
        ("models: {base: {trust_remote_code: true}}", WRONG),
        ('data: {notes: {train: "a\\0b"}}', WRONG),
    ],
)
def test_what_is_no_site_file_is_refused_with_a_code(file: Path, content: str | bytes, code: str):
    assert refused(file, content).code == code


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("limits: {max_rank: 3}\nwelcome: {}\nlimits: {max_rank: 4}", 3),
        ("limits:\n  max_rank: 3\n  max_rank: 4", 3),
        ("models:\n  base: {path: a}\n  base: {path: b}", 3),
        ('limits: {"max_rank": 3, max_rank: 4}', 1),
    ],
)
def test_a_key_written_twice_is_named_with_its_line_in_the_sites_own_log(file: Path, text: str, line: int):
    error = refused(file, text)
    assert error.code == "double_key"
    assert f"line {line}" in error.local
    assert "max_rank" not in error.message


def test_what_is_no_file_is_refused_and_nobody_waits_for_it(file: Path):
    assert refused(file).code == "site_file_unreadable"
    os.mkfifo(file)
    assert refused(file).code == MALFORMED
    file.unlink()
    file.mkdir()
    assert refused(file).code in (MALFORMED, "site_file_unreadable")
    file.rmdir()
    file.symlink_to("/dev/zero")
    assert refused(file).code == MALFORMED
    file.unlink()
    file.symlink_to(file.name)
    assert refused(file).code == "site_file_unreadable"


def test_a_mistake_is_named_in_the_sites_log_only(file: Path):
    error = refused(file, "models: {base: {pth: /srv/secret/model}}\n")
    assert "models.base.pth" in str(error)
    assert 'did you mean "path"' in str(error)
    assert "pth" not in error.message
    error = refused(file, "limits: {max_rank: /srv/secret/model}\n")
    assert "secret" in str(error)
    assert "secret" not in error.message


@pytest.mark.parametrize(
    "text", ["", "\n# nothing yet\n", "limits:\nprivacy:\nwelcome:\nmodels:\ndata:\n", "{}", "\ufeff{}"]
)
def test_a_group_left_empty_says_no_more_than_one_that_is_not_there_and_that_is_closed(file: Path, text: str):
    file.write_text(text, encoding="utf-8")
    site = load_site(file)
    assert site == SiteConfig()
    assert site.welcome.nobody
    assert (site.limits.train_embeddings, site.limits.trainable_modules) == (False, ())
    assert (site.privacy.counts, site.privacy.label_statistics) == ((), ())
    floors = ("min_examples", "min_update_rows", "min_metric_rows")
    assert {getattr(site.privacy, floor) for floor in floors} == {10}


@pytest.mark.parametrize("value", ["", "[]", "null", "~"])
def test_an_identity_left_empty_is_nobody(file: Path, value: str):
    file.write_text(f"welcome: {{submitters: {value}, orgs: [clinic]}}")
    assert load_site(file).welcome.nobody


def test_a_whole_site_file_is_what_was_written(file: Path):
    said: dict[str, Any] = {
        "models": {"base": {"path": "/srv/m", "fingerprint": "ab", "quantizations": ["nf4"]}},
        "data": {"notes": {"train": "/srv/a.jsonl", "columns": {"text": "Brief"}}},
        "limits": {"max_rank": 4, "memory_gib": 2.5, "trainable_modules": ["norm"]},
        "privacy": {"min_examples": 200, "counts": ["examples"]},
        "welcome": {"orgs": "clinic", "tasks": ["causal_lm"]},
    }
    file.write_text(yaml.safe_dump(said))
    assert load_site(file) == SiteConfig.read(said, "test")
