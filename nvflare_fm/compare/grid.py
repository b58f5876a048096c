"""The published comparison: which methods run in which studies."""

from collections.abc import Mapping, Sequence

from ..cli.terminal import console
from .methods import AT_HOME, OURS, OWN_RATE, PRECISIONS, SLOW, TOGETHER, compared
from .run import Run, carry_out_all, duration, read_lines, seconds_per_round
from .study import Study, Workspace, study
from .tuning import ALPHAS, at_end, trials_expected, tune_all, tuned, tuned_on, unfinished

BANKING = [f"{kind}-{alpha}" for alpha in reversed(ALPHAS) for kind in ("banking77", "banking77lm")]
GRID = [*BANKING[:2], "medquad-types", "medquad-lm", *BANKING[2:]]
WRITTEN = ("banking77lm", "medquad-lm", "mtslm")
BESIDE = {  # what the grid runs besides
    "banking77-0.1": [AT_HOME, *PRECISIONS],
    "banking77lm-0.1": [AT_HOME, *PRECISIONS],
    "medquad-types": [AT_HOME],
    "medquad-lm": [AT_HOME],
    "banking77-0.1@random": [OURS, "pooled"],
    "banking77-0@random": [OURS, "pooled"],
}
PARTS = {  # what the lead is made of, and what becomes of slow sites
    "banking77-0.1": ["ours, FedExP's steps", *OWN_RATE, TOGETHER, *SLOW],
    "banking77lm-0.1": ["ours, plain steps", *SLOW],
    "medquad-types": ["ours, FedExP's steps", "ours, by examples"],
    "medquad-lm": ["ours, plain steps", "ours, by examples"],
    "banking77-0": [TOGETHER],
    "banking77-0.1@random": [TOGETHER],
    "banking77-0@random": [TOGETHER],
}


def cells() -> dict[str, list[str]]:
    """study → methods, the most skewed data first."""
    whole = {
        name: [*compared("causal_lm" if name.startswith(WRITTEN) else "sequence_classification"), *BESIDE.get(name, [])]
        for name in GRID
    }
    return whole | {name: methods for name, methods in BESIDE.items() if name not in GRID}


def runs(data: Study, tuned_with: Study, methods: Sequence[str], seeds: Sequence[int]) -> list[Run]:
    """A run per seed and method, at each method's tuned setting.

    Args:
        tuned_with: the study on which settings were tried.
        methods: those without a tuned setting are left out.
    """
    found, ends = tuned(tuned_with, methods), at_end(tuned_with, methods)
    return [
        Run(drawn, method, found[method][0], seed, head=found[method][1], at_end=method in ends)
        for seed in seeds
        for drawn in [data.at_seed(seed)]
        for method in methods
        if method in found
    ]


def run_all(methods: Mapping[str, Sequence[str]], workspace: Workspace, seeds: Sequence[int], cores: int) -> None:
    """Tune what has no setting yet and run what the results lack, once it is told how long that takes."""
    by_tuned: dict[str, dict[str, Sequence[str]]] = {}
    for name, asked in methods.items():
        by_tuned.setdefault(tuned_on(name), {})[name] = asked
    studies = {name: study(name, workspace) for name in {*methods, *by_tuned}}
    seconds = 0.0
    for name, cells in by_tuned.items():
        trials, left, more = work(studies[name], {studies[cell].name: studies[cell] for cell in cells}, cells, seeds)
        seconds += more / cores
        console().log(f"{', '.join(cells)}: about {trials} trials, {left} runs: {duration(more / cores)}")
    console().log(f"about {duration(seconds)} on {cores} cores")
    for name, cells in by_tuned.items():
        tune_all(studies[name], [method for asked in cells.values() for method in asked], cores)
    found = [
        run
        for name, asked in methods.items()
        for run in runs(studies[name], studies[tuned_on(name)], asked, seeds)
    ]  # fmt: skip
    carry_out_all(found, cores)


def work(
    tuned_with: Study, studies: Mapping[str, Study], methods: Mapping[str, Sequence[str]], seeds: Sequence[int]
) -> tuple[int, int, float]:
    """Estimate what is left to do for studies that are tuned together. A round of one site is timed.

    Args:
        tuned_with: the study on which settings are tried.
        methods: of each study, by its name.

    Returns:
        Trials and runs, and the seconds of one core that they take.
    """
    together = [*dict.fromkeys(method for asked in methods.values() for method in asked)]
    trials, unknown, left = trials_expected(tuned_with, together), unfinished(tuned_with, together), 0
    for name, asked in methods.items():
        written = {line.get("digest") for line in read_lines(studies[name].results())}
        ready = [method for method in asked if method not in unknown]
        left += sum(run.digest not in written for run in runs(studies[name], tuned_with, ready, seeds))
        left += len(seeds) * (len(asked) - len(ready))
    if not trials + left:
        return 0, 0, 0.0
    rounds = tuned_with.rounds * len(tuned_with.names)
    return trials, left, (trials + left) * rounds * seconds_per_round(tuned_with)
