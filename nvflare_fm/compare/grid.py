"""The published comparison: which methods run in which studies."""

from collections.abc import Mapping, Sequence

from .methods import AT_HOME, COMPARED, OURS, OWN_RATE, PRECISIONS, SLOW, TOGETHER
from .run import Run, carry_out_all
from .study import Study, Workspace, study
from .tuning import ALPHAS, tune_all, tuned, tuned_on

BANKING = [f"{kind}-{alpha}" for alpha in reversed(ALPHAS) for kind in ("banking77", "banking77lm")]
GRID = [*BANKING[:2], "medquad-types", "medquad-lm", *BANKING[2:]]
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
    whole = {name: [*COMPARED, *BESIDE.get(name, [])] for name in GRID}
    return whole | {name: methods for name, methods in BESIDE.items() if name not in GRID}


def runs(data: Study, tuning_of: str, methods: Sequence[str], seeds: Sequence[int]) -> list[Run]:
    """A run per seed and method, at each method's tuned rate."""
    rates = tuned(data, tuning_of)
    return [Run(data, method, rates[method], seed) for seed in seeds for method in methods]


def run_all(methods: Mapping[str, Sequence[str]], workspace: Workspace, seeds: Sequence[int], cores: int) -> None:
    """Tune what has no rate yet and run what the results lack."""
    for name in dict.fromkeys(map(tuned_on, methods)):
        together = [method for other in methods if tuned_on(other) == name for method in methods[other]]
        tune_all(study(name, workspace), name, together, cores)
    found = {name: study(name, workspace) for name in methods}
    carry_out_all([run for name in methods for run in runs(found[name], tuned_on(name), methods[name], seeds)], cores)
