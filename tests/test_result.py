"""What a job's server wrote down, read back and told: which sites counted in which rounds, and why not."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from nvflare_fm.adapter import Adapter
from nvflare_fm.aggregation.combine import Combined
from nvflare_fm.cli import app
from nvflare_fm.errors import DataError
from nvflare_fm.flare.ledger import Ledger
from nvflare_fm.record.reason import Reason, Verdict
from nvflare_fm.record.result import explanation, last_errors, read_result
from nvflare_fm.record.round import FILE_NAME, SPECTRA, Round, Spectra, in_words, read_line, read_rounds, read_spectra
from nvflare_fm.record.site_report import Contribution
from tests.strategies import update


def typed(*words: Any) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def write(folder: Path, outs: list[dict[str, str]]) -> Path:
    """Rounds of three sites as the server writes them; those in `out` do not count."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, out in enumerate(outs):
        why = {site: Reason.of(*message.split(": ", 1)) for site, message in out.items()}
        ledger = Ledger(number, len(outs), ["alder", "birch", "cedar"], 0, out=why)
        sites = {site: Contribution(loss=1.5, weight=0.5) for site in ledger.asked if site not in out}
        ledger.result = {"sites": sites, "metrics": {"loss": 2.0 - number / 10} if sites else {}}
        ledger.write(folder)
    return folder


def test_each_site_is_told_how_often_it_counted_and_why_not(tmp_path: Path) -> None:
    rank, silent = "refused: rank 99 is more than the 8 this site allows", "silent: no answer before the round ended"
    outs = [{"cedar": rank}, {"cedar": rank, "birch": silent}, {"cedar": rank}]
    lines = list(explanation(read_result(write(tmp_path, outs))))
    assert lines[0].startswith("after 0 of 3 rounds: loss 2; then 2 of 3 sites trained, training loss 1.5, ")
    assert lines[3:] == [
        "alder: counted in 3 of 3 rounds",
        "birch: counted in 2 of 3 rounds",
        f"  round 1: {silent}",
        "cedar: counted in 0 of 3 rounds",
        f"  rounds 0 to 2: {rank}",
    ]


def test_what_a_job_has_cost_a_site_in_privacy_is_told_at_last(tmp_path: Path) -> None:
    for number, spent in enumerate((0.5, 2.0)):
        ledger = Ledger(number, 2, ["alder", "birch"], 0)
        ledger.result = {"sites": {"alder": Contribution(weight=0.5, epsilon=spent), "birch": Contribution(weight=0.5)}}
        assert ledger.progress({})["epsilon"] == f"alder: at most {spent:g}"
        ledger.write(tmp_path)
    lines = list(explanation(read_result(tmp_path)))
    assert lines[2:] == [
        "alder: counted in 2 of 2 rounds",
        "  ε of the job at this site: at most 2",
        "birch: counted in 2 of 2 rounds",
    ]


def test_a_job_in_which_all_refuse_says_so_at_once(tmp_path: Path) -> None:
    lines = list(explanation(read_result(write(tmp_path, [dict.fromkeys(["alder", "birch", "cedar"], "refused: no")]))))
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
    assert "[no_such_result]" in str(typed("explain", "job").exception)
    unasked = typed("explain", "0a1b2c3d-0000-4000-8000-000000000000")
    assert "[no_kit]" in str(unasked.exception)
    no_kit = typed("explain", "0a1b2c3d-0000-4000-8000-000000000000", "--kit", tmp_path)
    assert "[no_admin_kit]" in str(no_kit.exception)


def test_where_an_adapter_was_not_measured_is_told_with_the_reason(tmp_path: Path) -> None:
    folder = tmp_path / "cross_site_val"
    folder.mkdir()
    (folder / "cross_val_results.json").write_text(
        '{"alder": {"SRV_last": {"loss": 0.51234}}, "oak": {"SRV_last": {}}}'
    )
    (folder / "cross_val_refused.json").write_text('{"oak": {"SRV_last": "quantization \\u001b[2J"}}')
    assert list(explanation(read_result(tmp_path))) == [
        "alder: measured SRV_last: loss 0.5123",
        "oak: did not measure SRV_last: quantization \\x1b[2J",
    ]


def test_a_job_that_ended_before_a_round_is_explained_by_its_last_errors(tmp_path: Path) -> None:
    line = (
        "2026-11-27 02:10:30,202 - ServerRunner - ERROR - [identity=server, run=x, wf=controller] - plan: unknown {}\n"
    )
    (tmp_path / "error_log.txt").write_text("".join(line.format(i) for i in (1, 2, 3, 4, 4)) + "no error\n")
    assert last_errors(tmp_path / "error_log.txt") == ["plan: unknown 3", "plan: unknown 4"]
    assert list(explanation(read_result(tmp_path)))[1:] == ["  plan: unknown 3", "  plan: unknown 4"]
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
    assert in_words(line)[1] == "  alder: refused: \\x1b[2J all is well"


def test_a_round_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    """The singular values lie in a file beside it, and numbers that are not finite are left out."""
    ledger = Ledger(3, 5, ["alder", "birch"], 7, answered=["alder"], out={"birch": Reason("stopped", "no\nmore", "x")})
    ledger.spectra = {"q": (3.0, 1.0)}
    ledger.result = {
        "sites": {"alder": Contribution(examples=9, loss=float("nan"), before={"loss": 2.0}, weight=1.0, bytes_up=5)},
        "metrics": {"loss": 2.0, "other": float("inf")},
        "guarded": {"alder": Verdict(0.25, "far")},
        "held": {"alder": "examples"},
        "step_size": None,
        "how": {"merge": "exact"},
    }
    ledger.write(tmp_path)
    (line,) = read_rounds(tmp_path / FILE_NAME)
    assert line.out == ledger.out
    assert line.sites["alder"].before == {"loss": 2.0}
    assert (line.sites["alder"].weight, line.sites["alder"].bytes_up, line.loss) == (1.0, 5, None)
    assert (line.metrics, line.guarded["alder"], line.how) == ({"loss": 2.0}, Verdict(0.25, "far"), {"merge": "exact"})
    assert read_spectra(tmp_path / SPECTRA) == [Spectra(round=3, layers={"q": (3.0, 1.0)})]
    assert "3.0, 1.0" not in (tmp_path / FILE_NAME).read_text()


def test_every_field_of_a_round_is_filled_by_the_server() -> None:
    """Before a round is merged all but what the merge tells; what the merge tells has its field."""
    combined = Combined(Adapter(), None, {"alder": 1.0})
    ledger = Ledger(0, 1, ["alder"], 0)
    ledger.close(combined, {"alder": update("alder", Adapter())})
    filled = set(ledger.line.model_fields_set)
    assert filled == set(Round.model_fields)


def test_a_site_that_counts_in_part_is_explained_by_the_round_in_which_it_counted_least(tmp_path: Path) -> None:
    for number, much in enumerate((0.5, 0.2, 1.0, 0.0)):
        ledger = Ledger(number, 4, ["alder", "cedar"], 0)
        sites = {site: Contribution(weight=0.5) for site in ledger.asked}
        ledger.result = {"sites": sites, "guarded": {"cedar": Verdict(much, f"{number}")} if much < 1 else {}}
        ledger.out = {} if much else {"cedar": Reason("guard", "far off")}
        ledger.write(tmp_path)
    lines = list(explanation(read_result(tmp_path)))
    assert lines[-3:] == [
        "cedar: counted in 3 of 4 rounds",
        "  round 3: guard: far off",
        "  counted in part in rounds 0 to 1, least in round 1: 0.2 of its change counts: 1",
    ]
    assert not any("in part" in line for line in lines[:-1])


def test_a_line_as_earlier_versions_wrote_it_is_read(tmp_path: Path) -> None:
    """Reasons were texts with a prefix, and singular values lay in the line."""
    report = {"examples": 9, "tokens": None, "steps": 4, "loss": 1.5, "seconds": 0.5, "peak_memory_mib": 0.0, "rank": 3}
    report |= {"quantization": "nf4", "before": {"loss": 2.0}, "after": {}, "bad_rows": 0, "label_skew": None}
    report |= {"weight": 0.5, "staleness": 0, "bytes_up": 100, "max_weight": 1.0, "lowered": [], "tokens_per_s": None}
    out = {"b": "refused: rank: 9 is too much [rank_too_large]", "c": "rejected: guard: its head", "d": "silent: no"}
    line = {"round": 1, "total_rounds": 2, "asked": ["a", "b", "c", "d"], "bytes_down": 10, "answered": ["a"]}
    line |= {"out": out, "late": [], "sites": {"a": report}, "metrics": {"loss": 2.0}, "medians": {}, "after": {}}
    line |= {"factors": {"uniform": {"a": 1.0}}, "guarded": {"a": {"multiplier": 0.5, "reason": "far"}}, "held": {}}
    line |= {"error": "", "step_size": 1.0, "energy_lost": {"q": 0.0}, "spectrum": {"q": [2.0]}}
    line |= {"effective_rank": {"q": 1.0}, "how": {"merge": "exact"}, "seconds": 3.0, "ended": "2026-11-27"}
    read = read_line(json.dumps(line))
    assert read.out["b"] == Reason("refused", "rank: 9 is too much", "rank_too_large")
    assert (read.loss, read.trained, read.scaled["a"].multiplier) == (1.5, True, 0.5)
    (tmp_path / FILE_NAME).write_text(json.dumps(line) + "\n")
    lines = list(explanation(read_result(tmp_path)))
    assert f"  round 1: {out['b']}" in lines
    assert f"  round 1: {out['c']}" in lines
