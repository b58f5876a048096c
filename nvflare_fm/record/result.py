"""A job's result folder, from `nvflare job download` or a simulation: who counted in which round, and why not."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..files import open_file, read_object
from ..untrusted import one_line
from .reason import Reason
from .round import FILE_NAME, Round, in_words, read_rounds

MEASURED = Path("cross_site_val") / "cross_val_results.json"  # NVFlare's: site → adapter → metrics
REFUSED = MEASURED.with_name("cross_val_refused.json")  # ours: site → adapter → why it was not measured there
ADAPTERS, ERRORS = "adapters", "error_log.txt"
_TAIL = 64 * 1024  # bytes at the end of a log in which errors are looked for
_LONGEST = 300  # characters of one that are shown
_PANIC = "Aborting current RUN due to FATAL_SYSTEM_ERROR received: "  # what NVFlare says before the reason
_PLACES = ("workspace", "server/simulate_job", "*/workspace", "*/server/simulate_job")  # below the folder named


@dataclass(frozen=True)
class Result:
    """The records of a job, as the server wrote them."""

    folder: Path
    rounds: Sequence[Round]
    measured: Mapping[str, Mapping[str, Any]]
    refused: Mapping[str, Mapping[str, Any]]
    errors: Sequence[str]  # the last ones of the server's log

    @property
    def adapters(self) -> dict[str, Path]:
        """The finished adapters by name, the best first."""
        places = {name: self.folder / ADAPTERS / name for name in ("best", "last")}
        return {name: place for name, place in places.items() if place.is_dir()}


def read_result(folder: Path) -> Result:
    """Read a job's result, wherever in a downloaded folder it lies.

    Raises:
        DataError: the folder holds no result of a job of nvflare_fm, or more than one, or a file cannot be read.
    """
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}", code="no_result")
    places = [folder, *(place for pattern in _PLACES for place in folder.glob(pattern))]
    found = {place.resolve() for place in places if _holds_result(place)}
    if not found:
        raise DataError(
            f"{folder} holds neither {FILE_NAME} nor {MEASURED}: it is no result of a job of nvflare_fm",
            code="no_result",
        )
    if len(found) > 1:
        listed = ", ".join(str(place) for place in sorted(found)[:5])
        raise DataError(f"{folder} holds {len(found)} results; name one: {listed}", code="several_results")
    place = found.pop()
    rounds = read_rounds(place / FILE_NAME) if (place / FILE_NAME).exists() else []
    return Result(place, rounds, _by_site(place / MEASURED), _by_site(place / REFUSED), last_errors(place / ERRORS))


def _holds_result(place: Path) -> bool:
    return any((place / name).is_file() for name in (FILE_NAME, MEASURED, REFUSED, ERRORS))


def last_errors(log: Path, count: int = 3) -> list[str]:
    """Find the last errors in a log as NVFlare writes it; none where there is no such file.

    Returns:
        At most `count` texts, each on one line and cut, the same one once.
    """
    try:
        with open_file(log) as opened:
            opened.seek(max(0, log.stat().st_size - _TAIL))
            lines = opened.read(_TAIL).decode(errors="replace").splitlines()
    except (OSError, ValueError):
        return []
    said = [re.split(r" - ERROR - (?:\[identity=[^]]*\] - )?", line)[-1] for line in lines if " - ERROR - " in line]
    shown = [one_line(error.replace(_PANIC, "")) for error in said[-count:]]
    return list(dict.fromkeys(e if len(e) <= _LONGEST else f"{e[:_LONGEST]}…" for e in shown))


def _by_site(file: Path) -> dict[str, dict[str, Any]]:
    try:
        values = read_object(file) if file.exists() else {}
    except (OSError, ValueError) as error:
        raise DataError(f"{file.name} cannot be read", f"{file}: {error}", code="result_unreadable") from None
    return {site: dict(said) for site, said in values.items() if isinstance(said, dict)}


def explanation(result: Result) -> Iterator[str]:
    """Say in lines for a person which sites counted in which rounds, and of the others why not."""
    for line in result.rounds:
        yield in_words(line)[0]
    trained = [line for line in result.rounds if line.trained or line.out or line.chosen is not None]
    if noised := [line.noised for line in trained if line.noised]:
        yield f"ε of the job to each site as a whole: {noised[-1].epsilon:.3g} at δ = {noised[-1].delta:g}"
    for site in sorted({name for line in trained for name in (*line.asked, *line.sites, *line.out)}):
        yield from _of_site(site, trained)
    yield from measurements(result)
    if not result.rounds and not result.measured:
        yield "the job ended before its first round did; its last errors:" if result.errors else "no round has ended"
        yield from (f"  {error}" for error in result.errors)


def _of_site(site: str, rounds: Sequence[Round]) -> Iterator[str]:
    asked = [line for line in rounds if site in line.asked]
    counted = [line for line in rounds if site in line.sites and site not in line.out]
    yield one_line(f"{site}: counted in {len(counted)} of {len(asked)} rounds")
    if spent := [line.sites[site].epsilon for line in counted if line.sites[site].epsilon is not None]:
        yield f"  ε of the job at this site: at most {spent[-1]:g}"
    reasons: dict[Reason, list[int]] = {}
    for line in rounds:
        if site in line.out:
            reasons.setdefault(line.out[site], []).append(line.round)
    for reason, numbers in reasons.items():
        yield f"  {one_line(f'{_rounds(numbers)}: {reason}')}"
    scaled = {line.round: line.scaled[site] for line in rounds if site in line.scaled}
    if scaled:
        worst = min(scaled, key=lambda number: scaled[number].multiplier * scaled[number].weight)
        least = f", least in round {worst}" if len(scaled) > 1 else ""
        yield f"  {one_line(f'counted in part in {_rounds([*scaled])}{least}: {scaled[worst]}')}"


def _rounds(numbers: Sequence[int]) -> str:
    """`round 3`, `rounds 0 to 4` or `rounds 0, 2, 5`."""
    if len(numbers) == 1:
        return f"round {numbers[0]}"
    if list(numbers) == list(range(numbers[0], numbers[-1] + 1)):
        return f"rounds {numbers[0]} to {numbers[-1]}"
    return f"rounds {', '.join(map(str, numbers))}"


def measurements(result: Result) -> Iterator[str]:
    """Say in lines for a person what cross-site evaluation measured at each site, or why it did not."""
    for site in sorted({*result.measured, *result.refused}):
        for adapter, metrics in sorted(result.measured.get(site, {}).items()):
            if isinstance(metrics, dict) and metrics:
                shown = ", ".join(f"{name} {_number(value)}" for name, value in sorted(metrics.items()))
                yield one_line(f"{site}: measured {adapter}: {shown}")
        for adapter, reason in sorted(result.refused.get(site, {}).items()):
            yield one_line(f"{site}: did not measure {adapter}: {reason}")


def _number(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
