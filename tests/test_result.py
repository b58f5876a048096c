"""What a job's server wrote down, read back and told: which sites counted in which rounds, and why not."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from nvflare_fm.cli import app
from nvflare_fm.errors import DataError
from nvflare_fm.flare.ledger import Ledger
from nvflare_fm.result import explained, last_errors, read_result
from nvflare_fm.rounds import FILE_NAME, read_line, read_rounds, told


def typed(*words: Any) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def write(folder: Path, outs: list[dict[str, str]]) -> Path:
    """Rounds of three sites as the server writes them; those in `out` do not count."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, out in enumerate(outs):
        ledger = Ledger(number, len(outs), ["alder", "birch", "cedar"], 0, out=dict(out))
        ledger.sites = {site: {"loss": 1.5, "weight": 0.5} for site in ledger.asked if site not in out}
        ledger.metrics = {"loss": 2.0 - number / 10} if ledger.sites else {}
        ledger.write(folder)
    return folder


def test_each_site_is_told_how_often_it_counted_and_why_not(tmp_path: Path) -> None:
    rank, silent = "refused: rank 99 is more than the 8 this site allows", "silent: no answer before the round ended"
    outs = [{"cedar": rank}, {"cedar": rank, "birch": silent}, {"cedar": rank}]
    lines = list(explained(read_result(write(tmp_path, outs))))
    assert lines[0].startswith("after 0 of 3 rounds: loss 2; then 2 of 3 sites trained, training loss 1.5, ")
    assert lines[3:] == [
        "alder: counted in 3 of 3 rounds",
        "birch: counted in 2 of 3 rounds",
        f"  round 1: {silent}",
        "cedar: counted in 0 of 3 rounds",
        f"  rounds 0 to 2: {rank}",
    ]


def test_a_job_in_which_all_refuse_says_so_at_once(tmp_path: Path) -> None:
    lines = list(explained(read_result(write(tmp_path, [dict.fromkeys(["alder", "birch", "cedar"], "refused: no")]))))
    assert lines[0] == "after 0 of 1 rounds: not measured; no site gave a usable answer"
    assert lines.count("  round 0: refused: no") == 3


@pytest.mark.parametrize("place", [".", "workspace", "job-1/workspace", "server/simulate_job"])
def test_a_result_is_found_wherever_a_download_puts_it(tmp_path: Path, place: str) -> None:
    write(tmp_path / place, [{}])
    assert "alder: counted in 1 of 1 rounds" in typed("explain", tmp_path).stdout


def test_what_is_no_result_or_several_is_refused(tmp_path: Path) -> None:
    for folder, code in ((tmp_path, "no_result"), (tmp_path / "gone", "no_result")):
        with pytest.raises(DataError) as caught:
            read_result(folder)
        assert caught.value.code == code
    for name in ("a", "b"):
        write(tmp_path / name / "workspace", [{}])
    with pytest.raises(DataError) as caught:
        read_result(tmp_path)
    assert caught.value.code == "several_results"
    assert "neither a folder nor the id of a job" in str(typed("explain", "job").exception)
    unasked = typed("explain", "0a1b2c3d-0000-4000-8000-000000000000")
    assert "say where your startup kit is" in str(unasked.exception)
    no_kit = typed("explain", "0a1b2c3d-0000-4000-8000-000000000000", "--kit", tmp_path)
    assert "is no startup kit" in str(no_kit.exception)


def test_where_an_adapter_was_not_measured_is_told_with_the_reason(tmp_path: Path) -> None:
    folder = tmp_path / "cross_site_val"
    folder.mkdir()
    (folder / "cross_val_results.json").write_text(
        '{"alder": {"SRV_last": {"loss": 0.51234}}, "oak": {"SRV_last": {}}}'
    )
    (folder / "cross_val_refused.json").write_text('{"oak": {"SRV_last": "quantization \\u001b[2J"}}')
    assert list(explained(read_result(tmp_path))) == [
        "alder: measured SRV_last: loss 0.5123",
        "oak: did not measure SRV_last: quantization \\x1b[2J",
    ]


def test_a_job_that_ended_before_a_round_is_explained_by_its_last_errors(tmp_path: Path) -> None:
    line = (
        "2026-11-27 02:10:30,202 - ServerRunner - ERROR - [identity=server, run=x, wf=controller] - plan: unknown {}\n"
    )
    (tmp_path / "error_log.txt").write_text("".join(line.format(i) for i in (1, 2, 3, 4, 4)) + "no error\n")
    assert last_errors(tmp_path / "error_log.txt") == ["plan: unknown 3", "plan: unknown 4"]
    assert list(explained(read_result(tmp_path)))[1:] == ["  plan: unknown 3", "  plan: unknown 4"]
    assert last_errors(tmp_path / "none") == []


def test_a_line_that_is_half_written_is_left_for_later_and_a_strange_one_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path, [{}, {}]) / FILE_NAME
    whole = file.read_bytes()
    file.write_bytes(whole[:-5])
    assert len(read_rounds(file)) == 1
    for text in (b"[1]\n", b'{"round": -1, "total_rounds": 1}\n', b"\xff\n", b'{"round": 0}\n', b"[" * 10**5 + b"\n"):
        file.write_bytes(whole + text)
        with pytest.raises(DataError) as caught:
            read_rounds(file)
        assert caught.value.code == "rounds_unreadable"


def test_what_a_site_writes_cannot_steer_the_screen() -> None:
    out = {"alder": "refused: \x1b[2J\nall is well"}
    line = read_line(json.dumps({"round": 0, "total_rounds": 1, "out": out, "metrics": {"loss": float("nan")}}))
    assert told(line)[1] == "  alder: refused: \\x1b[2J all is well"
